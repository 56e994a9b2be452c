import copy

import pytest
import torch
from torch import nn

from spamprune.errors import DataError
from spamprune.pruning.recalibrate import recalibrate


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3),
        nn.Dropout(0.5),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5),
    ).double()


def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64) + n, torch.zeros(n))
        for n in (6, 6, 3)
    ]


def test_statistics_are_the_means_over_samples_of_each_batch_s_own():
    model = network()
    for p in model.parameters():
        p.requires_grad_(False)
    assert recalibrate(model, batches()) == 2
    first, second = [], []
    for x, _ in batches():
        h = model[0](x)
        first.append((len(x), h.mean((0, 2, 3)), h.var((0, 2, 3))))
        scale = (h.var((0, 2, 3), correction=0) + model[1].eps).sqrt()
        h = (h - h.mean((0, 2, 3))[:, None, None]) / scale[:, None, None]
        h = model[4](h.relu())  # BatchNorm's scale is 1 and its shift 0; dropout is off
        second.append((len(x), h.mean((0, 2, 3)), h.var((0, 2, 3))))
    for layer, seen in ((model[1], first), (model[5], second)):
        torch.testing.assert_close(layer.running_mean, sum(n * m for n, m, _ in seen) / 15)
        torch.testing.assert_close(layer.running_var, sum(n * v for n, _, v in seen) / 15)


def test_modes_momenta_and_weights_stay():
    model = network()
    model[1].eval()
    before = copy.deepcopy(model)
    recalibrate(model, batches())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert (model[1].momentum, model[5].momentum) == (0.3, 0.1)
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nothing_to_do():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False))
    assert recalibrate(model, []) == 0


def test_too_little_data_is_named():
    with pytest.raises(DataError, match="the loader is empty"):
        recalibrate(network(), [])
    with pytest.raises(DataError, match="on a batch of 1"):
        recalibrate(nn.BatchNorm1d(2), [(torch.zeros(1, 2), torch.zeros(1))])
