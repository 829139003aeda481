"""Training and serving of models that are built on the ops. Nothing outside this package imports it."""
