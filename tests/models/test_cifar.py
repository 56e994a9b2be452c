"""Networks for CIFAR: resolution, and the way of a WRN-16-4 from binary files to an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spamprune as sp
from spamprune.data import load
from spamprune.data.sets import CIFAR10
from spamprune.models import create


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18_cifar", (512, 4, 4)),
        ("wrn16_4_cifar", (256, 8, 8)),
    ],
)
def test_stems_keep_the_resolution(name: str, size: tuple[int, ...]) -> None:
    model: Any = create(name).eval()
    features = model.forward_features(torch.zeros(1, 3, 32, 32))
    assert features.shape[1:] == size
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert (first.kernel_size, first.stride, first.padding) == ((3, 3), (1, 1), (1, 1))
    expected = (2 / (first.out_channels * 9)) ** 0.5
    assert first.weight.std().item() == pytest.approx(expected, rel=0.1)


def test_wrn_from_cifar_files_to_an_artifact(tmp_path: Path) -> None:
    """Two images per file, in CIFAR-10's binary format: a label byte, then 3 planes of 1024."""
    folder = tmp_path / CIFAR10.folder
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name in CIFAR10.files:
        pixels = torch.randint(256, (2, 3072), dtype=torch.uint8, generator=generator)
        labels = torch.tensor([[3], [8]], dtype=torch.uint8)
        (folder / name).write_bytes(bytes(torch.cat([labels, pixels], 1).flatten().tolist()))
    data = load("cifar10", root=tmp_path, validation=0)
    torch.manual_seed(0)
    model = create("fixup_wrn16_4")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    spam = sp.SpaM(model, len(data.train), burn_in=0, every=1)
    losses = []
    for epoch in (1, 2, 3):
        for x, y in data.train.loader(10, seed=epoch, augment="flip_crop"):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            spam.shrink(optimizer)
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    step = spam.update(3, data.train.loader(10))
    assert step is not None
    assert step.after > step.before

    posterior = spam.posterior(data.train.loader(10))
    images, _ = next(iter(data.test.loader(2)))
    plan = sp.plan(model, images[:1], sp.scores.opd(model, posterior), sp.Target(params=0.25))
    pruned = sp.apply(model, plan)
    sp.verify(model, pruned, plan, images)
    loaded = sp.load(sp.save(pruned, tmp_path / "small"))
    assert sum(p.numel() for p in loaded.parameters()) <= 0.25 * 2_745_306
    assert torch.equal(loaded.eval()(images), pruned.eval()(images))
