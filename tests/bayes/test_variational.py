import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Gamma, LogNormal, Normal, kl_divergence
from torch.func import functional_call

from spamprune import scores
from spamprune.bayes.likelihood import Regression
from spamprune.bayes.parameters import named_parameters
from spamprune.bayes.posterior import load_posterior
from spamprune.bayes.reduction import Reduction, surplus
from spamprune.bayes.scales import Horseshoe, LayerScale, Positive, softplus_inverse
from spamprune.bayes.variational import MeanField
from spamprune.errors import PosteriorError
from tests.bayes.cases import CASES, case

PRIORS = ["gaussian", "horseshoe"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def batch(n=40):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return inputs, (inputs[:, 0] > 0).long()


def field_of(model, prior="gaussian", n_data=40):
    """A field in float64 whose spreads hide nothing."""
    field = MeanField(model, n_data, prior=prior).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for spread in field.spreads:
            spread.add_(torch.randn(spread.shape, generator=generator, dtype=torch.float64))
    return field


def test_a_positive_number_s_divergence_is_that_of_its_densities():
    positive = Positive((3,), 2.0, 6.0).double()
    with torch.no_grad():
        positive.location.copy_(torch.tensor([-1.0, 0.3, 2.0]))
        positive.spread.copy_(torch.tensor([-2.0, 0.0, 0.7]))
    sigma = F.softplus(positive.spread)
    grid = torch.linspace(-12, 12, 40001, dtype=torch.float64)[:, None]
    x = (positive.location + sigma * grid).exp()
    q, p = LogNormal(positive.location, sigma), Gamma(torch.tensor(2.0), torch.tensor(6.0))
    weight = Normal(0.0, 1.0).log_prob(grid).exp() * 24 / 40000
    expected = (weight * (q.log_prob(x) - p.log_prob(x))).sum()
    torch.testing.assert_close(positive.divergence(), expected, rtol=1e-6, atol=1e-6)
    torch.manual_seed(0)
    draws = torch.stack([positive(draw=True).log() for _ in range(4000)])
    torch.testing.assert_close(draws.mean(0), positive.location.data, rtol=0, atol=0.1)
    torch.testing.assert_close(draws.std(0), sigma.data, rtol=0.05, atol=0)
    torch.testing.assert_close(positive(draw=False), positive.location.exp())


@pytest.mark.parametrize("prior", PRIORS)
def test_the_divergence_is_the_sum_of_its_parts(prior):
    field = field_of(network(), prior)
    expected = sum(scale.divergence() for scale in field.scales)
    for mean, spread in zip(field.means, field.spreads, strict=True):
        expected += kl_divergence(Normal(mean, F.softplus(spread)), Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(field.divergence(), expected)
    torch.testing.assert_close(field.penalty(), expected / 40)
    positives = [part for part in field.modules() if isinstance(part, Positive)]
    assert len(positives) == {"gaussian": 2, "horseshoe": 7}[prior]


@pytest.mark.parametrize("prior", PRIORS)
def test_means_start_at_the_network_s_weights(prior):
    model = network()
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    field = MeanField(model, 40, prior=prior)
    scales = field._scales(draw=False)
    for name, scale, mean in zip(expected, scales, field.means, strict=True):
        torch.testing.assert_close(scale * mean.detach(), expected[name])
    weight, bias = expected["0.weight"], expected["0.bias"]
    root = torch.cat([weight.flatten(), bias]).square().mean().sqrt()
    assert scales[0].flatten()[0].item() == pytest.approx(root.item(), rel=2e-2)


def test_the_horseshoe_s_scales_against_its_formula():
    layer = Horseshoe([torch.ones(3, 4), torch.ones(3)], last=False)
    torch.manual_seed(0)
    drawn = layer(draw=True)
    torch.manual_seed(0)
    over, under = (part(draw=True) for part in layer.layer)
    up, down = (part(draw=True) for part in layer.row)
    psi = 1e-4 * over / under * up / down
    expected = (psi / (1 + layer.inverse_square(draw=True) * psi)).sqrt()
    torch.testing.assert_close(drawn[0], expected[:, None])
    torch.testing.assert_close(drawn[1], expected)
    (last,) = Horseshoe([torch.full((2, 2), 0.5)], last=True)(draw=False)
    assert last.item() == pytest.approx(0.5)


@pytest.mark.parametrize("size", [0.0, 1e-6])
def test_a_layer_of_next_to_nothing_starts_at_the_prior_s_scale(size):
    values = [torch.full((3,), size)]
    (scale,) = LayerScale(values, last=False)(draw=False)
    assert scale.item() == pytest.approx(0.1)
    for prior in (LayerScale(values, last=False), Horseshoe(values, last=False)):
        assert 0 <= prior.divergence() < 100


@pytest.mark.parametrize("prior", PRIORS)
def test_gradients_of_the_bound_against_numerical_ones(prior):
    field = field_of(network(), prior)
    inputs, targets = batch(6)

    def loss(seed=3):
        torch.manual_seed(seed)
        return F.cross_entropy(field(inputs), targets) + field.penalty()

    loss().backward()
    trained = {n: p for n, p in field.named_parameters() if not n.startswith("network.")}
    assert all(p.grad is None for p in field.network.parameters())
    for name, parameter in trained.items():
        direction = torch.randn_like(parameter)
        values, step = [], 1e-5
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
                values.append(loss().item())
                parameter.sub_(direction, alpha=sign * step)
        numerical = (values[0] - values[1]) / (2 * step)
        analytic = (parameter.grad * direction).sum().item()
        assert numerical == pytest.approx(analytic, rel=1e-6, abs=1e-9), name


def moments(draw, times=3000):
    outputs = torch.stack([draw().flatten(1) for _ in range(times)])  # (S, B, O)
    centred = outputs - outputs.mean(0)
    of_samples = torch.einsum("sbo,sbp->bop", centred, centred) / times
    between = torch.einsum("sao,sbo->ab", centred, centred) / times
    return outputs.mean(0), of_samples, between


class _Twice(nn.Module):
    """A weight that every sample meets twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(self.layer(x))


LAYERS = {
    "linear": (lambda: nn.Linear(3, 2), (3,)),
    "linear on tokens": (lambda: nn.Linear(3, 2), (4, 3)),
    "twice": (_Twice, (3,)),
    "conv": (lambda: nn.Conv2d(2, 2, 2, padding=1), (2, 3, 3)),
    "grouped conv": (lambda: nn.Conv1d(4, 4, 2, groups=2), (4, 3)),
    "transposed conv": (lambda: nn.ConvTranspose1d(2, 2, 2, stride=2), (2, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_each_sample_sees_weights_of_the_posterior(name):
    """Jointly over outputs and positions, and other samples than its own hardly the same noise."""
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    field = field_of(build().double())
    with torch.no_grad():
        for spread in field.spreads:
            spread.fill_(softplus_inverse(0.5))
    inputs = torch.randn(4, *shape, dtype=torch.float64)

    def drawn():
        return functional_call(field.network, field.draw(), (inputs,))

    with torch.no_grad():
        mean, covariance, between = moments(lambda: field(inputs))
        plain_mean, plain_covariance, plain_between = moments(drawn)
    size = plain_covariance.abs().amax().item()
    torch.testing.assert_close(mean, plain_mean, rtol=0, atol=0.09 * size**0.5)
    torch.testing.assert_close(covariance, plain_covariance, rtol=0, atol=0.13 * size)
    off = ~torch.eye(4, dtype=torch.bool)
    assert between[off].abs().mean() < 0.6 * plain_between[off].abs().mean()


@pytest.mark.parametrize("name", CASES)
def test_any_network_can_be_drawn_and_trained(name):
    model, inputs, targets = case(name)
    if name == "embedding with padding":
        model.body.weight.data[2] = 0
    field = field_of(model, n_data=len(inputs))
    with torch.no_grad():
        for spread in field.spreads:
            spread.fill_(-12.0)  # all but the means
        for scale in field.scales:
            scale.inverse_square.spread.fill_(-30.0)
        torch.testing.assert_close(field(inputs), model(inputs), rtol=1e-2, atol=1e-3)
    (F.cross_entropy(field(inputs), targets) + field.penalty()).backward()
    for mean, spread in zip(field.means, field.spreads, strict=True):
        assert mean.grad.isfinite().all()
        assert spread.grad.isfinite().all()


@pytest.mark.parametrize("name", ["tied embedding", "called twice", "attention, tokens first"])
def test_what_cannot_flip_is_drawn_for_the_batch(name):
    """Shared tensors, and products whose first dimension is not the samples."""
    model, inputs, _ = case(name)
    field = field_of(model.double())
    torch.manual_seed(0)
    outputs = field(inputs)
    torch.manual_seed(0)
    weights = field.draw()
    same = torch.allclose(outputs, functional_call(field.network, weights, (inputs,)))
    assert same == (name != "called twice")


def test_exact_inference_in_a_linear_model():
    """With one feature each, the posterior factorises: the bound is the evidence."""
    torch.manual_seed(0)
    inputs = torch.diag(torch.tensor([3.0, 1.0, 0.2, 2.0], dtype=torch.float64))
    targets = torch.tensor([[2.0], [-1.0], [0.1], [0.0]], dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    field = MeanField(model, 4).double()
    scale = field.scales[0].inverse_square
    with torch.no_grad():
        scale.location.fill_(0.0)  # γ = 1, known
        scale.spread.fill_(-30.0)
        for mean, spread in zip(field.means, field.spreads, strict=True):
            precision = inputs.diagonal().square() + 1
            mean.copy_((inputs.diagonal() * targets[:, 0] / precision)[None])
            spread.copy_(torch.log(torch.expm1(precision.rsqrt()))[None])
    found = field.posterior([(inputs, targets)], Regression())
    torch.testing.assert_close(found.precision()["weight"][0], precision)
    torch.testing.assert_close(found.prior_precision["weight"], torch.ones(1, 4).double())
    torch.testing.assert_close(model.weight.detach(), field.means[0].detach())
    normal = Normal(0.0, precision.sqrt())
    evidence = normal.log_prob(targets[:, 0]).sum().item()
    with torch.no_grad():
        bounds = [field.elbo([(inputs, targets)], Regression()) for _ in range(4000)]
    bound = sum(bounds) / len(bounds) + scale.divergence().item()
    assert bound == pytest.approx(evidence, abs=0.05)
    # each weight meets one target, so that leaving it out is a ratio of two densities
    without = Normal(0.0, 1.0).log_prob(targets[:, 0])
    gains = Reduction(model, found, "own").evidence()["weight"][0]
    torch.testing.assert_close(gains, without - normal.log_prob(targets[:, 0]))


def trained(prior="gaussian", steps=500, size=200):
    inputs, targets = batch(size)
    field = MeanField(network().float(), size, prior=prior)
    optimizer = torch.optim.Adam(field.parameters(), lr=0.02)
    torch.manual_seed(0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(field(inputs.float()), targets) + field.penalty()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return field, (inputs.float(), targets), losses


@pytest.mark.parametrize("prior", PRIORS)
def test_training_raises_the_bound_and_learns(prior):
    field, (inputs, targets), losses = trained(prior)
    assert sum(losses[-50:]) < 0.5 * sum(losses[:50])
    probabilities = field.predict(inputs, 50)
    assert (probabilities.argmax(1) == targets).float().mean() > 0.95


def test_reduction_of_a_trained_field_and_masks_that_hold():
    field, (inputs, targets), _ = trained(steps=1500)
    found = field.posterior([(inputs, targets)])
    delta_f = Reduction(field.network, found, "own").evidence()
    # ΔF does not depend on the units of a weight
    gains = field.gains()["0.weight"]
    mean, sigma = field.means[0].detach(), F.softplus(field.spreads[0].detach())
    expected = -sigma.log() - 0.5 * (mean / sigma).square()
    torch.testing.assert_close(gains.float(), expected, rtol=1e-3, atol=1e-3)
    # a posterior holds no weight to be wider than the prior
    narrow = -sigma.clamp(max=1).log() - 0.5 * (mean / sigma.clamp(max=1)).square()
    torch.testing.assert_close(delta_f["0.weight"].float(), narrow, rtol=1e-3, atol=1e-3)
    masks = {name: found <= 0 for name, found in surplus(delta_f, whole=["2"]).items()}
    # only the first of five inputs tells of the targets
    assert masks["0.weight"][:, 1:].float().mean() < 0.2
    assert masks["0.weight"][:, 0].any()
    field.prune(masks)
    assert ((field.predict(inputs, 50).argmax(1) == targets).float().mean()) > 0.9
    optimizer = torch.optim.SGD(field.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        (F.cross_entropy(field(inputs), targets) + field.penalty()).backward()
        optimizer.step()
    weights = field.draw()
    again = field.posterior([(inputs, targets)])
    for name, parameter in named_parameters(field.network).items():
        assert not weights[name][~masks[name]].any()
        assert not parameter[~masks[name]].any()
        delta = again.prior_precision[name][~masks[name]]
        torch.testing.assert_close(again.precision()[name][~masks[name]], delta)
    restored = MeanField(network().float(), 200)
    restored.load_state_dict(field.state_dict())
    assert not restored.draw()["0.weight"][~masks["0.weight"]].any()
    field.prune({name: torch.ones_like(mask) for name, mask in masks.items()})
    assert not field.draw()["0.weight"][~masks["0.weight"]].any()


def test_a_posterior_is_like_any_other(tmp_path):
    field, data, _ = trained(steps=50)
    found = field.posterior([data])
    found.save(tmp_path / "p.safetensors")
    loaded = load_posterior(tmp_path / "p.safetensors")
    assert loaded.log_evidence == found.log_evidence
    opd = scores.opd(field.network, loaded)["0.weight"]
    mean, sigma = field.means[0].detach(), F.softplus(field.spreads[0].detach())
    torch.testing.assert_close(opd, (mean / sigma).square())


def test_predictions_average_probabilities_over_weights():
    field = field_of(network())
    inputs, _ = batch(7)
    field.train()
    torch.manual_seed(0)
    found = field.predict(inputs, 5)
    assert field.network.training
    torch.manual_seed(0)
    expected = []
    for _ in range(5):
        weights = field.draw()
        expected.append(functional_call(field.network, weights, (inputs,)).softmax(1))
    torch.testing.assert_close(found, torch.stack(expected).mean(0))
    torch.testing.assert_close(found.sum(1), torch.ones(7, dtype=torch.float64))
    many = field.predict(inputs, 3000)
    assert (many - field.predict(inputs, 3000)).abs().max() < 0.03


def test_the_network_s_own_parameters_are_left_alone_by_training():
    model = network()
    before = copy.deepcopy(model.state_dict())
    field = field_of(model)
    inputs, targets = batch()
    optimizer = torch.optim.Adam(field.parameters(), lr=0.1)
    (F.cross_entropy(field(inputs), targets) + field.penalty()).backward()
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_frozen_parameters_have_no_distribution():
    model = network()
    model[0].requires_grad_(False)
    field = field_of(model)
    assert len(field.means) == 2
    inputs, targets = batch()
    assert field.posterior([(inputs, targets)]).prior_precision.keys() == {"2.weight", "2.bias"}


def test_faults_are_named():
    with pytest.raises(PosteriorError, match="unknown prior 'laplace'"):
        MeanField(network(), 10, prior="laplace")
    with pytest.raises(PosteriorError, match="no trainable parameters"):
        MeanField(nn.ReLU(), 10)
    field = field_of(network())
    inputs, targets = batch(39)
    with pytest.raises(PosteriorError, match="39 samples and n_data is 40"):
        field.elbo([(inputs, targets)])
    with pytest.raises(PosteriorError, match="gave 0 samples"):
        field.elbo([], samples=10)
    with pytest.raises(PosteriorError, match="samples must be a positive number, not 0"):
        field.predict(inputs, 0)
    with pytest.raises(PosteriorError, match=r"masks lacks parameter '0\.weight'"):
        field.prune({})
    one = {name: torch.ones(1, dtype=torch.bool) for name in field.masks()}
    with (
        pytest.raises(PosteriorError, match=r"masks has shape \(1,\) for parameter"),
        field.reduced(one),
    ):
        pass
    assert math.isfinite(field.elbo([batch(40)]))


@pytest.mark.parametrize("prior", PRIORS)
def test_in_evaluation_mode_weights_are_the_posterior_means(prior):
    field = field_of(network(), prior)
    with torch.no_grad():
        field.means[0].add_(1.0)
    inputs, targets = batch()
    masks = {n: torch.rand(m.shape) < 0.7 for n, m in field.masks().items()}
    field.prune(masks)
    field.eval()
    outputs = field(inputs)
    assert torch.equal(outputs, field(inputs))
    assert field.collapse() is field.network
    torch.testing.assert_close(field.network(inputs), outputs)
    assert all(not p[~masks[n]].any() for n, p in field.network.named_parameters())
    # a bound is an expectation over weights, whatever the mode
    bounds = {field.elbo([(inputs, targets)]) for _ in range(3)}
    assert len(bounds) == 3


def test_what_is_pruned_costs_nothing_wherever_momentum_takes_it():
    field = field_of(network())
    masks = {n: torch.zeros_like(m) for n, m in field.masks().items()}
    masks["2.bias"] |= True
    field.prune(masks)
    with torch.no_grad():
        for mean in list(field.means)[:-1]:
            mean.add_(3.0)
    last = kl_divergence(
        Normal(field.means[-1], F.softplus(field.spreads[-1])), Normal(0.0, 1.0)
    ).sum()
    scales = sum(scale.divergence() for scale in field.scales)
    torch.testing.assert_close(field.divergence(), scales + last)
    inputs, targets = batch()
    found = field.posterior([(inputs, targets)])
    assert not found.curvature.diag["0.weight"].any()
    assert not field.network[0].weight.any()


def test_masks_for_a_while():
    field = field_of(network())
    inputs, targets = batch()
    kept = {n: torch.rand(m.shape) < 0.5 for n, m in field.masks().items()}
    state = {n: t.clone() for n, t in field.state_dict().items()}
    with field.reduced(kept):
        torch.manual_seed(0)
        inside = field.elbo([(inputs, targets)])
        assert not field.draw()["0.weight"][~kept["0.weight"]].any()
    assert all(torch.equal(t, state[n]) for n, t in field.state_dict().items())
    field.prune(kept)
    torch.manual_seed(0)
    assert field.elbo([(inputs, targets)]) == pytest.approx(inside, rel=1e-12)


def test_a_bound_from_a_part_of_the_data_is_scaled_up():
    field = field_of(network(), n_data=40)
    with torch.no_grad():
        for spread in field.spreads:
            spread.fill_(-30.0)
        for scale in field.scales:
            scale.inverse_square.spread.fill_(-30.0)
    inputs, targets = batch()
    halves = [(inputs[:20], targets[:20]), (inputs[20:], targets[20:])]
    parts = [field.elbo([half], samples=20) for half in halves]
    assert sum(parts) / 2 == pytest.approx(field.elbo(halves), rel=1e-9)
    assert field.elbo(halves, samples=15) == pytest.approx(parts[0], rel=1e-9)


def test_log_precisions_are_those_of_the_posterior():
    field = field_of(network(), "horseshoe")
    found = field.posterior([batch()])
    expected = [delta.log().mean().item() for delta in found.prior_precision.values()]
    assert field.mean_log_precision() == pytest.approx(expected)


def test_opd_is_that_of_the_posterior():
    field = field_of(network())
    posterior = field.posterior([batch()])
    expected = scores.opd(field.network, posterior)
    found = field.opd()
    for name, spread in zip(found, field.spreads, strict=True):
        narrow = F.softplus(spread) < 1  # wider than the prior counts as the prior
        torch.testing.assert_close(found[name][narrow], expected[name][narrow].double())


class _Bag(nn.Module):
    """A sum over tokens, of which zero is for padding."""

    def __init__(self, **kwargs):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 3, padding_idx=0, **kwargs), nn.Linear(3, 2)

    def forward(self, tokens):
        return self.head(self.table(tokens).sum(1))


def test_padding_is_zero_in_every_draw():
    """No gradient reaches that row: its spread would grow to the prior's."""
    field = MeanField(_Bag(), 4)
    assert (~field.masks()["table.weight"]).nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]
    assert not field.draw()["table.weight"][0].any()
    model = _Bag()
    with torch.no_grad():
        model.table.weight[0] = 1.0
    with pytest.raises(PosteriorError, match="row for padding"):
        MeanField(model, 4)
    tied, *_ = case("tied embedding")
    assert all(mask.all() for mask in MeanField(tied, 4).masks().values())


def test_sparse_gradients():
    """Of embeddings: as dense ones."""
    grads = []
    for sparse in (False, True):
        torch.manual_seed(0)
        field = MeanField(_Bag(sparse=sparse), 4)
        torch.manual_seed(1)
        field(torch.tensor([[1, 0], [2, 3]])).square().sum().backward()
        grads.append([p.grad for p in (*field.means, *field.spreads)])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("prior", PRIORS)
def test_half_precision_divergences_are_summed_in_single(prior):
    torch.manual_seed(0)
    field = MeanField(nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 10)), 40, prior=prior)
    field.bfloat16()
    found, expected = field.divergence(), copy.deepcopy(field).double().divergence()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    found.backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in field.means)


def test_predictions_of_half_precision_are_summed_in_single():
    torch.manual_seed(0)
    field = MeanField(nn.Linear(5, 10), 40).bfloat16()
    found = field.predict(torch.randn(6, 5).bfloat16(), 300)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(1), torch.ones(6))


def test_the_network_may_be_frozen_since():
    network = nn.Linear(3, 2).double()
    field = MeanField(network, 8).double()
    network.requires_grad_(False)
    inputs, targets = torch.randn(8, 3).double(), torch.zeros(8, dtype=torch.long)
    assert field(inputs).requires_grad
    field.prune({"weight": torch.zeros(2, 3).bool(), "bias": torch.ones(2).bool()})
    posterior = field.posterior([(inputs, targets)])
    assert not network.weight.any()
    assert set(posterior.prior_precision) == {"weight", "bias"}


def test_a_batch_that_is_no_pair_is_refused():
    field = MeanField(nn.Linear(3, 2), 8)
    with pytest.raises(PosteriorError, match="must be a pair of tensors"):
        field.elbo([{"image": torch.zeros(8, 3), "label": torch.zeros(8)}])
