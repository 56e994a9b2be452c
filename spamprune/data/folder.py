"""Images in one folder per class, decoded when they are needed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from spamprune.data.base import (
    Augment,
    DataSet,
    Split,
    check_loader,
    hold_out,
    mixed_seed,
    seeded,
)
from spamprune.errors import DataError

# torchvision's statistics of ImageNet, which pretrained networks expect
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WORKERS = 8  # processes that decode, where there are as many cores


@dataclass(frozen=True, eq=False)
class FolderSplit:
    """Image files and their classes.

    Attributes:
        samples: Path and class of each image.
        size: Side of the square inputs, in pixels.
        preprocessing: A network's own, in place of ``size``; see :func:`prepared`.
    """

    samples: Sequence[tuple[str, int]]
    size: int
    preprocessing: Mapping[str, Any] | None = None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.samples)

    def loader(
        self, batch_size: int, *, seed: int | None = None, augment: Augment = "none"
    ) -> FolderLoader:
        """Return a loader; see :meth:`spamprune.data.base.Split.loader`.

        ``flip_crop`` is ImageNet's: a crop of random area and aspect, resized.
        """
        check_loader(batch_size, seed, augment)
        return FolderLoader(self, batch_size, seed, augment)


class FolderLoader:
    """Batches of a :class:`FolderSplit`; see :class:`spamprune.data.base.Loader`."""

    def __init__(self, split: FolderSplit, batch_size: int, seed: int | None, augment: Augment):
        self.dataset = split
        self._batch_size = batch_size
        self._seed = seed
        self._augment = augment
        self._epoch = 0

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.dataset) // self._batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and augmentation the next pass has."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of the chosen epoch.

        Raises:
            DataError: A file is no image.
        """
        n = len(self.dataset)
        generator = seeded(mixed_seed(self._seed or 0, self._epoch))
        order = range(n) if self._seed is None else torch.randperm(n, generator=generator).tolist()
        batches = DataLoader(
            _Decoded(self.dataset, self._seed or 0, self._epoch, self._augment),
            batch_size=self._batch_size,
            sampler=order,
            num_workers=min(WORKERS, (os.cpu_count() or 1) - 1, len(self)),
            collate_fn=_collate,
            generator=generator,  # else the loader draws from the global one
        )
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            inputs, targets = batch
            yield inputs.contiguous(memory_format=torch.channels_last), targets


class _Decoded(Dataset[tuple[Tensor, int] | DataError]):
    """The samples of one epoch, as the processes of a ``DataLoader`` ask for them."""

    def __init__(self, split: FolderSplit, seed: int, epoch: int, augment: Augment):
        self._samples = split.samples
        self._key = (seed, epoch)
        self._transform = _transform(split, augment)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | DataError:
        path, target = self._samples[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except Exception as error:  # decoders of damaged files may raise anything
            # handed on, since an error that crosses processes by itself becomes a traceback
            reason = " ".join(str(error).split())
            return DataError(f"{path}: cannot be decoded ({reason}): replace or remove it")
        # transforms draw from the global generator: seeding each sample makes its augmentation
        # the same in any number of processes, and forking leaves the caller's as it was
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed_seed(*self._key, index))
            return self._transform(image), target


def _collate(samples: list[tuple[Tensor, int] | DataError]) -> list[Tensor] | DataError:
    errors = [sample for sample in samples if isinstance(sample, DataError)]
    return errors[0] if errors else default_collate(samples)


def _transform(split: FolderSplit, augment: Augment) -> Callable[[Image.Image], Tensor]:
    if split.preprocessing is not None:
        return _prepare(split.preprocessing, augment)
    size = split.size
    if augment == "flip_crop":
        steps: list[torch.nn.Module] = [v2.RandomResizedCrop(size, antialias=True)]
    else:
        steps = [v2.Resize(size, antialias=True), v2.CenterCrop(size)]
    if augment != "none":
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose([v2.PILToTensor(), *steps, _TO_FLOAT, v2.Normalize(MEAN, STD)])


