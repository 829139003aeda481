"""The console command `grank`; what it does is in commands.py, which needs packages of the extra `train`."""

import os
import sys

_EXTRA = ("lightning", "pyarrow", "safetensors", "scipy", "tensorboardX", "torchmetrics", "tqdm", "typer")


def main() -> None:
    """Errors of the user's making are one line and exit status 1."""
    try:
        from grank_kernels.recommender.cli.commands import app

        app(prog_name="grank")
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        _fail(f"{error.name} is not installed: pip install 'grank-kernels[train]'")
    except (ImportError, OSError, TypeError, ValueError) as error:
        if os.environ.get("GRANK_TRACEBACK"):
            raise
        _fail(str(error))


def _fail(message: str) -> None:
    print(f"grank: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
