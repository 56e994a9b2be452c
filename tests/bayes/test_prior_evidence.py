import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spamprune.bayes import evidence
from spamprune.bayes.curvature import Curvature
from spamprune.bayes.curvature.blocks import Kronecker
from spamprune.bayes.parameters import named_parameters
from spamprune.bayes.prior import Prior
from spamprune.errors import PosteriorError
from tests.bayes import reference

STRUCTURES = ["scalar", "layerwise", "unitwise", "parameterwise"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4))


def curvature(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    diag = {
        n: torch.rand(p.shape, generator=generator) * 50 for n, p in named_parameters(model).items()
    }
    return Curvature(diag, loss=12.5, n_data=100, labels="ef", estimator="sketch")


def mixed(model):
    """Kronecker factors for the linear layer, a diagonal for the convolution's weight alone."""
    generator = torch.Generator().manual_seed(1)
    rows, columns = torch.randn(2, 4, 9, generator=generator), torch.randn(1, 12, 20)
    outputs, bias = (rows @ rows.mT).split(1)
    kron = {
        "2.weight": Kronecker(outputs, columns @ columns.mT / 20, (4, 12)),
        "2.bias": Kronecker(bias, None, (4,)),
    }
    diag = {"0.weight": curvature(model).diag["0.weight"]}
    diag |= {name: block.diag for name, block in kron.items()}
    return Curvature(diag, loss=12.5, n_data=100, labels="ef", estimator="kron", kron=kron)


CURVATURES = [curvature, mixed]


def leaves_of(prior, model):
    """Return differentiable float64 copies of the free factors, and log δ by name from them."""
    leaves = [f.clone().double().requires_grad_() for f in prior.factors()]
    if prior.structure == "scalar":
        return leaves, {n: leaves[0].expand(p.shape) for n, p in model.named_parameters()}
    rest = iter(leaves)
    logs = {n: sum(next(rest) for _ in fs) for n, fs in prior.log_factors.items()}
    return leaves, {n: log.expand(model.get_parameter(n).shape) for n, log in logs.items()}


def gradients_of(prior, model, curved, temperature):
    """Return the gradient of the evidence in each free factor, by autograd; 0 where unused."""
    leaves, logs = leaves_of(prior, model)
    total = reference.log_evidence(named_parameters(model), curved, logs, temperature)
    return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_parameter_starts_at_the_given_precision(structure):
    model = network()
    precision = Prior(model, structure, 0.3).precision()
    for name, parameter in named_parameters(model).items():
        assert precision[name].shape == parameter.shape
        torch.testing.assert_close(precision[name], torch.full(parameter.shape, 0.3))


def test_the_numbers_of_free_precisions():
    model = network()
    free = {s: sum(f.numel() for f in Prior(model, s).factors()) for s in STRUCTURES}
    everything = sum(p.numel() for p in model.parameters())
    # unitwise: outputs + inputs of each weight, and each bias of its own
    assert free == {
        "scalar": 1,
        "layerwise": 4,
        "unitwise": (3 + 2) + 3 + (4 + 12) + 4,
        "parameterwise": everything,
    }


def test_unitwise_log_precisions_add_up_and_are_shared_over_the_kernel():
    prior = Prior(network(), "unitwise")
    out, inp = prior.log_factors["0.weight"]
    out += torch.arange(3.0).view(3, 1, 1, 1)
    inp += 10 * torch.arange(2.0).view(1, 2, 1, 1)
    log_delta = prior.precision()["0.weight"].log()
    for o in range(3):
        for i in range(2):
            torch.testing.assert_close(log_delta[o, i], torch.full((3, 3), o + 10.0 * i))


def test_log_evidence_against_the_formula_written_out():
    model = network()
    prior, curved, temperature = Prior(model, "unitwise", 0.7), curvature(model), 2.0
    total = -curved.loss / temperature
    for name, p in model.named_parameters():
        for theta, h in zip(
            p.flatten().tolist(), curved.diag[name].flatten().tolist(), strict=True
        ):
            posterior = h / temperature + 0.7
            total -= 0.5 * (0.7 * theta**2 + math.log(posterior) - math.log(0.7))
    got = evidence.log_evidence(named_parameters(model), curved, prior.precision(), temperature)
    assert got == pytest.approx(total, rel=1e-6)


def test_log_evidence_of_kronecker_factors_among_diagonals():
    model = network()
    curved, prior = mixed(model), Prior(model, "unitwise")
    for factor in prior.factors():
        factor.copy_(torch.randn_like(factor))
    _, logs = leaves_of(prior, model)
    parameters = named_parameters(model)
    expected = reference.log_evidence(parameters, curved, logs, 2.0).item()
    got = evidence.log_evidence(parameters, curved, prior.precision(), 2.0)
    assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("curved", CURVATURES)
@pytest.mark.parametrize("part", [5, 10**6])
def test_adam_steps_are_those_along_the_true_gradient(
    structure, temperature, curved, part, monkeypatch
):
    monkeypatch.setattr(evidence, "_PART", part)
    model = network()
    curved = curved(model)
    expected, prior = Prior(model, structure, 0.5), Prior(model, structure, 0.5)
    adam = torch.optim.Adam(expected.factors(), lr=0.1, maximize=True, fused=False, foreach=False)
    for _ in range(8):
        gradients = gradients_of(expected, model, curved, temperature)
        for factor, gradient in zip(expected.factors(), gradients, strict=True):
            factor.grad = gradient.float() / curved.n_data
        adam.step()
    evidence.ascend(
        prior, named_parameters(model), curved, steps=8, lr=0.1, temperature=temperature
    )
    for got, factor in zip(prior.factors(), expected.factors(), strict=True):
        torch.testing.assert_close(got, factor, rtol=1e-4, atol=2e-4)
        assert got.grad is None


@pytest.mark.parametrize("structure", STRUCTURES)
def test_adam_steps_raise_the_evidence(structure):
    model = network()
    prior, curved = Prior(model, structure), curvature(model)
    parameters = named_parameters(model)
    before = evidence.log_evidence(parameters, curved, prior.precision())
    evidence.ascend(prior, parameters, curved, steps=100)
    assert evidence.log_evidence(parameters, curved, prior.precision()) > before + 1


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("curved", CURVATURES)
def test_mackay_steps_reach_a_stationary_point_that_adam_does_not_beat(structure, curved):
    model = network()
    curved, parameters = curved(model), named_parameters(model)
    prior, rival = Prior(model, structure), Prior(model, structure)
    evidence.mackay(prior, parameters, curved, steps=100, temperature=2.0)
    for gradient in gradients_of(prior, model, curved, 2.0):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=3e-4)
    evidence.ascend(rival, parameters, curved, steps=1000, temperature=2.0)
    reached, rivals = (
        evidence.log_evidence(parameters, curved, p.precision(), 2.0) for p in (prior, rival)
    )
    assert reached > rivals - 1e-3


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 999),
    structure=st.sampled_from(STRUCTURES),
    start=st.floats(1e-4, 1e4),
    temperature=st.floats(1e-4, 1e4),
    curved=st.sampled_from(CURVATURES),
)
def test_no_mackay_step_lowers_the_evidence(seed, structure, start, temperature, curved):
    model = network()
    curved, parameters = curved(model), named_parameters(model)
    prior, generator = Prior(model, structure, start), torch.Generator().manual_seed(seed)
    for factor in prior.factors():
        factor.add_(torch.randn(factor.shape, generator=generator), alpha=3)
    curved = replace(curved, loss=0.0)
    last = evidence.log_evidence(parameters, curved, prior.precision(), temperature)
    for _ in range(6):
        evidence.mackay(prior, parameters, curved, steps=1, temperature=temperature)
        now = evidence.log_evidence(parameters, curved, prior.precision(), temperature)
        assert now >= last - 1e-4 - 1e-6 * abs(last)  # float32 sums
        last = now


