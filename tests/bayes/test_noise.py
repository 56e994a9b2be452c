"""Which weights are drawn how, and that each way samples see weights of the posterior."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spamprune.bayes import noise
from spamprune.bayes.variational import MeanField
from tests.bayes.cases import case


class _Linear(nn.Module):
    """One linear product of the user's own tensors."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(2))

    def forward(self, x):
        return F.linear(x, self.weight, bias=self.bias)


class _Twice(_Linear):
    """Its bias is met twice."""

    def forward(self, x):
        return super().forward(x) + self.bias


class _OnTokens(_Linear):
    """It sums over what may be tokens."""

    def forward(self, x):
        return super().forward(x).flatten(1, -2).sum(1) if x.dim() > 2 else super().forward(x)


class _Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.body, self.head = nn.Conv1d(3, 4, 2), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(self.conv(x).mT).mean(1))


def names(model, inputs):
    return set(noise.uses(model, inputs).once)


def test_weights_met_once_by_one_vector_of_each_sample():
    assert names(_Linear(), torch.randn(4, 3)) == {"weight", "bias"}
    assert names(_Linear(), torch.randn(4, 5, 3)) == set()
    assert names(_Twice(), torch.randn(4, 3)) == set()
    assert names(_Mixed(), torch.randn(4, 3, 6)) == {"head.weight", "head.bias"}
    assert names(nn.Linear(3, 2, bias=False), torch.randn(4, 3)) == {"weight"}
    # one vector for several samples together, or several for each
    assert names(nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 2)), torch.randn(4, 5, 3)) == set()


def test_called_twice_and_tied():
    layer = nn.Linear(3, 3)
    assert names(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(4, 3)) == set()
    model, inputs, _ = case("tied embedding")
    found = noise.uses(model, inputs)
    assert found.shared
    assert not found.shared & found.once


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_partner_is_what_it_was(frozen):
    model = _Linear().double()
    getattr(model, frozen).requires_grad_(False)
    other = {"weight": "bias", "bias": "weight"}[frozen]
    inputs = torch.randn(4, 3, dtype=torch.float64)
    assert names(model, inputs) == ({"weight"} if frozen == "bias" else set())
    field = MeanField(model, 4).double()
    with torch.no_grad():
        field.spreads[0].fill_(-30.0)
        field.scales[0].inverse_square.spread.fill_(-30.0)
    torch.testing.assert_close(field(inputs), model(inputs), rtol=1e-6, atol=1e-9)
    field(inputs).sum().backward()
    assert field.means[0].grad.shape == getattr(model, other).shape


def test_asking_leaves_the_network_as_it_was():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 2)).train()
    torch.manual_seed(0)
    inputs, state = torch.randn(4, 3), torch.get_rng_state()
    assert names(model, inputs) == {"2.weight", "2.bias"}
    assert model.training
    assert not model[0].running_mean.any()
    assert torch.equal(torch.get_rng_state(), state)


def test_what_later_batches_have_of_another_form_is_drawn_after_all():
    """One vector each at first, tokens then, and then one vector for all."""
    field = MeanField(_OnTokens().double(), 4).double()
    field(torch.randn(4, 3, dtype=torch.float64))
    with torch.no_grad():
        field.spreads[0].fill_(-30.0)
        field.spreads[1].fill_(-30.0)
        field.scales[0].inverse_square.spread.fill_(-30.0)
    model = field.network
    tokens = torch.randn(4, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(field(tokens), model(tokens), rtol=1e-6, atol=1e-9)
    model.forward = lambda x: F.linear(x[0], model.weight, model.bias)
    torch.testing.assert_close(field(tokens), model(tokens), rtol=1e-6, atol=1e-9)


def test_mixed_precision_draws_as_on_tokens():
    torch.manual_seed(0)
    field = MeanField(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), 4)
    inputs = torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = field(inputs)
    assert outputs.dtype == torch.bfloat16
    outputs.float().square().sum().backward()
    assert all(mean.grad.isfinite().all() for mean in field.means)


def test_samples_are_independent_where_weights_are_met_once():
    """Flipout leaves samples dependent in their squares; here nothing is left."""
    torch.manual_seed(0)
    field = MeanField(nn.Linear(2, 1, bias=False).double(), 4).double()
    with torch.no_grad():
        field.scales[0].inverse_square.spread.fill_(-30.0)  # the scale is one for all samples
        inputs = torch.ones(2, 2, dtype=torch.float64)
        drawn = torch.stack([field(inputs)[:, 0] for _ in range(4000)])
        squares = (drawn - drawn.mean(0)).square()
        assert abs(torch.corrcoef(squares.T)[0, 1]) < 0.06
