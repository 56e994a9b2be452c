"""Splits that live in memory: batches and their augmentation are a few tensor operations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spamprune.data.base import Augment, check_loader, mixed_seed, seeded
from spamprune.errors import DataError

PADDING = 4  # pixels on each side that a random crop may move the image by


@dataclass(frozen=True, eq=False)
class TensorSplit:
    """Samples of tensors that several splits may share.

    Attributes:
        inputs: Standardised float32 ``(N, F)``, or ``(N, C, H, W)`` in channels-last memory.
        targets: int64 ``(N,)``.
        rows: The samples of this split: indices into the two, in the order of evaluation.
        black: Standardised value of a black pixel, ``(C,)``; None where inputs are no images.
    """

    inputs: Tensor
    targets: Tensor
    rows: Tensor
    black: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.rows)

    def loader(
        self, batch_size: int, *, seed: int | None = None, augment: Augment = "none"
    ) -> TensorLoader:
        """Return a loader; see :meth:`spamprune.data.base.Split.loader`."""
        check_loader(batch_size, seed, augment)
        if augment != "none" and self.black is None:
            raise DataError(
                f"data.augment: {augment!r} needs images, these inputs are vectors of "
                f"{self.inputs.shape[1]} numbers: use 'none'"
            )
        return TensorLoader(self, batch_size, seed, augment)

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and targets at ``rows``, images still channels-last."""
        targets = self.targets.index_select(0, rows)
        if self.inputs.dim() != 4:
            return self.inputs.index_select(0, rows), targets
        # index_select loses the memory format, unless it never sees anything but (N, H, W, C)
        batch = self.inputs.permute(0, 2, 3, 1).index_select(0, rows)
        return batch.permute(0, 3, 1, 2), targets


class TensorLoader:
    """Batches of a :class:`TensorSplit`; see :class:`spamprune.data.base.Loader`."""

    def __init__(self, split: TensorSplit, batch_size: int, seed: int | None, augment: Augment):
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
        """Yield the batches of the chosen epoch."""
        split = self.dataset
        if self._seed is None:
            for rows in torch.split(split.rows, self._batch_size):
                yield split.take(rows)
            return
        generator = seeded(mixed_seed(self._seed, self._epoch))
        order = split.rows[torch.randperm(len(split), generator=generator)]
        for rows in torch.split(order, self._batch_size):
            inputs, targets = split.take(rows)
            if self._augment != "none" and split.black is not None:
                padding = PADDING if self._augment == "flip_crop" else 0
                inputs = flip_and_crop(inputs, split.black, padding, generator)
            yield inputs, targets


def flip_and_crop(
    images: Tensor, black: Tensor, padding: int, generator: torch.Generator
) -> Tensor:
    """Move each image at random by at most ``padding`` pixels and mirror every second one.

    The same as torchvision's ``RandomCrop(padding=…)`` and ``RandomHorizontalFlip`` on the raw
    pixels before normalisation, in one gather for the whole batch.

    Args:
        images: ``(B, C, H, W)``, standardised.
        black: What a black pixel is after standardisation, ``(C,)``.
        padding: Black pixels added on each side; 0 leaves images where they are.
        generator: Source of randomness.

    Returns:
        ``(B, C, H, W)`` in channels-last memory.
    """
    n, channels, height, width = images.shape
    padded = black.expand(n, height + 2 * padding, width + 2 * padding, channels).clone()
    padded[:, padding : padding + height, padding : padding + width] = images.permute(0, 2, 3, 1)
    shifts = torch.randint(2 * padding + 1, (2, n, 1), generator=generator)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    y = shifts[0] + torch.arange(height)
    x = shifts[1] + torch.arange(width)
    x = torch.where(mirrored, x.flip(1), x)
    return padded[torch.arange(n)[:, None, None], y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation of each channel; 1 for a constant channel.

    Args:
        images: uint8 ``(N, C, H, W)``.

    Returns:
        float64 ``(C,)`` each, for values from 0 to 255.
    """
    # exact counts of the 256 levels: no rounding, whatever the number of images or threads
    counts = torch.stack(
        [torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]
    ).double()
    levels = torch.arange(256, dtype=torch.float64)
    total = counts.sum(1)
    mean = counts @ levels / total
    std = (counts @ levels**2 / total - mean**2).sqrt()
    return mean, torch.where(std > 0, std, 1.0)


def standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale images so that each channel of the training images has mean 0 and variance 1.

    The statistics are those of all training images, before any are held out, so that inputs do
    not depend on the split and a saved network can be measured again without knowing it.

    Args:
        train: uint8 ``(N, C, H, W)``.
        test: uint8 ``(M, C, H, W)``.

    Returns:
        Both as float32 in channels-last memory, and the value of a black pixel ``(C,)``.
    """
    mean, std = statistics(train)

    def scale(images: Tensor) -> Tensor:
        values = images.to(torch.float32, memory_format=torch.channels_last)
        return values.sub_(mean.float()[:, None, None]).div_(std.float()[:, None, None])

    return scale(train), scale(test), (-mean / std).float()
