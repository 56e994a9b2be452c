"""Tiny data sets in the real file formats."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

IDX_NAMES = {
    "train-images-idx3-ubyte": (20, 6, 6),
    "train-labels-idx1-ubyte": (20,),
    "t10k-images-idx3-ubyte": (8, 6, 6),
    "t10k-labels-idx1-ubyte": (8,),
}


def idx_bytes(array: np.ndarray) -> bytes:
    """Return ``array`` as an idx file."""
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def make_idx() -> Callable[..., Path]:
    """Return a function that fills a folder with 20 + 8 grey images of 6×6 pixels."""

    def make(folder: Path, zipped: bool = False) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for name, shape in IDX_NAMES.items():
            data = idx_bytes(rng.integers(256 if len(shape) > 1 else 10, size=shape))
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(data))
            else:
                (folder / name).write_bytes(data)
        return folder

    return make


@pytest.fixture
def make_cifar() -> Callable[..., Path]:
    """Return a function that fills a folder with 4 random images per file."""

    def make(folder: Path, names: Sequence[str], label_bytes: int, classes: int) -> Path:
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for name in names:
            labels = rng.integers(classes, size=(4, label_bytes))
            pixels = rng.integers(256, size=(4, 3072))
            records = np.concatenate([labels, pixels], axis=1).astype(np.uint8)
            (folder / name).write_bytes(records.tobytes())
        return folder

    return make


@pytest.fixture
def image_root(tmp_path: Path) -> Path:
    """Return a folder with train (10) and test (4) images of two classes, and odd modes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 5), ("test", 2)):
        for cls in ("ant", "bee"):
            folder = tmp_path / "images" / part / cls
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(256, size=(12, 16, 3), dtype=np.uint8)
                mode = ("RGB", "L", "RGBA")[i % 3]
                Image.fromarray(pixels).convert(mode).save(folder / f"{i}.png")
    return tmp_path / "images"
