"""Readers of the raw files: idx (MNIST and its kin) and CIFAR's binary records."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from spamprune.errors import DataError

AGAIN = "fetch the file again"


def read_idx_samples(images: Path, labels: Path, classes: int) -> tuple[Tensor, Tensor]:
    """Read grey images and their labels from two idx files, gzipped or not.

    Returns:
        uint8 images ``(N, 1, H, W)`` and int64 labels ``(N,)``.

    Raises:
        DataError: A file is damaged, a label is not below ``classes``, or the files differ in
            how many samples they hold.
    """
    pixels = read_idx(images, 3)
    targets = read_idx(labels, 1)
    if len(pixels) != len(targets):
        raise DataError(
            f"{images}: {len(pixels)} images, but {labels} holds {len(targets)} labels: "
            "take both from the same data set"
        )
    return pixels[:, None], _checked(targets, classes, labels)


def read_idx(path: Path, dims: int) -> Tensor:
    """Read an idx file of bytes.

    The format is that of http://yann.lecun.com/exdb/mnist: two zero bytes, 8 for unsigned bytes,
    the number of dimensions, their big-endian sizes, the data.

    Args:
        path: The file; a name that ends in ``.gz`` is unpacked.
        dims: How many dimensions it must have.

    Returns:
        uint8, of the shape in the header.

    Raises:
        DataError: The file is no such idx file, truncated, too long or empty of samples.
    """
    data = _contents(path)
    magic, header = bytes((0, 0, 8, dims)), 4 + 4 * dims
    if data[:4] != magic:
        raise DataError(
            f"{path}: starts with bytes {data[:4].hex() or '(none)'}, an idx file of {dims} "
            f"dimension(s) with {magic.hex()}: {AGAIN}"
        )
    if len(data) < header:
        raise DataError(f"{path}: {header} bytes of header expected, {len(data)} found: {AGAIN}")
    shape = struct.unpack(f">{dims}I", data[4:header])
    expected = header + math.prod(shape)
    if len(data) != expected:
        raise DataError(f"{path}: {expected} bytes expected, {len(data)} found: {AGAIN}")
    if 0 in shape:
        raise DataError(f"{path}: holds no samples, its header says {shape}: {AGAIN}")
    return torch.frombuffer(data, dtype=torch.uint8, offset=header).view(shape)


def read_cifar(paths: Sequence[Path], classes: int, label_bytes: int) -> tuple[Tensor, Tensor]:
    """Read CIFAR's binary version: records of labels and a 3×32×32 image, gzipped or not.

    The format is that of https://www.cs.toronto.edu/~kriz/cifar.html.

    Args:
        paths: Files, one after the other.
        classes: Labels must be below this.
        label_bytes: Labels in a record, the last of which counts (CIFAR-100's fine one).

    Returns:
        uint8 images ``(N, 3, 32, 32)`` and int64 labels ``(N,)``.

    Raises:
        DataError: A file does not hold whole records, or a label is not below ``classes``.
    """
    size = label_bytes + 3 * 32 * 32
    images, targets = [], []
    for path in paths:
        data = _contents(path)
        if not data or len(data) % size:
            raise DataError(
                f"{path}: whole records of {size} bytes expected, {len(data)} bytes found: {AGAIN}"
            )
        records = torch.frombuffer(data, dtype=torch.uint8).view(-1, size)
        targets.append(_checked(records[:, label_bytes - 1], classes, path))
        images.append(records[:, label_bytes:].reshape(-1, 3, 32, 32))
    return torch.cat(images), torch.cat(targets)


def _contents(path: Path) -> bytearray:
    try:
        if path.suffix != ".gz":
            return bytearray(path.read_bytes())
        with gzip.open(path) as file:
            return bytearray(file.read())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}): {AGAIN}") from error


def _checked(labels: Tensor, classes: int, path: Path) -> Tensor:
    if labels.max() >= classes:
        raise DataError(
            f"{path}: label {int(labels.max())} found, only 0 to {classes - 1} expected: {AGAIN}"
        )
    return labels.long()
