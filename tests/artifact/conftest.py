"""Fixtures of the tests of artifacts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spamprune.artifact import save
from tests.artifact.cases import small_lenet


@pytest.fixture(scope="module", autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """An artifact of a pruned LeNet."""
    return save(small_lenet(), tmp_path / "small")
