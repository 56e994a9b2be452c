from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import v2

from spamprune.data.base import Augment, hold_out, mixed_seed
from spamprune.data.tensors import TensorSplit, flip_and_crop, standardise
from spamprune.errors import DataError


def numbered(n: int) -> TensorSplit:
    """Return vectors whose only entry, and target, is their position."""
    positions = torch.arange(n)
    return TensorSplit(positions[:, None].float(), positions, torch.arange(n))


def images(n: int, channels: int = 3, side: int = 6) -> TensorSplit:
    pixels = torch.randint(
        256, (n, channels, side, side), generator=torch.Generator().manual_seed(0)
    )
    inputs, _, black = standardise(pixels.to(torch.uint8), pixels[:1].to(torch.uint8))
    return TensorSplit(inputs, torch.arange(n), torch.arange(n), black)


def order(split: TensorSplit, batch_size: int, seed: int | None, epoch: int) -> list[int]:
    loader = split.loader(batch_size, seed=seed)
    loader.set_epoch(epoch)
    batches = list(loader)
    assert len(batches) == len(loader)
    assert all(len(y) == batch_size for _, y in batches[:-1])
    for x, y in batches:
        assert torch.equal(x[:, 0].long(), y)
    return torch.cat([y for _, y in batches]).tolist()


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 70),
    batch_size=st.integers(1, 80),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 10**6),
)
def test_epoch_visits_each_sample_once_in_an_order_fixed_by_seed_and_epoch(
    n: int, batch_size: int, seed: int, epoch: int
) -> None:
    split = numbered(n)
    visited = order(split, batch_size, seed, epoch)
    assert sorted(visited) == list(range(n))
    assert visited == order(split, batch_size, seed, epoch)
    assert order(split, batch_size, None, epoch) == list(range(n))
    if n >= 25:  # two orders of fewer might agree by chance
        assert visited != order(split, batch_size, seed, epoch + 1)
        other = order(split, batch_size, seed + 1, epoch)
        assert visited != other
        assert other != order(split, batch_size, seed, epoch + 1)


def test_seed_and_epoch_are_not_interchangeable() -> None:
    assert len({mixed_seed(seed, epoch) for seed in range(20) for epoch in range(20)}) == 400


def test_resuming_at_an_epoch_gives_the_bits_of_an_uninterrupted_run() -> None:
    split = images(30)
    through = split.loader(8, seed=3, augment="flip_crop")
    for epoch in range(3):
        through.set_epoch(epoch)
        expected = list(through)
    resumed = split.loader(8, seed=3, augment="flip_crop")
    resumed.set_epoch(2)
    for (x, y), (x_expected, y_expected) in zip(resumed, expected, strict=True):
        assert torch.equal(x, x_expected)
        assert torch.equal(y, y_expected)


def test_splits_share_tensors_and_see_only_their_rows() -> None:
    split = images(10)
    part = TensorSplit(split.inputs, split.targets, torch.tensor([7, 2, 5]), split.black)
    assert len(part) == len(part.loader(2).dataset) == 3
    (x, y), (_, last) = part.loader(2)
    assert y.tolist() == [7, 2]
    assert last.tolist() == [5]
    assert torch.equal(x, split.inputs[[7, 2]])
    shuffled = torch.cat([y for _, y in part.loader(2, seed=0)])
    assert sorted(shuffled.tolist()) == [2, 5, 7]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", ["none", "flip", "flip_crop"])
def test_image_batches_are_channels_last(channels: int, augment: Augment) -> None:
    for x, _ in images(5, channels).loader(2, seed=0, augment=augment):
        assert x.dtype == torch.float32
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert x.permute(0, 2, 3, 1).is_contiguous()  # also where channels are one


def test_flips_mirror_about_half_of_the_images_and_do_nothing_else() -> None:
    split = images(200)
    mirrored = 0
    for x, y in split.loader(64, seed=0, augment="flip"):
        plain = split.inputs[y]
        for image, original in zip(x, plain, strict=True):
            if not torch.equal(image, original):
                assert torch.equal(image, original.flip(2))
                mirrored += 1
    assert 70 < mirrored < 130


