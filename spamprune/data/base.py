"""What a data set is: splits that give loaders, whatever the samples come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from spamprune.errors import DataError

Augment = Literal["none", "flip", "flip_crop"]


class Loader(Protocol):
    """One pass after another over a split, in batches."""

    @property
    def dataset(self) -> Sized:
        """The split, so that ``len(loader.dataset)`` is the number of samples."""
        ...

    def __len__(self) -> int:
        """Return the number of batches, the last and perhaps smaller one included."""
        ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs ``(B, *shape)``, images in channels-last memory, and int64 targets."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch: order and augmentation are a function of seed and epoch alone."""
        ...


class Split(Protocol):
    """Samples that belong together: training, validation or test."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def loader(
        self, batch_size: int, *, seed: int | None = None, augment: Augment = "none"
    ) -> Loader:
        """Return a loader over the samples.

        Args:
            batch_size: Samples in a batch.
            seed: Seed of the shuffle and the augmentation; None keeps a fixed order.
            augment: Random horizontal flips, and crops that move the image.

        Raises:
            DataError: The samples are no images and cannot be augmented.
            ValueError: ``batch_size`` is not positive, or ``augment`` comes without a seed.
        """
        ...


@dataclass(frozen=True)
class DataSet:
    """A classification task, split for training, choosing and testing.

    Attributes:
        name: What recipes call it.
        train: Samples to learn from.
        validation: Samples held out of the training data for choices, if any.
        test: Samples that are only ever measured on.
        classes: Number of classes; targets are 0 … classes-1.
        shape: Of one input: ``(C, H, W)`` or ``(F,)``.
        source: Where the samples came from, in words.
        deviations: How the data differ from what the paper used, in words.
        preprocessing: How images became inputs, in the terms of ``timm.data.create_transform``;
            None where inputs are no images.
        digest: Hash of the files' names where those tell the data from others of its name.
    """

    name: str
    train: Split
    validation: Split | None
    test: Split
    classes: int
    shape: tuple[int, ...]
    source: str
    deviations: tuple[str, ...] = ()
    preprocessing: Mapping[str, Any] | None = None
    digest: str | None = None


def mixed_seed(*numbers: int) -> int:
    """Hash a fixed count of non-negative numbers, such as seed and epoch, into one seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def seeded(seed: int) -> torch.Generator:
    """Return a generator of its own, so that nothing here moves the global one."""
    return torch.Generator().manual_seed(seed)


def check_loader(batch_size: int, seed: int | None, augment: Augment) -> None:
    """Raise ValueError for arguments that no split's ``loader`` accepts."""
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is not positive")
    if augment not in ("none", "flip", "flip_crop"):
        raise ValueError(f"augment {augment!r} is none of 'none', 'flip', 'flip_crop'")
    if augment != "none" and seed is None:
        raise ValueError(f"augment {augment!r} is random: give a seed")


def hold_out(n: int, fraction: float, seed: int) -> tuple[Tensor, Tensor | None]:
    """Choose at random which of ``n`` training samples are held out for validation.

    Args:
        n: Number of training samples.
        fraction: Of them that is held out, rounded to whole samples; 0 holds none out.
        seed: Seed of the choice.

    Returns:
        Ascending indices of the samples kept and of those held out (None where none are).

    Raises:
        DataError: ``fraction`` is not in [0, 1) or leaves an empty split.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"data.validation: {fraction} is no fraction: give 0 ≤ validation < 1")
    if fraction == 0:
        return torch.arange(n), None
    held = round(fraction * n)
    if held in (0, n):
        empty = "training" if held else "validation"
        raise DataError(
            f"data.validation: {fraction} of {n} training samples leaves an empty {empty} split: "
            "give another fraction, or 0 for no validation"
        )
    order = torch.randperm(n, generator=seeded(seed))
    return order[held:].sort().values, order[:held].sort().values
