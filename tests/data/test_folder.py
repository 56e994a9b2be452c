from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from spamprune.data import Split, load
from spamprune.data.base import Augment
from spamprune.errors import DataError


def epoch(split: Split, number: int, augment: Augment = "flip_crop") -> list[tuple[Tensor, Tensor]]:
    loader = split.loader(4, seed=5, augment=augment)
    loader.set_epoch(number)
    return list(loader)


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True))


def test_splits_and_batches(image_root: Path) -> None:
    data = load("image_folder", root=image_root, validation=0.2, image_size=8)
    assert (len(data.train), len(data.validation or ()), len(data.test)) == (8, 2, 4)
    assert (data.shape, data.classes) == ((3, 8, 8), 2)
    loader = data.train.loader(3)
    batches = list(loader)
    assert [len(y) for _, y in batches] == [3, 3, 2]
    assert len(loader) == 3
    assert len(loader.dataset) == 8
    for x, y in batches:
        assert x.shape[1:] == (3, 8, 8)
        assert x.dtype == torch.float32
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert y.dtype == torch.int64
    assert load("image_folder", root=image_root).shape == (3, 224, 224)


def test_a_digest_tells_folders_of_as_many_images_apart(image_root: Path, tmp_path: Path) -> None:
    before = load("image_folder", root=image_root)
    copied = shutil.copytree(image_root, tmp_path / "elsewhere")
    assert load("image_folder", root=copied, validation=0).digest == before.digest
    image = next(copied.glob("train/*/*.*"))
    image.rename(image.with_stem("another"))
    after = load("image_folder", root=copied)
    assert len(after.train) == len(before.train)
    assert after.digest != before.digest
    assert load("digits").digest is None


def test_evaluation_pixels_are_scaled_as_imagenet(tmp_path: Path) -> None:
    from PIL import Image

    for part in ("train", "val"):
        for cls in ("a", "b"):
            (tmp_path / part / cls).mkdir(parents=True)
            Image.new("RGB", (20, 10), (255, 0, 51)).save(tmp_path / part / cls / "x.png")
    data = load("image_folder", root=tmp_path, validation=0, image_size=4)
    ((x, y),) = data.test.loader(10)
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    assert torch.allclose(x, torch.tensor(expected)[:, None, None].expand(2, 3, 4, 4), atol=1e-5)
    assert y.tolist() == [0, 1]


def test_order_and_augmentation_depend_on_seed_and_epoch_alone(
    image_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load("image_folder", root=image_root, validation=0, image_size=8)
    first = epoch(data.train, 1)
    assert not same(first, epoch(data.train, 2))
    for cores in (1, 3):  # decoded in this process, and in two others
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert same(first, epoch(data.train, 1))
    # all pixels, whatever the order: augmentation differs too, not just the shuffle
    sums = [torch.cat([x for x, _ in epoch(data.train, e)]).sum().item() for e in (1, 2)]
    assert sums[0] != sums[1]


def test_flips_are_all_that_flip_does(image_root: Path) -> None:
    data = load("image_folder", root=image_root, validation=0, image_size=8)
    plain = torch.cat([x for x, _ in epoch(data.train, 0, "none")])
    flipped = torch.cat([x for x, _ in epoch(data.train, 0, "flip")])
    mirrored = [not torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert 0 < sum(mirrored) < 10
    for a, b, mirror in zip(plain, flipped, mirrored, strict=True):
        assert torch.allclose(a.flip(2) if mirror else a, b, atol=1e-5)


def test_val_beside_test_is_the_validation_split(image_root: Path) -> None:
    shutil.copytree(image_root / "test", image_root / "val")
    data = load("image_folder", root=image_root, image_size=8)
    assert (len(data.train), len(data.validation or ()), len(data.test)) == (10, 4, 4)
    assert load("image_folder", root=image_root, validation=0).validation is None


@pytest.mark.parametrize("cores", [1, 2])
def test_damaged_image_is_one_line_naming_the_file(
    image_root: Path, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    path = image_root / "train" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    data = load("image_folder", root=image_root, validation=0, image_size=8)
    with pytest.raises(DataError, match=r"bee/1\.png: cannot be decoded") as caught:
        list(data.train.loader(4))
    assert "\n" not in str(caught.value)


def test_a_damaged_image_may_make_its_decoder_fail_in_any_way(image_root: Path) -> None:
    path = image_root / "train" / "bee" / "1.tiff"
    Image.new("L", (2, 2)).save(path)
    data = bytearray(path.read_bytes())
    data[72] = 11  # places of pixels as floats, at which Pillow raises a TypeError
    path.write_bytes(data)
    split = load("image_folder", root=image_root, validation=0, image_size=8).train
    with pytest.raises(DataError, match=r"bee/1\.tiff: cannot be decoded"):
        list(split.loader(4))


def test_folders_that_do_not_fit(image_root: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root: .*nowhere"):
        load("image_folder", root=image_root / "nowhere")
    (image_root / "train" / "cat").mkdir()
    with pytest.raises(DataError, match=r"data\.root: .*train .*cat") as caught:
        load("image_folder", root=image_root)
    assert "\n" not in str(caught.value)
    shutil.copy(image_root / "train/ant/0.png", image_root / "train/cat/0.png")
    with pytest.raises(DataError, match=r"differ in class folders \(cat\)"):
        load("image_folder", root=image_root)
    shutil.rmtree(image_root / "test")
    with pytest.raises(DataError, match="neither test nor val"):
        load("image_folder", root=image_root)


def test_one_class_is_refused(image_root: Path) -> None:
    only, *others = sorted(path.name for path in (image_root / "train").iterdir())
    for part in ("train", "test"):
        for name in others:
            shutil.rmtree(image_root / part / name)
    with pytest.raises(DataError, match=rf"train has one class only \({only}\)"):
        load("image_folder", root=image_root, validation=0, image_size=8)