def test_crops_are_those_of_torchvision_on_raw_pixels() -> None:
    """Every augmented image is one of the 81 × 2 that padding with black before scaling gives."""
    raw = torch.randint(1, 256, (40, 3, 6, 6), generator=torch.Generator().manual_seed(1))
    inputs, _, black = standardise(raw.to(torch.uint8), raw[:1].to(torch.uint8))
    padded_raw = v2.functional.pad(raw, [4, 4, 4, 4], fill=0).to(torch.uint8)
    mean = raw.double().mean((0, 2, 3), keepdim=True)
    std = raw.double().std((0, 2, 3), correction=0, keepdim=True)
    padded = ((padded_raw.double() - mean) / std).float()
    out = flip_and_crop(inputs, black, 4, torch.Generator().manual_seed(2))
    found = []
    for image, source in zip(out, padded, strict=True):
        windows = source.unfold(1, 6, 1).unfold(2, 6, 1)  # (C, 9, 9, 6, 6)
        choices = torch.stack([windows, windows.flip(4)]).movedim(1, 3).flatten(0, 2)
        distance = (choices - image).abs().amax((1, 2, 3))
        assert distance.min() < 1e-5
        found.append(int(distance.argmin()))
    assert len(set(found)) > 20  # offsets and flips differ from image to image
    assert {choice // 81 for choice in found} == {0, 1}


def test_standardise_uses_training_statistics_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(50, 200, (30, 2, 4, 4), generator=generator).to(torch.uint8)
    test = torch.full((3, 2, 4, 4), 255, dtype=torch.uint8)
    scaled, scaled_test, black = standardise(train, test)
    std, mean = torch.std_mean(train.double(), dim=(0, 2, 3), correction=0)
    expected = (train.double() - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(scaled.double(), expected, atol=1e-5)
    assert torch.allclose(scaled_test[0, :, 0, 0].double(), (255 - mean) / std)
    assert torch.allclose(black.double(), -mean / std)


def test_constant_channel_is_zero_not_nan() -> None:
    train = torch.full((4, 1, 2, 2), 77, dtype=torch.uint8)
    assert torch.equal(standardise(train, train)[0], torch.zeros(4, 1, 2, 2))


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_hold_out_is_a_seeded_partition(fraction: float) -> None:
    kept, held = hold_out(101, fraction, seed=4)
    assert held is not None
    assert len(held) == round(fraction * 101)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(101))
    assert held.tolist() != list(range(len(held)))

    def again(seed: int) -> Tensor:
        other = hold_out(101, fraction, seed)[1]
        assert other is not None
        return other

    assert torch.equal(held, again(4))
    assert not torch.equal(held, again(5))


def test_hold_out_nothing() -> None:
    kept, held = hold_out(5, 0, seed=0)
    assert kept.tolist() == [0, 1, 2, 3, 4]
    assert held is None


@pytest.mark.parametrize(
    ("fraction", "message"),
    [
        (0.01, "empty validation"),
        (0.99, "empty training"),
        (1.0, "no fraction"),
        (-0.1, "no fraction"),
        (float("nan"), "no fraction"),
    ],
)
def test_hold_out_refuses_empty_splits(fraction: float, message: str) -> None:
    with pytest.raises(DataError, match=message):
        hold_out(10, fraction, seed=0)


def test_loader_refuses_what_it_cannot_do() -> None:
    with pytest.raises(DataError, match=r"data\.augment: 'flip' needs images"):
        numbered(3).loader(2, seed=0, augment="flip")
    with pytest.raises(ValueError, match="give a seed"):
        images(3).loader(2, augment="flip")
    with pytest.raises(ValueError, match="batch_size 0"):
        images(3).loader(0)
    with pytest.raises(ValueError, match="'mirror' is none of"):
        images(3).loader(1, seed=0, augment="mirror")  # type: ignore[arg-type]
