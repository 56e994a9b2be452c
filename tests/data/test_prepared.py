"""How images become inputs, in timm's terms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import create_transform

from spamprune.data import load
from spamprune.data.base import Augment
from spamprune.data.folder import prepared
from spamprune.errors import DataError

SETTINGS = {
    "input_size": (3, 10, 12),
    "interpolation": "bicubic",
    "mean": (0.1, 0.2, 0.3),
    "std": (0.5, 0.6, 0.7),
    "crop_pct": 0.8,
    "crop_mode": "center",
}


def test_images_are_those_of_the_network_s_own_transform(image_root: Path) -> None:
    data = prepared(load("image_folder", root=image_root, validation=0.2), SETTINGS)
    assert data.shape == (3, 10, 12)
    assert data.preprocessing == SETTINGS
    transform = create_transform(**SETTINGS)
    for split in (data.train, data.validation, data.test):
        assert split is not None
        images = torch.cat([x for x, _ in split.loader(3)])
        files = [path for path, _ in split.samples]  # type: ignore[attr-defined]
        for image, path in zip(images, files, strict=True):
            assert torch.equal(image, transform(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("augment", ["flip", "flip_crop"])
def test_augmentation_depends_on_seed_and_epoch_alone(image_root: Path, augment: Augment) -> None:
    data = prepared(load("image_folder", root=image_root, validation=0), SETTINGS)

    def epoch(number: int) -> torch.Tensor:
        loader = data.train.loader(4, seed=3, augment=augment)
        loader.set_epoch(number)
        return torch.cat([x for x, _ in loader])

    first = epoch(1)
    assert first.shape == (10, 3, 10, 12)
    assert torch.equal(first, epoch(1))
    assert first.sum() != epoch(2).sum() or augment == "flip"  # pixels, not just their order


def test_grey_networks_are_refused(image_root: Path) -> None:
    data = load("image_folder", root=image_root)
    with pytest.raises(DataError, match="this network takes 1"):
        prepared(data, {**SETTINGS, "input_size": (1, 8, 8)})


def test_data_sets_tell_how_their_inputs_were_made(image_root: Path) -> None:
    from sklearn.datasets import load_digits

    data = load("digits", validation=0)
    settings = data.preprocessing
    assert settings is not None
    assert settings["input_size"] == data.shape == (1, 8, 8)
    ((inputs, _),) = data.test.loader(1000)
    raw = inputs * settings["std"][0] + settings["mean"][0]
    assert sorted(set((255 * raw).round().flatten().tolist())) == list(range(17))
    whole = torch.from_numpy(load_digits().images)
    assert abs(255 * settings["mean"][0] - whole.mean().item()) < 0.1
    folder = load("image_folder", root=image_root, image_size=8)
    assert folder.preprocessing is not None
    assert folder.preprocessing["input_size"] == folder.shape
    assert load("cancer").preprocessing is None
