"""`python -m grank_kernels`: what can run here, or why not."""

from grank_kernels.doctor import show_config

if __name__ == "__main__":
    print(show_config())
