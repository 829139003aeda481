"""A small CSV of one's own: users walk through neighbouring items."""

from pathlib import Path


def write_walks(path: Path, users: int = 30, items: int = 40, length: int = 14) -> Path:
    """Users `u00`, ... who take the items `B00`, ... in turns, each from a start of their own."""
    rows = [
        f"u{user:02},B{(7 * user + step) % items:02},{1_700_000_000 + 60 * (length * user + step)},{1 + step % 5}"
        for user in range(users)
        for step in range(length)
    ]
    path.write_text("\n".join(["user,item,timestamp,rating", *rows]) + "\n")
    return path


def write_titles(path: Path, items: int = 40) -> Path:
    path.write_text("item,title\n" + "".join(f'B{item:02},"Title {item}, é"\n' for item in range(items)))
    return path
