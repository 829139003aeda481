"""Entry point of the console script `grank`, outside of the package so that it runs before torch is imported."""

import os
import signal


def main() -> None:
    """Run `grank`; Ctrl-C during the imports ends the process with one line and status 130."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _stop)
    from grank_kernels.recommender.cli.main import main

    main()


def _stop(*_: object) -> None:
    os.write(2, b"grank: interrupted\n")
    os._exit(130)
