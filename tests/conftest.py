"""Fixtures that several parts of the tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


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
