"""Which weights are drawn how, and that each way samples see weights of the posterior."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from spamprune.bayes import noise
from spamprune.bayes.parameters import named_parameters
from spamprune.bayes.scales import softplus_inverse
from spamprune.bayes.variational import MeanField
from spamprune.errors import PosteriorError
from spamprune.modules import call_with
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
    return set(noise.uses(model, named_parameters(model), inputs).once)


def test_weights_met_once_by_one_vector_of_each_sample():
    assert names(_Linear(), torch.randn(4, 3)) == {"weight", "bias"}
    assert names(_Linear(), torch.randn(4, 5, 3)) == set()
    assert names(_Twice(), torch.randn(4, 3)) == {"weight"}  # its bias is drawn for the batch
    assert names(_Mixed(), torch.randn(4, 3, 6)) == {"head.weight", "head.bias"}
    assert names(nn.Linear(3, 2, bias=False), torch.randn(4, 3)) == {"weight"}
    # one vector for several samples together, or several for each
    assert names(nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 2)), torch.randn(4, 5, 3)) == set()


def test_called_twice_and_tied():
    layer = nn.Linear(3, 3)
    assert names(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(4, 3)) == set()
    model, inputs, _ = case("tied embedding")
    found = noise.uses(model, named_parameters(model), inputs)
    assert not found.once
    assert not found.flipped


class _Autoencoder(nn.Module):
    """One weight there and back."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 4))

    def forward(self, x):
        return F.linear(F.linear(x, self.weight), self.weight.mT)


class _Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)

    def forward(self, x):
        return F.conv_transpose2d(self.conv(x), self.conv.weight, padding=1)


class _Pairs(nn.Module):
    """A module called on a batch, and on two of them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        both = self.layer(torch.cat([x, -x]))
        return self.layer(x) + both[: len(x)] * both[len(x) :]


class _Prototypes(nn.Module):
    """A layer on as many rows as there happen to be samples."""

    def __init__(self):
        super().__init__()
        self.features, self.of_classes = nn.Linear(3, 3), nn.Linear(2, 3)
        self.register_buffer("classes", torch.ones(4, 2))

    def forward(self, x):
        return self.features(x) @ self.of_classes(self.classes).mT


class _SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x.transpose(0, 1))).mean(0))


class _ManyHeads(nn.Module):
    """A head that training calls several times, evaluation once."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        times = 3 if self.training else 1
        return sum(self.head(F.dropout(x, 0.01, self.training)) for _ in range(times)) / times


#: The network, the shape of a sample, what is met once and what flips. Batches have four samples.
REUSED = {
    "there and back": (_Autoencoder, (4,), set(), set()),
    "convolution there and back": (_Convolutional, (1, 3, 3), set(), set()),
    "pairs": (_Pairs, (3,), set(), set()),
    "prototypes": (_Prototypes, (3,), {"features.weight", "features.bias"}, set()),
    "as many tokens as samples": (_SequenceFirst, (4, 3), {"head.weight", "head.bias"}, set()),
    "many heads": (_ManyHeads, (3,), set(), {"head.weight", "head.bias"}),
}


@pytest.mark.parametrize("name", REUSED)
def test_a_weight_is_one_weight_for_a_sample(name):
    """Moments of one sample's outputs, against weights drawn for all."""
    build, shape, once, flipped = REUSED[name]
    torch.manual_seed(0)
    field = MeanField(build().double(), 10).double()
    with torch.no_grad():
        for spread in field.spreads:
            spread.fill_(softplus_inverse(0.7))
    inputs = torch.randn(4, *shape, dtype=torch.float64)
    found = noise.uses(field.network, named_parameters(field.network), inputs)
    assert (found.once, found.flipped) == (once, flipped)

    def moments(draw):
        with torch.no_grad():
            outputs = torch.stack([draw().flatten(1)[0] for _ in range(3000)])
        return outputs.mean(0), torch.cov(outputs.mT)

    assert field(inputs).shape == field.eval()(inputs).shape
    field.train()
    mean, covariance = moments(lambda: field(inputs))
    expected = moments(lambda: call_with(field.network, field.draw(), inputs))
    size = expected[1].diagonal().max().item()
    torch.testing.assert_close(mean, expected[0], rtol=0, atol=0.1 * size**0.5)
    torch.testing.assert_close(covariance, expected[1], rtol=0, atol=0.15 * size)


def test_many_heads_are_one_in_evaluation():
    assert names(_ManyHeads().eval(), torch.randn(4, 3)) == {"head.weight", "head.bias"}


class _Recomputed(nn.Module):
    def __init__(self, **how):
        super().__init__()
        self.body, self.layer, self.how = nn.Linear(3, 3), nn.Linear(3, 2), how

    def forward(self, x):
        return checkpoint(self.layer, self.body(x), **self.how)


def test_activation_checkpointing_is_refused():
    """The weights that backward passes would compute with are gone by then."""
    flagged = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=6, num_heads=1
    )
    flagged.set_grad_checkpointing()
    ways = [_Recomputed(use_reentrant=again) for again in (True, False)]
    for model, shape in (*((way, (3,)) for way in ways), (flagged, (3, 32, 32))):
        field = MeanField(model, 4)
        with pytest.raises(PosteriorError, match="checkpointing off"):
            field(torch.randn(2, *shape))


class _Caches(_Linear):
    """It remembers what it saw, in buffers that are as large as the batch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("first", None)
        self.register_buffer("last", torch.zeros(0, 2))

    def forward(self, x):
        self.last = super().forward(x).detach()
        self.first = self.last if self.first is None else self.first
        return super().forward(x) + 0 * self.first


def test_caches_are_left_as_they_were():
    model = _Caches()
    noise.uses(model, named_parameters(model), torch.randn(4, 3))
    assert model.first is None
    assert model.last.shape == (0, 2)
    assert MeanField(model, 4)(torch.randn(4, 3)).shape == (4, 2)


class _Siamese(_Linear):
    """Samples come in pairs."""

    def forward(self, x):
        return super().forward(x).unflatten(0, (-1, 2)).prod(1)


def test_samples_may_come_in_pairs():
    assert names(_Siamese(), torch.randn(4, 3)) == {"weight", "bias"}


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
