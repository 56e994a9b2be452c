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


class Unusual(nn.Module):
    """A BatchNorm that runs twice, once on half of the samples, and one that runs never."""

    def __init__(self):
        super().__init__()
        self.shared = nn.BatchNorm1d(4)
        self.idle = nn.BatchNorm1d(4)

    def forward(self, x):
        self.shared(input=x[: len(x) // 2])
        return self.shared(x + 10)


def shifting():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 4, generator=generator) + 100 * n, None) for n in (64, 32, 16)]


@pytest.mark.parametrize("order", [1, -1])
def test_a_layer_that_runs_twice_counts_every_call_by_its_samples(order):
    model = Unusual()
    calls = [part for x, _ in shifting() for part in (x[: len(x) // 2], x + 10)]
    samples = sum(map(len, calls))
    assert recalibrate(model, shifting()[::order]) == 1
    mean = sum(len(x) * x.mean(0) for x in calls) / samples
    torch.testing.assert_close(model.shared.running_mean, mean)
    variance = sum(len(x) * x.var(0) for x in calls) / samples
    torch.testing.assert_close(model.shared.running_var, variance)


def test_a_layer_that_does_not_run_keeps_its_statistics():
    model = Unusual()
    model.idle(torch.randn(8, 4))
    before = {name: b.clone() for name, b in model.idle.named_buffers()}
    recalibrate(model, shifting())
    for name, buffer in model.idle.named_buffers():
        assert torch.equal(buffer, before[name])


def failing():
    yield torch.randn(8, 4), None
    raise ValueError("disk on fire")


def failing_at_once():
    raise ValueError("disk on fire")
    yield


class Sized(nn.Sequential):
    def forward(self, x):
        if x.shape[1] != 4:
            raise ValueError("inputs must have 4 features")
        return super().forward(x)


@pytest.mark.parametrize(
    ("batches", "error", "says"),
    [
        ([], DataError, "the loader is empty"),
        ([(torch.randn(8, 4), 0), (torch.randn(1, 4), 0)], DataError, "on a batch of 1"),
        (failing(), ValueError, "^disk on fire"),
        (failing_at_once(), ValueError, "^disk on fire"),
        ([(torch.randn(8, 4), 0), (torch.randn(8, 3), 0)], ValueError, "^inputs must have"),
    ],
)
def test_an_error_is_its_own_and_leaves_the_network_as_it_was(batches, error, says):
    model = Sized(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=0.3))
    model(torch.randn(64, 4) * 3 + 7)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=says):
        recalibrate(model, batches)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model[1].momentum == 0.3
    assert not model[1]._forward_pre_hooks
