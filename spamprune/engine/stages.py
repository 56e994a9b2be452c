"""Saying what a command works on, so that nothing takes long in silence."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


class Stages:
    """Prints a line for each stage of the work, with its time.

    Args:
        console: Where to; by default standard error.
    """

    def __init__(self, console: Console | None = None):
        self._console = console or Console(stderr=True, highlight=False, markup=False)
        self._open = False

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Print ``name`` at once, and the seconds when the work within is done."""
        self._console.print(name, end=" … ")
        self._open = True
        start = time.perf_counter()
        done = False
        try:
            yield
            done = True
        finally:
            if done:
                seconds = f"{time.perf_counter() - start:.1f} s"
                self._console.print(seconds if self._open else f"{name}: {seconds}")
            elif self._open:
                self._console.print()  # an error has its own line
            self._open = False

    def note(self, text: str) -> None:
        """Print a line on what happens within a stage."""
        if self._open:
            self._console.print()
            self._open = False
        self._console.print(f"  {text}")
