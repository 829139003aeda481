"""The console command `grank`: one-line errors and the exit status of the commands in commands.py."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

_EXTRA = ("lightning", "pyarrow", "safetensors", "scipy", "tensorboardX", "torchmetrics", "tqdm", "typer", "yaml")
_INTERRUPTED = 130  # 128 + SIGINT, as shells count


def main() -> None:
    """Run a command and exit: 0 done, 1 error, 2 wrong usage, 130 interrupted."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a shell's background job
        signal.signal(signal.SIGINT, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # titles may hold characters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        from grank_kernels.recommender.cli.commands import app

        app(prog_name="grank")  # ends by SystemExit
    except SystemExit as stop:
        _flush()
        if stop.code == _INTERRUPTED:
            _fail("interrupted", _INTERRUPTED)
        raise
    except KeyboardInterrupt:
        _fail("interrupted", _INTERRUPTED)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        _fail(f"{error.name} is not installed: pip install 'grank-kernels[train]'")
    except (FloatingPointError, ImportError, MemoryError, OSError, TypeError, ValueError) as error:
        if os.environ.get("GRANK_TRACEBACK"):
            raise
        _fail(_message(error))


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C: KeyboardInterrupt, but the end of the process during an import, where Python may swallow exceptions."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"grank: interrupted\n")
            os._exit(_INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return str(error) or type(error).__name__


def _flush() -> None:
    """Write what standard output still holds; a reader that has gone, as `head` does, is no error worth a message."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(1)


def _fail(message: str, status: int = 1) -> NoReturn:
    print(f"grank: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
