"""`python -m grank_kernels` is the command `grank`."""

from grank_kernels.recommender.cli.main import main

if __name__ == "__main__":
    main()
