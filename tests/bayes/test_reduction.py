"""ΔF against ratios of evidences, in linear-Gaussian models where both are exact."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import MultivariateNormal

from spamprune.bayes.curvature import Curvature
from spamprune.bayes.curvature.blocks import Kronecker
from spamprune.bayes.evidence import LOG_PRECISION_RANGE, log_evidence, maximise
from spamprune.bayes.parameters import named_parameters
from spamprune.bayes.posterior import Posterior, posterior_from
from spamprune.bayes.prior import Prior
from spamprune.bayes.reduction import (
    Reduction,
    furthest,
    layers,
    log_odds,
    pruned_of,
    surplus,
)
from spamprune.errors import PosteriorError

#: Weight matrices: (layer, groups)
SHAPES = {
    "linear": (lambda: nn.Linear(4, 3, bias=False), 1),
    "conv": (lambda: nn.Conv2d(2, 3, (2, 1), bias=False), 1),
    "grouped conv": (lambda: nn.Conv2d(4, 6, 2, groups=2, bias=False), 2),
}


class Problem:
    """``y = Xw + noise``, w the flattened weight, X such that the curvature is as asked.

    Args:
        shape: Of the layer, by name.
        structure: ``"diag"`` or ``"kron"``.
        delta: Prior precision of every weight; drawn if not given.
    """

    def __init__(self, shape, structure, delta=None, seed=0):
        g = torch.Generator().manual_seed(seed)
        build, groups = SHAPES[shape]
        self.model = build().double()
        weight = self.model.weight
        n, out = weight.numel(), len(weight) // groups
        drawn = torch.randn(weight.shape, generator=g, dtype=torch.float64).exp()
        self.delta = drawn if delta is None else torch.full_like(drawn, delta)
        kron = {}
        if structure == "diag":
            curvature = torch.rand(n, generator=g, dtype=torch.float64).mul(4).diag()
        else:

            def factor(size):
                rows = torch.randn(groups, size, size + 2, generator=g, dtype=torch.float64)
                return rows @ rows.mT

            outputs, inputs = factor(out), factor(weight[0].numel())
            curvature = torch.block_diag(
                *(torch.kron(a, b) for a, b in zip(outputs, inputs, strict=True))
            )
            kron["weight"] = Kronecker(outputs, inputs, tuple(weight.shape))
        self.inputs = torch.linalg.cholesky(curvature).mT
        true = torch.randn(n, generator=g, dtype=torch.float64) * (torch.arange(n) % 2)
        self.targets = self.inputs @ true + torch.randn(n, generator=g, dtype=torch.float64)
        mean = torch.linalg.solve(
            curvature + self.delta.flatten().diag(), self.inputs.mT @ self.targets
        )
        with torch.no_grad():
            weight.copy_(mean.view(weight.shape))
        residual = self.targets - self.inputs @ mean
        loss = 0.5 * (residual.square() + math.log(2 * math.pi)).sum().item()
        diag = {"weight": curvature.diagonal().reshape(weight.shape)}
        curved = Curvature(diag, loss, n, "ggn", "exact", kron)
        precision = {"weight": self.delta}
        evidence = log_evidence({"weight": weight}, curved, precision)
        self.posterior = Posterior(curved, precision, 1.0, evidence)

    def evidence(self, delta, removed=None):
        """Return the log marginal likelihood without some weights, dense."""
        keep = torch.ones(self.delta.numel(), dtype=torch.bool)
        if removed is not None:
            keep &= ~removed.flatten()
        inputs = self.inputs[:, keep]
        covariance = inputs @ (1 / delta.flatten()[keep]).diag() @ inputs.mT
        noise = torch.eye(len(covariance), dtype=torch.float64)
        normal = MultivariateNormal(torch.zeros_like(self.targets), covariance + noise)
        return normal.log_prob(self.targets).item()

    def gain(self, delta, removed):
        return self.evidence(delta, removed) - self.evidence(delta)

    def each(self, delta):
        gains = torch.zeros_like(self.delta)
        for i in range(gains.numel()):
            removed = torch.zeros_like(gains, dtype=torch.bool)
            removed.view(-1)[i] = True
            gains.view(-1)[i] = self.gain(delta, removed)
        return gains

    def groups(self, delta, dim, members):
        gains = []
        for positions in members:
            removed = torch.zeros_like(self.delta, dtype=torch.bool)
            removed.index_fill_(dim, positions, True)
            gains.append(self.gain(delta, removed))
        return torch.tensor(gains, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


MEMBERS = {
    "linear": [(0, [[0], [2]]), (0, [[0, 2]]), (1, [[1], [3]]), (1, [[0, 3], [2, 1]])],
    "conv": [(0, [[1], [2]]), (0, [[1, 0]]), (1, [[0], [1]])],
    "grouped conv": [(0, [[1], [4]]), (0, [[0, 2], [5, 3]]), (0, [[1, 2, 4]]), (1, [[0], [1]])],
}


@pytest.mark.parametrize("structure", ["diag", "kron"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("slab", [0.3, 5.0])
def test_under_a_slab_every_gain_is_a_ratio_of_evidences(shape, structure, slab):
    """The prior before was another for every weight."""
    problem = Problem(shape, structure)
    reduction = Reduction(problem.model, problem.posterior, slab)
    delta = torch.full_like(problem.delta, slab)
    close(reduction.evidence()["weight"], problem.each(delta))
    for dim, members in MEMBERS[shape]:
        members = torch.tensor(members)
        found = reduction.group_evidence("weight", dim, members)
        close(found, problem.groups(delta, dim, members))
    close(torch.tensor(reduction.log_evidence), torch.tensor(problem.evidence(delta)))


@pytest.mark.parametrize("shape", SHAPES)
def test_under_its_own_prior_a_diagonal_posterior_is_exact(shape):
    problem = Problem(shape, "diag")
    reduction = Reduction(problem.model, problem.posterior, "own")
    close(reduction.evidence()["weight"], problem.each(problem.delta))
    for dim, members in MEMBERS[shape]:
        members = torch.tensor(members)
        found = reduction.group_evidence("weight", dim, members)
        close(found, problem.groups(problem.delta, dim, members))
    assert reduction.log_evidence == problem.posterior.log_evidence


def test_under_its_own_scalar_prior_a_kronecker_posterior_is_exact():
    problem = Problem("linear", "kron", delta=0.7)
    reduction = Reduction(problem.model, problem.posterior, "own")
    close(reduction.evidence()["weight"], problem.each(problem.delta))


def test_biases_of_a_diagonal_posterior_have_groups_too():
    model = nn.Linear(3, 4)
    diag = {name: torch.rand_like(p).double() * 50 for name, p in model.named_parameters()}
    curvature = Curvature(diag, 1.0, 100, "ef", "exact")
    posterior = posterior_from(model, curvature, Prior(model, "scalar"))
    reduction = Reduction(model, posterior)
    members = torch.tensor([[0, 2], [3, 1]])
    each = reduction.evidence()["bias"]
    close(reduction.group_evidence("bias", 0, members), each[members].sum(1))


def test_kernel_pixels_are_groups_too_where_the_posterior_is_diagonal():
    problem = Problem("conv", "diag", delta=2.0)
    members = torch.tensor([[0], [1]])
    found = Reduction(problem.model, problem.posterior, "own").group_evidence("weight", 2, members)
    close(found, problem.groups(problem.delta, 2, members))


def test_gains_of_a_diagonal_posterior_add_up():
    problem = Problem("linear", "diag")
    reduction = Reduction(problem.model, problem.posterior, 1.0)
    gains = reduction.evidence()["weight"]
    removed = gains > 0
    after = reduction.log_evidence + gains[removed].sum()
    delta = torch.ones_like(problem.delta)
    close(after, torch.tensor(problem.evidence(delta, removed), dtype=torch.float64))
    assert 0 < removed.sum() < removed.numel()


def test_the_bias_of_kronecker_factors_and_the_temperature():
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    rows = torch.randn(2, 4, 6, dtype=torch.float64)
    outputs, bias = (rows @ rows.mT).split(1)
    columns = torch.randn(1, 3, 5, dtype=torch.float64)
    kron = {
        "weight": Kronecker(outputs, columns @ columns.mT, (4, 3)),
        "bias": Kronecker(bias, None, (4,)),
    }
    curvature = Curvature({n: b.diag for n, b in kron.items()}, 1.0, 9, "ef", "exact", kron)
    posterior = posterior_from(model, curvature, Prior(model, "scalar", 0.5), 2.5)
    reduction = Reduction(model, posterior, "own")
    covariance = torch.linalg.inv(bias[0] / 2.5 + 0.5 * torch.eye(4))
    mean = model.bias.detach()
    variance = covariance.diagonal()
    close(reduction.evidence()["bias"], -0.5 * ((0.5 * variance).log() + mean**2 / variance))
    pair = covariance[:2, :2]
    expected = -0.5 * (pair.logdet() + 2 * math.log(0.5) + mean[:2] @ pair.inverse() @ mean[:2])
    close(reduction.group_evidence("bias", 0, torch.tensor([[0, 1]]))[0], expected)


@pytest.mark.parametrize("structure", ["diag", "kron"])
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 9999))
def test_the_layerwise_slab_has_more_evidence_than_any_other(structure, seed):
    problem = Problem("linear", structure, seed=seed)
    best = Reduction(problem.model, problem.posterior, "layerwise").log_evidence
    others = [math.exp(log) for log in torch.linspace(-9, 9, 73)]
    most = max(Reduction(problem.model, problem.posterior, s).log_evidence for s in others)
    assert best >= most - 1e-3  # nats; the fixed point is slow where slabs hardly differ


def test_a_layer_s_weight_and_bias_share_a_slab():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    diag = {n: torch.rand_like(p) * 50 for n, p in model.named_parameters()}
    curvature = Curvature(diag, 10.0, 100, "ef", "exact")
    posterior = posterior_from(model, curvature, Prior(model, "parameterwise"))
    slabs = {}
    for name, gains in Reduction(model, posterior).evidence().items():
        # the δ₀ that explains ΔF of all weights of the tensor
        h, natural = diag[name], (diag[name] + 1) * model.get_parameter(name).detach()
        tried = torch.linspace(-4, 8, 12001, dtype=torch.float64).exp().view(-1, *[1] * h.dim())
        found = 0.5 * ((1 + h / tried).log() - natural**2 / (h + tried))
        slabs[name] = tried.flatten()[(found - gains).square().flatten(1).sum(1).argmin()].item()
    assert slabs["0.weight"] == pytest.approx(slabs["0.bias"], rel=3e-3)
    assert slabs["1.weight"] == pytest.approx(slabs["1.bias"], rel=3e-3)
    assert slabs["0.weight"] != pytest.approx(slabs["1.weight"], rel=0.05)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 9999), scale=st.floats(0.01, 3))
def test_at_the_parameterwise_optimum_nothing_would_go(seed, scale):
    """Until the prior is exchanged for a slab."""
    torch.manual_seed(seed)
    model = nn.Linear(12, 10, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(scale * torch.randn(10, 12))
        model.weight[:, ::2] *= 1e-3
    curvature = Curvature(
        {"weight": torch.rand(10, 12, dtype=torch.float64) * 100}, 1.0, 100, "ef", "exact"
    )
    prior = Prior(model, "parameterwise")
    prior.log_factors["weight"][0] = prior.log_factors["weight"][0].double()
    maximise(prior, named_parameters(model), curvature)
    posterior = posterior_from(model, curvature, prior)
    largest = curvature.diag["weight"].max() / math.exp(LOG_PRECISION_RANGE[1])
    gained = Reduction(model, posterior, "own").evidence()["weight"].max()
    assert gained <= 1e-12 + 0.5 * largest  # where the optimum lies beyond the range
    assert Reduction(model, posterior, scale**-2).evidence()["weight"].max() > 0


def test_what_the_curvature_leaves_out_is_never_favoured():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    curvature = Curvature({"weight": torch.rand(2, 3)}, 1.0, 9, "ef", "exact")
    posterior = posterior_from(model, curvature, Prior(model, "scalar", 4.0))
    for slab in ("own", "layerwise", 0.01):
        bias = Reduction(model, posterior, slab).evidence()["bias"]
        torch.testing.assert_close(bias, -2.0 * model.bias.detach().double().square())


def reference_odds(delta_f, iterations):
    zeta = 0.0
    for _ in range(iterations):
        rho = [1 / (1 + math.exp(min(f - zeta, 700))) for f in delta_f]
        a, b = 1 + sum(rho), 1 + sum(1 - r for r in rho)
        zeta = (
            torch.digamma(torch.tensor(a).double()) - torch.digamma(torch.tensor(b).double())
        ).item()
    return zeta


GAINS = st.lists(st.floats(-50, 50), min_size=1, max_size=60)


@settings(deadline=None, max_examples=60)
@given(gains=GAINS, iterations=st.integers(0, 6))
def test_odds_are_those_of_the_paper_s_code(gains, iterations):
    found = log_odds(torch.tensor(gains, dtype=torch.float64), iterations).item()
    assert found == pytest.approx(reference_odds(gains, iterations), abs=1e-5)


@settings(deadline=None, max_examples=60)
@given(gains=GAINS)
def test_odds_move_one_way_and_settle(gains):
    gains = torch.tensor(gains, dtype=torch.float64)
    path = torch.stack([log_odds(gains, k) for k in (0, 1, 2, 3, 4, 8, 1000, 1001)])
    steps = path.diff()
    assert (steps >= -1e-12).all() or (steps <= 1e-12).all()
    assert steps[-1].abs() < 1e-4
    bound = torch.digamma(torch.tensor(1.0 + len(gains))) - torch.digamma(torch.tensor(1.0))
    assert path.abs().max() <= bound + 1e-5


def test_layers_hold_weight_and_bias_and_nothing_else():
    names = ["cls_token", "fc.weight", "attn.in_proj_weight", "attn.in_proj_bias", "fc.bias"]
    assert layers(names) == {
        "cls_token": ["cls_token"],
        "fc": ["fc.weight", "fc.bias"],
        "attn.in_proj_": ["attn.in_proj_weight", "attn.in_proj_bias"],
    }


def active(delta_f, **settings):
    """Masks of all that pays."""
    return {name: found <= 0 for name, found in surplus(delta_f, **settings).items()}


def test_each_layer_has_its_own_odds_and_the_last_stays():
    delta_f = {
        "a.weight": torch.tensor([[4.0, 5.0, 6.0, -9.0]]),
        "a.bias": torch.tensor([0.1]),
        "b.weight": torch.tensor([-4.0, -5.0, -6.0, 0.1]),
        "head.weight": torch.tensor([9.0]),
    }
    stays = active(delta_f, whole=["head"])
    assert stays["a.weight"].tolist() == [[False, False, False, True]]
    assert stays["a.bias"].tolist() == [False]  # in a layer where most are gone
    assert stays["b.weight"].tolist() == [True] * 4  # in one where most stay
    assert stays["head.weight"].all()
    assert list(stays) == list(delta_f)
    assert not active(delta_f)["head.weight"].any()


def test_what_is_gone_stays_gone_and_counts():
    delta_f = {"a.weight": torch.tensor([-8.0, -8.0, 0.3, 0.3])}
    assert active(delta_f, iterations=0)["a.weight"].tolist() == [True, True, False, False]
    kept = {"a.weight": torch.tensor([True, False, True, True])}
    stays = active(delta_f, pruned=kept)["a.weight"]
    assert stays.tolist()[1] is False
    zeta = log_odds(torch.tensor([-8.0, math.inf, 0.3, 0.3]))
    assert stays.tolist() == [True, False, bool(zeta >= 0.3), bool(zeta >= 0.3)]
    assert active(delta_f, pruned=kept, whole=["a"])["a.weight"].tolist() == [
        True,
        False,
        True,
        True,
    ]


def test_faults_are_named():
    problem = Problem("linear", "kron")
    for slab in (0.0, -1.0, math.inf, math.nan, "unitwise"):
        with pytest.raises(PosteriorError, match="a slab is"):
            Reduction(problem.model, problem.posterior, slab)
    with pytest.raises(PosteriorError, match="lacks parameter 'bias'"):
        Reduction(nn.Linear(4, 3), problem.posterior)
    reduction = Reduction(problem.model, problem.posterior)
    with pytest.raises(PosteriorError, match="did you mean 'weight'"):
        reduction.group_evidence("weigt", 0, torch.tensor([[0]]))
    with pytest.raises(PosteriorError, match="dimension 2"):
        reduction.group_evidence("weight", 2, torch.tensor([[0]]))
    for member in (-1, 99):
        with pytest.raises(PosteriorError, match=f"members {member} to {member}: dimension 0 has"):
            reduction.group_evidence("weight", 0, torch.tensor([[member]]))
    with pytest.raises(PosteriorError, match="no layer 'head'"):
        active({"fc.weight": torch.zeros(2)}, whole=["head"])
    with pytest.raises(PosteriorError, match=r"'fc.weight' is not a number"):
        active({"fc.weight": torch.tensor([math.nan])})


def test_a_surplus_is_the_gain_above_the_odds():
    gains = {"a.weight": torch.tensor([-3.0, 0.5, 2.0]), "b.weight": torch.tensor([1.0])}
    found = surplus(gains, whole=["b"])
    close(found["a.weight"], gains["a.weight"].double() - log_odds(gains["a.weight"]))
    assert found["b.weight"].tolist() == [-math.inf]
    even = surplus(gains, iterations=0)
    assert all(torch.equal(even[name], gains[name].double()) for name in gains)
    kept = {"a.weight": torch.tensor([True, False, True]), "b.weight": torch.tensor([False])}
    gone = surplus(gains, whole=["b"], pruned=kept)
    assert (gone["a.weight"] == math.inf).tolist() == [False, True, False]
    assert gone["b.weight"].tolist() == [math.inf]


@settings(deadline=None, max_examples=60)
@given(
    gains=st.lists(st.tuples(st.integers(-20, 20), st.booleans()), min_size=1, max_size=40),
    limit=st.integers(0, 40),
)
def test_as_much_goes_as_is_allowed_and_the_largest_first(gains, limit):
    """Against trying every threshold."""
    order = {"w": torch.tensor([gain for gain, _ in gains], dtype=torch.float64)}
    proposed = {"w": torch.tensor([stays for _, stays in gains])}
    asked = []

    def allowed(masks):
        asked.append(masks)
        return int((~masks["w"]).sum()) <= limit

    stays = furthest(order, proposed, allowed, steps=20)["w"]
    assert len(asked) <= 21
    tried = [proposed["w"] | (order["w"] < least) for least in order["w"]]
    fits = [mask for mask in tried if int((~mask).sum()) <= limit]
    assert int((~stays).sum()) == max((int((~mask).sum()) for mask in fits), default=0)
    assert stays[proposed["w"]].all()


def test_what_is_gone_stays_gone_whatever_is_allowed():
    order = {"w": torch.tensor([math.inf, 3.0, -1.0]), "v": torch.tensor([5.0])}
    proposed = {"w": torch.tensor([False, False, True]), "v": torch.tensor([True])}
    assert furthest(order, proposed, lambda masks: False)["w"].tolist() == [False, True, True]
    stays = furthest(order, proposed, lambda masks: True)
    assert stays["w"].tolist() == [False, False, True]
    assert stays["v"].tolist() == [True]


def test_fractions_that_masks_remove_by_layer():
    masks = {
        "a.weight": torch.tensor([True, False, False]),
        "a.bias": torch.tensor([False]),
        "head.weight": torch.tensor([True]),
    }
    assert pruned_of(masks) == {"a": 0.75, "head": 0.0}
