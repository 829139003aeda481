"""Text for the terminal."""

import sys


def note(text: str) -> None:
    """Write a line to standard error, which is left to everything but the result."""
    print(f"grank: {text}", file=sys.stderr)


def printable(text: str) -> str:
    """A text of a data set without control characters, which a terminal would obey."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
