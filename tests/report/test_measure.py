from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from spamprune.errors import DataError
from spamprune.models.classic import lenet
from spamprune.report.measure import environment, quality, quantile_ece, size


class _Fixed(nn.Module):
    """Gives its input back as logits, in evaluation mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        return x * self.one


def _reference(logits: torch.Tensor, y: torch.Tensor, bins: int) -> tuple[float, ...]:
    """Loop over samples and bins."""
    p = logits.double().softmax(1).tolist()
    right = [max(range(len(q)), key=q.__getitem__) == t for q, t in zip(p, y.tolist(), strict=True)]
    n = len(right)
    nll = -sum(math.log(q[t]) for q, t in zip(p, y.tolist(), strict=True)) / n
    brier = sum(
        (q_c - (c == t)) ** 2 for q, t in zip(p, y.tolist(), strict=True) for c, q_c in enumerate(q)
    )
    ece = 0.0
    for b in range(bins):
        inside = [i for i in range(n) if b / bins <= max(p[i]) < (b + 1) / bins]
        if inside:
            confidence = sum(max(p[i]) for i in inside) / len(inside)
            hits = sum(right[i] for i in inside) / len(inside)
            ece += len(inside) / n * abs(confidence - hits)
    return 100 * sum(right) / n, nll, ece, brier / n


@pytest.mark.parametrize("bins", [10, 15])
def test_quality_agrees_with_a_loop(bins: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(70, 3, generator=generator)
    y = torch.randint(0, 3, (70,), generator=generator)
    model = _Fixed()
    model.norm.eval()
    # batches of different sizes must not weigh the same
    measured = quality(model, [(x[:60], y[:60]), (x[60:], y[60:])], bins=bins)
    accuracy, nll, ece, brier = _reference(x, y, bins)
    assert measured.accuracy == pytest.approx(accuracy, rel=1e-5)
    assert measured.nll == pytest.approx(nll, rel=1e-6)
    assert measured.ece == pytest.approx(ece, rel=1e-4)
    assert measured.brier == pytest.approx(brier, rel=1e-6)
    assert model.training
    assert not model.norm.training


def test_quality_of_certain_predictions() -> None:
    logits = torch.tensor([[40.0, 0.0, 0.0], [0.0, 40.0, 0.0]])
    right = quality(_Fixed(), [(logits, torch.tensor([0, 1]))])
    wrong = quality(_Fixed(), [(logits, torch.tensor([1, 2]))])
    assert (right.accuracy, right.nll, right.ece, right.brier) == pytest.approx(
        (100, 0, 0, 0), abs=1e-6
    )
    assert (wrong.accuracy, wrong.nll, wrong.ece, wrong.brier) == pytest.approx((0, 40, 1, 2))


def test_quality_needs_samples() -> None:
    with pytest.raises(DataError, match="empty"):
        quality(_Fixed(), [])


def test_size_of_lenet() -> None:
    model = lenet()
    with torch.no_grad():
        model.conv2.weight[:4] = 0
    measured = size(model, torch.zeros(1, 1, 28, 28), latency_batches=(1, 2), repeats=1)
    # output pixels × output channels × (input channels × kernel), layer by layer
    convolutions = 24**2 * 6 * 25 + 10**2 * 16 * (6 * 9) + 1 * 120 * (16 * 25)
    assert measured.macs == convolutions + 120 * 84 + 84 * 10 == 231_720
    assert measured.params == 60_170
    assert measured.bytes == 4 * 60_170
    assert measured.nonzero == 60_170 - 4 * 6 * 9
    assert set(measured.latency) == {1, 2}
    assert all(seconds > 0 for seconds in measured.latency.values())
    assert measured.threads == torch.get_num_threads()
    assert model.training


def test_macs_see_fused_attention() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    measured = size(Block(), torch.randn(1, 5, 8), latency_batches=(), repeats=1)
    # projections to q, k, v and out of 5 tokens of 8; scores and their use in 2 heads of 4
    assert measured.macs == 4 * 5 * 8 * 8 + 2 * (2 * 5 * 5 * 4)


def test_environment_is_words() -> None:
    about = environment()
    assert about["torch"] == torch.__version__
    assert {"python", "timm", "torch-pruning", "spamprune", "platform", "cpu", "cores"} <= set(
        about
    )
    assert all(isinstance(value, str) and value for value in about.values())


def test_quantile_ece_by_hand():
    confidence = torch.tensor([0.5, 0.9, 0.6, 0.8])
    correct = torch.tensor([True, True, False, True])
    # two bins of two: 0.5, 0.6 with one right, 0.8, 0.9 with both right
    expected = (abs(1 - 1.1) + abs(2 - 1.7)) / 4
    assert quantile_ece(confidence, correct, bins=2) == pytest.approx(expected, abs=1e-6)
    assert quantile_ece(confidence, correct, bins=1) == pytest.approx(0.05, abs=1e-6)
    # more bins than samples: each by itself
    alone = (0.5 + 0.1 + 0.6 + 0.2) / 4
    assert quantile_ece(confidence, correct) == pytest.approx(alone, abs=1e-6)
