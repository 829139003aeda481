"""`ItemTable`: rows, ids, updates, files."""
