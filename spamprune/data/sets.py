"""The data sets that recipes can name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import download_and_extract_archive

from spamprune.data.base import DataSet, hold_out
from spamprune.data.files import read_cifar, read_idx_samples
from spamprune.data.folder import image_folder
from spamprune.data.places import FileSet, locate
from spamprune.data.tensors import TensorSplit, standardise, statistics
from spamprune.errors import DataError
from spamprune.registry import Registry

Samples = tuple[Tensor, Tensor]  # inputs and targets


class Builder(Protocol):
    """What is registered for a data set; the first line of its docstring describes the set."""

    def __call__(
        self, *, root: Path | None, validation: float, seed: int, image_size: int | None
    ) -> DataSet:
        """Build the data set; see :func:`load`."""
        ...


DATA_SETS: Registry[Builder] = Registry("data set", DataError)
DATA_SETS.register("image_folder")(image_folder)


def load(
    name: str,
    *,
    root: str | Path | None = None,
    validation: float = 0.1,
    seed: int = 0,
    image_size: int | None = None,
) -> DataSet:
    """Load a data set by name.

    Args:
        name: One of ``DATA_SETS``.
        root: Folder with the raw files, or its parent in torchvision's layout; by default
            ``$SPAMPRUNE_DATA``, the usual places, or a download.
        validation: Fraction of the training data that is held out; 0 holds none out.
        seed: Seed of that choice.
        image_size: Side of the images of an image folder, in pixels.

    Returns:
        The data set. Inputs are standardised with statistics of all training data, before any
        are held out.

    Raises:
        DataError: The name is unknown, files are missing or damaged, or an argument does not
            apply to this data set.
    """
    folder = None if root is None else Path(os.path.expanduser(root))
    return DATA_SETS[name](root=folder, validation=validation, seed=seed, image_size=image_size)


@DATA_SETS.register("cancer")
def cancer(*, root: Path | None, validation: float, seed: int, image_size: int | None) -> DataSet:
    """Wisconsin breast cancer: 30 measurements of cell nuclei, 2 classes, 455 + 114 samples."""
    from sklearn.datasets import load_breast_cancer  # slow to import, and few sets need it
    from sklearn.model_selection import train_test_split

    _takes_no("cancer", root=root, image_size=image_size)
    inputs, targets = load_breast_cancer(return_X_y=True)
    train, test, train_targets, test_targets = (
        torch.from_numpy(array)
        for array in train_test_split(inputs, targets, test_size=0.2, random_state=42)
    )
    std, mean = torch.std_mean(train, dim=0, correction=0)
    return _in_memory(
        "cancer",
        (((train - mean) / std).float(), train_targets.long()),
        (((test - mean) / std).float(), test_targets.long()),
        None,
        classes=2,
        source="scikit-learn's copy of the Wisconsin breast-cancer data",
        validation=validation,
        seed=seed,
        deviations=("inputs standardised with training statistics; the paper used raw features",),
    )


@DATA_SETS.register("digits")
def digits(*, root: Path | None, validation: float, seed: int, image_size: int | None) -> DataSet:
    """Handwritten digits of 8×8 grey pixels, 10 classes, 1437 + 360 samples."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    _takes_no("digits", root=root, image_size=image_size)
    bunch = load_digits()
    images = bunch.images[:, None].astype("uint8")
    train, test, train_targets, test_targets = (
        torch.from_numpy(array)
        for array in train_test_split(
            images, bunch.target, test_size=0.2, random_state=42, stratify=bunch.target
        )
    )
    return _images(
        "digits",
        (train, train_targets.long()),
        (test, test_targets.long()),
        classes=10,
        source="scikit-learn's copy of the UCI handwritten digits",
        validation=validation,
        seed=seed,
    )


IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
FASHION_MNIST = FileSet(
    name="fashion_mnist",
    folder="FashionMNIST/raw",
    files=IDX_FILES,
    url=datasets.FashionMNIST.mirrors[0],
    download=partial(datasets.FashionMNIST, download=True),
    system=Path("/usr/share/datasets/fashion-mnist"),
    way_out="apt install dataset-fashion-mnist, or give the folder with the files as data.root",
)
MNIST = FileSet(
    name="mnist",
    folder="MNIST/raw",
    files=IDX_FILES,
    url=datasets.MNIST.mirrors[0],
    download=partial(datasets.MNIST, download=True),
)


def _cifar_files(
    name: str, folder: str, train: tuple[str, ...], test: str, archive: str, md5: str
) -> FileSet:
    url = f"https://www.cs.toronto.edu/~kriz/{archive}"
    return FileSet(
        name=name,
        folder=folder,
        files=(*train, test),
        url=url,
        download=partial(download_and_extract_archive, url, md5=md5),
    )


