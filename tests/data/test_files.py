from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spamprune.data.files import read_cifar, read_idx, read_idx_samples
from spamprune.errors import DataError

IMAGES = struct.pack(">4B3I", 0, 0, 8, 3, 2, 2, 3) + bytes(range(12))
LABELS = struct.pack(">4BI", 0, 0, 8, 1, 2) + bytes([9, 0])


def written(tmp_path: Path, name: str, data: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("zipped", [False, True])
def test_idx(tmp_path: Path, zipped: bool) -> None:
    pack: Callable[[bytes], bytes] = gzip.compress if zipped else bytes
    ending = ".gz" if zipped else ""
    images = written(tmp_path, f"images{ending}", pack(IMAGES))
    labels = written(tmp_path, f"labels{ending}", pack(LABELS))
    pixels, targets = read_idx_samples(images, labels, 10)
    assert pixels.dtype == torch.uint8
    assert pixels.tolist() == torch.arange(12).view(2, 1, 2, 3).tolist()
    assert targets.dtype == torch.int64
    assert targets.tolist() == [9, 0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (IMAGES[:-1], "28 bytes expected, 27 found"),
        (IMAGES + b"x", "28 bytes expected, 29 found"),
        (IMAGES[:9], "16 bytes of header expected, 9 found"),
        (b"", r"starts with bytes \(none\)"),
        (LABELS, "starts with bytes 00000801, .* 3 .* with 00000803"),
        (b"\0\0\x0d\3" + IMAGES[4:], "starts with bytes 00000d03"),
        (struct.pack(">4B3I", 0, 0, 8, 3, *[2**32 - 1] * 3), r"79\d{27} bytes expected, 16 found"),
        (struct.pack(">4B3I", 0, 0, 8, 3, 0, 28, 28), "holds no samples"),
    ],
)
def test_damaged_idx_names_file_and_bytes(tmp_path: Path, data: bytes, message: str) -> None:
    path = written(tmp_path, "images", data)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path, 3)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "plain"])
def test_corrupt_gzip_names_the_file(tmp_path: Path, damage: str) -> None:
    good = gzip.compress(IMAGES)
    middle = len(good) // 2
    data = {
        "truncated": good[:-10],
        "flipped": good[:middle] + bytes([good[middle] ^ 0xFF]) + good[middle + 1 :],
        "plain": IMAGES,
    }[damage]
    path = written(tmp_path, "images.gz", data)
    with pytest.raises(DataError, match="cannot be read") as caught:
        read_idx(path, 3)
    assert str(caught.value).startswith(f"{path}: ")


def test_labels_out_of_range_or_count(tmp_path: Path) -> None:
    images = written(tmp_path, "images", IMAGES)
    labels = written(tmp_path, "labels", LABELS)
    with pytest.raises(DataError, match="labels: label 9 found, only 0 to 4"):
        read_idx_samples(images, labels, 5)
    short = written(tmp_path, "short", struct.pack(">4BI", 0, 0, 8, 1, 1) + b"\1")
    with pytest.raises(DataError, match=r"images: 2 images, but .*short holds 1 labels"):
        read_idx_samples(images, short, 10)


def test_cifar_takes_the_last_label_and_keeps_channel_order(tmp_path: Path) -> None:
    planes = b"".join(bytes([value]) * 1024 for value in (10, 20, 30))
    path = written(tmp_path, "train.bin", bytes([3, 77]) + planes + bytes([4, 88]) + planes)
    images, targets = read_cifar([path, path], 100, 2)
    assert targets.tolist() == [77, 88, 77, 88]
    assert images.shape == (4, 3, 32, 32)
    assert images[3, :, 31, 31].tolist() == [10, 20, 30]


def test_cifar_damage_names_file_and_bytes(tmp_path: Path) -> None:
    record = bytes([3]) + bytes(3072)
    path = written(tmp_path, "a.bin", record + record[:-1])
    with pytest.raises(DataError, match=r"a\.bin: .*3073 bytes expected, 6145 bytes found"):
        read_cifar([path], 10, 1)
    path = written(tmp_path, "b.bin", b"")
    with pytest.raises(DataError, match=r"b\.bin: .* 0 bytes found"):
        read_cifar([path], 10, 1)
    path = written(tmp_path, "c.bin", bytes([10]) + bytes(3072))
    with pytest.raises(DataError, match=r"c\.bin: label 10 found, only 0 to 9"):
        read_cifar([path], 10, 1)
