"""How commands print."""

from __future__ import annotations

import sys

from rich.console import Console

_WIDE = 200  # columns, where the output is no terminal


def console() -> Console:
    """Return a console on standard output, which does not wrap for programs that read it."""
    return Console(width=None if sys.stdout.isatty() else _WIDE)