def _prepare(settings: Mapping[str, Any], augment: Augment) -> Callable[[Image.Image], Tensor]:
    if augment == "flip_crop":  # not timm's, which draws from Python's own generator
        crop = v2.RandomResizedCrop(tuple(settings["input_size"][1:]), antialias=True)
        normalize = v2.Normalize(settings["mean"], settings["std"])
        return v2.Compose([v2.PILToTensor(), crop, v2.RandomHorizontalFlip(), _TO_FLOAT, normalize])
    from timm.data import create_transform

    plain = create_transform(**settings)
    return v2.Compose([v2.RandomHorizontalFlip(), plain]) if augment == "flip" else plain


_TO_FLOAT = v2.ToDtype(torch.float32, scale=True)


def prepared(data: DataSet, preprocessing: Mapping[str, Any]) -> DataSet:
    """Return an image folder with its images prepared as a network expects them.

    Args:
        data: What :func:`image_folder` made.
        preprocessing: The arguments of ``timm.data.create_transform``, such as
            ``timm.data.resolve_model_data_config`` returns them.

    Raises:
        DataError: The network takes other than three channels.
    """
    channels = preprocessing["input_size"][0]
    if channels != 3:
        raise DataError(
            f"image_folder: images have 3 channels, this network takes {channels}: give one for "
            "colour images"
        )

    def changed(split: Split) -> Split:
        assert isinstance(split, FolderSplit)
        return replace(split, preprocessing=preprocessing)

    return replace(
        data,
        train=changed(data.train),
        validation=None if data.validation is None else changed(data.validation),
        test=changed(data.test),
        shape=tuple(preprocessing["input_size"]),
        preprocessing=preprocessing,
    )


def image_folder(
    *, root: Path | None, validation: float, seed: int, image_size: int | None
) -> DataSet:
    """Your own images: a folder per class under train, and under test or val.

    With both ``test`` and ``val`` the latter is the validation split (unless ``validation`` is
    0); with one of them it is the test split, and validation is held out of ``train``. Images
    are resized to ``image_size`` (224) pixels on the shorter side and cropped to the centre.

    Raises:
        DataError: A folder is missing or empty, there is one class only, or classes differ between
            folders.
    """
    if root is None:
        raise DataError("data.root: image_folder needs the folder that holds train and test")
    size = 224 if image_size is None else image_size
    train = _scan(root / "train")
    if len(train.classes) < 2:
        raise DataError(
            f"data.root: {root / 'train'} has one class only ({train.classes[0]}): give each of "
            "two or more classes a folder of images"
        )
    parts = [part for part in ("test", "val") if (root / part).is_dir()]
    if not parts:
        raise DataError(f"data.root: {root} has neither test nor val: add one beside train")
    others = [_scan(root / part) for part in parts]
    for part, other in zip(parts, others, strict=True):
        if other.classes != train.classes:
            differing = sorted(set(other.classes) ^ set(train.classes))
            raise DataError(
                f"data.root: {root / part} and {root / 'train'} differ in class folders "
                f"({', '.join(differing[:5])}): give both the same ones"
            )
    samples, held_out = train.samples, None
    if len(others) == 2:
        held_out = others[1].samples if validation else None
    else:
        kept, held = hold_out(len(samples), validation, seed)
        held_out = None if held is None else [samples[i] for i in held.tolist()]
        samples = [samples[i] for i in kept.tolist()]
    return DataSet(
        name="image_folder",
        train=FolderSplit(samples, size),
        validation=None if held_out is None else FolderSplit(held_out, size),
        test=FolderSplit(others[0].samples, size),
        classes=len(train.classes),
        shape=(3, size, size),
        source=f"images under {root}: train, {', '.join(parts)}",
        preprocessing={
            "input_size": (3, size, size),
            "mean": MEAN,
            "std": STD,
            "interpolation": "bilinear",
        },
        digest=_digest(root, [train, *others]),
    )


def _digest(root: Path, parts: Sequence[ImageFolder]) -> str:
    """Hash the names of all images below ``root``; reading them would take as long as training."""
    names = [p.removeprefix(str(root)).replace(os.sep, "/") for s in parts for p, _ in s.samples]
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _scan(folder: Path) -> ImageFolder:
    try:
        return ImageFolder(folder)
    except FileNotFoundError as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"data.root: {folder} is no folder of class folders with images ({reason})"
        ) from error