@pytest.mark.parametrize("structure", ["layerwise", "unitwise", "parameterwise"])
@pytest.mark.parametrize("rule", [evidence.ascend, evidence.mackay])
def test_what_the_curvature_leaves_out_keeps_its_prior(structure, rule):
    model = network()
    prior, curved = Prior(model, structure, 0.3), mixed(model)
    rule(prior, named_parameters(model), curved, steps=3)
    precision = prior.precision()
    assert "0.bias" not in curved.diag
    torch.testing.assert_close(precision["0.bias"], torch.full((3,), 0.3))
    assert not torch.allclose(precision["0.weight"], torch.tensor(0.3))
    assert not torch.allclose(precision["2.weight"], torch.tensor(0.3))


@pytest.mark.parametrize("rule", [evidence.ascend, evidence.mackay])
def test_a_scalar_prior_is_tuned_by_what_is_covered(rule):
    """A covered part of the model gives the scalar that it would give on its own."""
    model = network()
    parameters, curved = named_parameters(model), curvature(model)
    del curved.diag["2.weight"], curved.diag["2.bias"]
    prior, alone = Prior(model, "scalar"), Prior(nn.Sequential(model[0]), "scalar")
    rule(prior, parameters, curved, steps=5)
    rule(alone, named_parameters(nn.Sequential(model[0])), curved, steps=5)
    torch.testing.assert_close(prior.factors(), alone.factors())
    assert prior.factors()[0] != 0
    empty = Curvature({}, 0.0, 100, "ef", "exact")
    before = prior.factors()[0].clone()
    rule(prior, parameters, empty, steps=5)
    assert torch.equal(prior.factors()[0], before)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("rule", [evidence.ascend, evidence.mackay])
