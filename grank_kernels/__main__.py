"""`python -m grank_kernels`: what can run here, or why not."""

from grank_kernels.config import show_config

if __name__ == "__main__":
    print(show_config())
