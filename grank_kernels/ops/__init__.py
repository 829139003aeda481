"""The ops behind the public functions: torch.library registration, autograd, dispatch, the search of one table."""
