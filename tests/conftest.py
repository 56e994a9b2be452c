"""Fixtures that several parts of the tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest
from matplotlib.figure import Figure


@pytest.fixture(scope="session")
def fashion_mnist_root() -> Path:
    """Return the folder of Debian's dataset-fashion-mnist; CI must have it, others may skip."""
    root = Path("/usr/share/datasets/fashion-mnist")
    if not root.is_dir():
        message = f"no {root}: apt install dataset-fashion-mnist"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return root


@pytest.fixture
def blank_figures() -> Iterator[None]:
    """Leave figures empty once they are drawn; rendering takes most of a small run's time.

    For tests that do not look at them, beside others that do.
    """

    def savefig(figure: Figure, file: TextIO, **_: object) -> None:
        file.write('<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>')

    with pytest.MonkeyPatch.context() as patch:  # of its own: tests undo theirs
        patch.setattr(Figure, "savefig", savefig)
        yield