# the binary version: the other one is pickled, and nothing here unpickles
CIFAR10 = _cifar_files(
    "cifar10",
    "cifar-10-batches-bin",
    tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "test_batch.bin",
    "cifar-10-binary.tar.gz",
    "c32a1d4ab5d03f1284b67883e8d87530",
)
CIFAR100 = _cifar_files(
    "cifar100",
    "cifar-100-binary",
    ("train.bin",),
    "test.bin",
    "cifar-100-binary.tar.gz",
    "03b5dce01913d631647c71ecec9e9cb8",
)


@DATA_SETS.register("fashion_mnist")
def fashion_mnist(
    *, root: Path | None, validation: float, seed: int, image_size: int | None
) -> DataSet:
    """Fashion-MNIST: clothes in 28×28 grey pixels, 10 classes, 60000 + 10000 samples."""
    _takes_no("fashion_mnist", image_size=image_size)
    return _idx(FASHION_MNIST, root, validation, seed)


@DATA_SETS.register("mnist")
def mnist(*, root: Path | None, validation: float, seed: int, image_size: int | None) -> DataSet:
    """MNIST: handwritten digits in 28×28 grey pixels, 10 classes, 60000 + 10000 samples."""
    _takes_no("mnist", image_size=image_size)
    return _idx(MNIST, root, validation, seed)


@DATA_SETS.register("cifar10")
def cifar10(*, root: Path | None, validation: float, seed: int, image_size: int | None) -> DataSet:
    """CIFAR-10: photographs of 32×32 colour pixels, 10 classes, 50000 + 10000 samples."""
    _takes_no("cifar10", image_size=image_size)
    return _cifar(CIFAR10, root, validation, seed, classes=10, label_bytes=1)


@DATA_SETS.register("cifar100")
def cifar100(*, root: Path | None, validation: float, seed: int, image_size: int | None) -> DataSet:
    """CIFAR-100: photographs of 32×32 colour pixels, 100 classes, 50000 + 10000 samples."""
    _takes_no("cifar100", image_size=image_size)
    return _cifar(CIFAR100, root, validation, seed, classes=100, label_bytes=2)


def _idx(files: FileSet, root: Path | None, validation: float, seed: int) -> DataSet:
    paths = locate(files, root)
    train_images, train_labels, test_images, test_labels = (paths[name] for name in files.files)
    train = read_idx_samples(train_images, train_labels, 10)
    test = read_idx_samples(test_images, test_labels, 10)
    if train[0].shape[1:] != test[0].shape[1:]:
        raise DataError(
            f"{test_images}: images of {tuple(test[0].shape[2:])} pixels, those of training have "
            f"{tuple(train[0].shape[2:])}: take both from the same data set"
        )
    source = f"idx files in {train_images.parent}"
    return _images(
        files.name, train, test, classes=10, source=source, validation=validation, seed=seed
    )


def _cifar(
    files: FileSet,
    root: Path | None,
    validation: float,
    seed: int,
    *,
    classes: int,
    label_bytes: int,
) -> DataSet:
    *train, test = locate(files, root).values()
    return _images(
        files.name,
        read_cifar(train, classes, label_bytes),
        read_cifar([test], classes, label_bytes),
        classes=classes,
        source=f"binary records in {test.parent}",
        validation=validation,
        seed=seed,
    )


def _images(
    name: str,
    train: Samples,
    test: Samples,
    *,
    classes: int,
    source: str,
    validation: float,
    seed: int,
) -> DataSet:
    train_inputs, test_inputs, black = standardise(train[0], test[0])
    mean, std = statistics(train[0])
    return _in_memory(
        name,
        (train_inputs, train[1]),
        (test_inputs, test[1]),
        black,
        classes=classes,
        source=source,
        validation=validation,
        seed=seed,
        preprocessing={
            "input_size": tuple(train_inputs.shape[1:]),
            "mean": (mean / 255).tolist(),
            "std": (std / 255).tolist(),
        },
    )


def _in_memory(
    name: str,
    train: Samples,
    test: Samples,
    black: Tensor | None,
    *,
    classes: int,
    source: str,
    validation: float,
    seed: int,
    deviations: tuple[str, ...] = (),
    preprocessing: Mapping[str, Any] | None = None,
) -> DataSet:
    kept, held = hold_out(len(train[1]), validation, seed)
    return DataSet(
        name=name,
        train=TensorSplit(*train, kept, black),
        validation=None if held is None else TensorSplit(*train, held, black),
        test=TensorSplit(*test, torch.arange(len(test[1])), black),
        classes=classes,
        shape=tuple(train[0].shape[1:]),
        source=source,
        deviations=deviations,
        preprocessing=preprocessing,
    )


def _takes_no(name: str, **arguments: object) -> None:
    for key, value in arguments.items():
        if value is not None:
            raise DataError(f"data.{key}: {name} takes none, {value} given: remove it")