def test_parameters_of_no_dimension_and_of_double_precision(structure, rule):
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    model.single = nn.Parameter(torch.full((1, 1), 0.5, dtype=torch.float64))
    parameters = named_parameters(model)
    curved = Curvature({n: torch.full_like(p, 3.0) for n, p in parameters.items()}, 0, 9, "ef", "x")
    prior = Prior(model, structure)
    rule(prior, parameters, curved, steps=200)
    # the root of θ²δ² + θ²hδ − h = 0 for θ = ½, h = 3
    expected = 0.5 * (math.sqrt(9 + 48) - 3)
    for delta in prior.precision().values():
        assert delta.item() == pytest.approx(expected, rel=1e-3)


@given(
    theta=st.floats(1e-9, 10),
    h=st.floats(1e-18, 1e8),
    temperature=st.floats(0.1, 10),
)
def test_the_exact_update_is_the_root_of_the_gradient(theta, h, temperature):
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(theta)
    prior = Prior(model, "parameterwise")
    curved = Curvature({"weight": torch.full((1, 1), h)}, 0.0, 10, "ef", "sketch")
    evidence.maximise(prior, named_parameters(model), curved, temperature=temperature)
    delta = prior.precision()["weight"].double().item()
    low, high = (math.exp(x) for x in evidence.LOG_PRECISION_RANGE)
    square, scaled = float(model.weight.item()) ** 2, h / temperature
    if low * 1.01 < delta < high * 0.99:
        root = 0.5 * (-scaled + math.sqrt(scaled**2 + 4 * scaled / square))
        # the textbook form cancels for large hθ²; its limit there is 1/θ²
        expected = root if scaled * square < 1e6 else 1 / square
        assert delta == pytest.approx(expected, rel=1e-4)


def test_the_exact_update_beats_what_surrounds_it():
    model = network()
    parameters, curved = named_parameters(model), curvature(model)
    prior = Prior(model, "parameterwise")
    evidence.maximise(prior, parameters, curved)
    best = evidence.log_evidence(parameters, curved, prior.precision())
    for shift in (-0.1, 0.1):
        moved = {n: d * math.exp(shift) for n, d in prior.precision().items()}
        assert evidence.log_evidence(parameters, curved, moved) < best


def test_damping_averages_log_precisions():
    model = network()
    parameters, curved = named_parameters(model), curvature(model)
    full, half = Prior(model, "parameterwise"), Prior(model, "parameterwise")
    evidence.maximise(full, parameters, curved)
    evidence.maximise(half, parameters, curved, damping=0.5)
    for name in parameters:
        torch.testing.assert_close(half.log_factors[name][0], full.log_factors[name][0] / 2)


@pytest.mark.parametrize("rule", ["maximise", "mackay", "ascend"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_weights_at_zero_and_zero_curvature_stay_finite(rule, structure):
    if rule == "maximise" and structure != "parameterwise":
        return
    model = network()
    with torch.no_grad():
        model[0].weight.zero_()
    curved = curvature(model)
    curved.diag["2.weight"].zero_()
    prior = Prior(model, structure)
    steps = {} if rule == "maximise" else {"steps": 200}
    getattr(evidence, rule)(prior, named_parameters(model), curved, **steps)
    assert all(d.isfinite().all() for d in prior.precision().values())
    if rule != "ascend" and structure in ("layerwise", "parameterwise"):
        # nothing holds a weight at zero back, nothing but θ² itself one without curvature
        assert prior.precision()["0.weight"].min() > 1e5
        assert prior.precision()["2.weight"].max() < 1


def test_misuse_is_refused():
    model = network()
    with pytest.raises(PosteriorError, match="unknown prior structure 'unit'"):
        Prior(model, "unit")
    with pytest.raises(PosteriorError, match="positive"):
        Prior(model, "scalar", 0.0)
    with pytest.raises(PosteriorError, match="parameterwise"):
        evidence.maximise(Prior(model, "scalar"), named_parameters(model), curvature(model))
    with pytest.raises(PosteriorError, match=r"diagonal curvature.*2\.weight, 2\.bias.*'adam'"):
        evidence.maximise(Prior(model, "parameterwise"), named_parameters(model), mixed(model))
    with pytest.raises(PosteriorError, match="another model"):
        Prior(model, "unitwise").load_state_dict(Prior(model, "layerwise").state_dict())
