"""Recipes for data that cannot be had here, on small files in the real formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import spamprune as sp
from spamprune.data import load as load_data
from spamprune.engine.cell import run_cell
from spamprune.recipe import load
from spamprune.report import measure
from spamprune.report.results import Cell
from tests.data.conftest import idx_bytes

SHORT = ["seeds=[0]", "evaluate.batch_size=4", "evaluate.latency_batches=[]"]
PRUNE = (
    "prune=[{kind: unstructured, criteria: [opd], sparsities: [0.9]}, "
    "{kind: structured, targets: [{ratio: 0.5}]}]"
)


def cifar(folder: Path) -> Path:
    """Write 24 random images in CIFAR-10's binary format."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        labels, pixels = rng.integers(10, size=(4, 1)), rng.integers(256, size=(4, 3072))
        (folder / name).write_bytes(np.hstack([labels, pixels]).astype(np.uint8).tobytes())
    return folder


def mnist(folder: Path) -> Path:
    """Write 24 random images as MNIST's idx files."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, n in (("train", 20), ("t10k", 4)):
        images, labels = rng.integers(256, size=(n, 28, 28)), rng.integers(10, size=n)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return folder


def check(cell: Cell, params: int, data: sp.data.DataSet, out: Path) -> None:
    """Check what a step, an evidence step and pruning left, and that it comes back as it was."""
    assert cell.size.params == params
    assert cell.history[0].log_evidence is not None
    (masked,), (compacted,) = cell.masked, cell.compacted
    assert masked.nonzero == pytest.approx(0.1 * params, rel=0.01)
    assert compacted.size.params < 0.5 * params
    assert compacted.residual < 1e-4
    for record in (masked, compacted):
        again = sp.load(out / record.artifact)
        measured = measure.quality(again, data.test.loader(4)).model_dump()
        assert measured == pytest.approx(record.pruned.model_dump(), abs=1e-6)
    assert sum(p.numel() for p in again.parameters()) == compacted.size.params


def test_wrn16_4_on_files_in_cifars_format(tmp_path: Path) -> None:
    root = cifar(tmp_path / "cifar-10-batches-bin")
    training = "diag-parameterwise"
    evidence = f"train.{training}.evidence={{every: 1, steps: 2}}"
    settings = [f"data.root={root}", f"train.{training}.epochs=1", evidence, PRUNE, *SHORT]
    cell = run_cell(load("wrn16_cifar10", settings), training, 0, tmp_path / "run")
    data = load_data("cifar10", root=str(root), validation=0)
    check(cell, 2_745_306, data, tmp_path / "run")


@pytest.mark.parametrize("training", ["diag-unitwise", "kfac-parameterwise"])
def test_lenet_on_files_in_mnists_format(training: str, tmp_path: Path) -> None:
    root = mnist(tmp_path / "mnist")
    evidence = f"train.{training}.evidence={{every: 1, steps: 2}}"
    settings = [f"data.root={root}", f"train.{training}.epochs=1", evidence, PRUNE, *SHORT]
    cell = run_cell(load("lenet_mnist", settings), training, 0, tmp_path / "run")
    check(cell, 60_170, load_data("mnist", root=str(root), validation=0), tmp_path / "run")
