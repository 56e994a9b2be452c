from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from spamprune.data import DATA_SETS, Split, load
from spamprune.data.base import Augment
from spamprune.data.places import FileSet
from spamprune.data.sets import CIFAR10, CIFAR100, FASHION_MNIST, MNIST
from spamprune.errors import DataError


def everything(split: Split | None) -> tuple[Tensor, Tensor]:
    """Return all inputs and targets, in the order of evaluation."""
    assert split is not None
    batches = list(split.loader(1000))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_cancer() -> None:
    data = load("cancer", validation=0)
    inputs, targets = everything(data.train)
    assert (len(data.train), len(data.test), data.validation) == (455, 114, None)
    assert (data.shape, data.classes) == ((30,), 2)
    assert inputs.dtype == torch.float32
    assert targets.dtype == torch.int64
    assert inputs.mean(0).abs().max() < 1e-5
    assert torch.allclose(inputs.std(0, correction=0), torch.ones(30), atol=1e-5)
    assert everything(data.test)[0].mean().abs() > 1e-3  # scaled with the training's statistics
    # the split of train_test_split(test_size=0.2, random_state=42), as others report it
    assert everything(data.test)[1].bincount().tolist() == [43, 71]
    assert "standardised" in data.deviations[0]


def test_digits() -> None:
    data = load("digits", validation=0)
    inputs, _ = everything(data.train)
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert (data.shape, data.classes, data.deviations) == ((1, 8, 8), 10, ())
    assert inputs.mean().abs() < 1e-5
    assert abs(inputs.std().item() - 1) < 1e-3
    counts = everything(data.test)[1].bincount(minlength=10)
    assert counts.min() >= 34  # stratified: each class has a fifth of its 174 to 183 images
    assert counts.max() <= 37


def test_validation_is_held_out_of_training_and_leaves_the_test_data_alone() -> None:
    whole, first, second = (
        load("cancer", validation=v, seed=s) for v, s in ((0, 0), (0.2, 0), (0.2, 1))
    )
    assert len(first.train) + 91 == len(whole.train)
    for data in (first, second):
        parts = torch.cat([everything(data.train)[0], everything(data.validation)[0]])
        expected = everything(whole.train)[0]
        assert sorted(parts.tolist()) == sorted(expected.tolist())
        assert torch.equal(everything(data.test)[0], everything(whole.test)[0])
    assert not torch.equal(everything(first.validation)[0], everything(second.validation)[0])


@pytest.mark.parametrize(("name", "folder"), [("mnist", MNIST), ("fashion_mnist", FASHION_MNIST)])
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_sets(
    tmp_path: Path, make_idx: Callable[..., Path], name: str, folder: FileSet, zipped: bool
) -> None:
    raw = make_idx(tmp_path / folder.folder, zipped)
    data = load(name, root=tmp_path, validation=0.2)
    assert (len(data.train), len(data.validation or ()), len(data.test)) == (16, 4, 8)
    assert (data.name, data.shape, data.classes) == (name, (1, 6, 6), 10)
    assert str(raw) in data.source
    whole = load(name, root=str(raw), validation=0)
    assert everything(whole.train)[0].mean().abs() < 1e-5


def test_train_and_test_images_must_agree_in_size(
    tmp_path: Path, make_idx: Callable[..., Path]
) -> None:
    raw = make_idx(tmp_path / "raw")
    data = bytearray((raw / "t10k-images-idx3-ubyte").read_bytes())
    data[11], data[15] = 4, 9  # 8 images of 4×9 pixels: as many bytes as 6×6
    (raw / "t10k-images-idx3-ubyte").write_bytes(data)
    with pytest.raises(DataError, match=r"t10k-images.*\(4, 9\) pixels.*\(6, 6\)"):
        load("mnist", root=raw)


@pytest.mark.parametrize(
    ("name", "files", "label_bytes", "classes", "train"),
    [("cifar10", CIFAR10, 1, 10, 20), ("cifar100", CIFAR100, 2, 100, 4)],
)
def test_cifar_sets(
    tmp_path: Path,
    make_cifar: Callable[..., Path],
    name: str,
    files: FileSet,
    label_bytes: int,
    classes: int,
    train: int,
) -> None:
    folder = tmp_path / files.folder
    raw = make_cifar(folder, files.files, label_bytes, classes)
    data = load(name, root=tmp_path, validation=0)
    assert (len(data.train), len(data.test)) == (train, 4)
    assert (data.shape, data.classes) == ((3, 32, 32), classes)
    inputs, _ = everything(data.train)
    assert inputs.mean((0, 2, 3)).abs().max() < 1e-5
    (raw / "test_batch.bin" if name == "cifar10" else raw / "test.bin").unlink()
    with pytest.raises(DataError, match=rf"{folder.name} has no file test"):
        load(name, root=tmp_path)


@pytest.mark.fashion_mnist
def test_the_real_fashion_mnist(fashion_mnist_root: Path) -> None:
    data = load("fashion_mnist", root=fashion_mnist_root, validation=0)
    inputs, targets = everything(data.train)
    assert (len(data.train), len(data.test)) == (60000, 10000)
    assert (data.shape, data.classes) == ((1, 28, 28), 10)
    assert inputs.mean(dtype=torch.float64).abs() < 1e-5
    assert abs(inputs.double().var().item() - 1) < 1e-5
    assert targets.bincount().tolist() == [6000] * 10
    assert len(data.train.loader(128, seed=0)) == 469


def test_nothing_moves_the_global_generators(
    tmp_path: Path,
    make_idx: Callable[..., Path],
    image_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # images are decoded in this process
    raw = make_idx(tmp_path / "raw")
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    cases: list[tuple[str, Path | None, Augment]] = [
        ("cancer", None, "none"),
        ("digits", None, "flip_crop"),
        ("mnist", raw, "flip"),
        ("image_folder", image_root, "flip_crop"),
    ]
    for name, root, augment in cases:
        size = 8 if name == "image_folder" else None
        data = load(name, root=root, validation=0.2, seed=1, image_size=size)
        for loader in (data.train.loader(64, seed=1, augment=augment), data.test.loader(64)):
            assert sum(len(y) for _, y in loader) == len(loader.dataset)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == str(np.random.get_state())
    assert before[2] == random.getstate()


def test_the_global_generator_moves_nothing() -> None:
    orders = []
    for global_seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(global_seed)
            data = load("cancer", validation=0.2, seed=3)
            orders.append(torch.cat([x for x, _ in data.train.loader(50, seed=2)]))
    assert torch.equal(*orders)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "fashon_mnist"}, "unknown data set 'fashon_mnist': did you mean 'fashion_mnist'"),
        ({"name": "cancer", "root": "x"}, r"data\.root: cancer takes none, x given"),
        ({"name": "digits", "image_size": 8}, r"data\.image_size: digits takes none, 8 given"),
        ({"name": "mnist", "image_size": 8}, r"data\.image_size: mnist takes none"),
        ({"name": "image_folder"}, r"data\.root: image_folder needs"),
        ({"name": "cancer", "validation": 0.0001}, "empty validation"),
    ],
)
def test_arguments_that_do_not_apply(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(**arguments)  # type: ignore[arg-type]


def test_each_set_describes_itself() -> None:
    for name in DATA_SETS:
        assert (DATA_SETS[name].__doc__ or "").splitlines()[0].endswith(".")
