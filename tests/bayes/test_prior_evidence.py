import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spamprune.bayes import evidence
from spamprune.bayes.curvature import Curvature
from spamprune.bayes.parameters import named_parameters
from spamprune.bayes.prior import Prior
from spamprune.errors import PosteriorError

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


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_adam_steps_climb_along_the_true_gradient(structure, temperature):
    """One Adam step moves each factor by lr in the sign of the autograd gradient."""
    model = network()
    prior, curved = Prior(model, structure, 0.5), curvature(model)
    leaves = [f.clone().double().requires_grad_() for f in prior.factors()]
    probe = Prior(model, structure, 0.5)
    if structure == "scalar":
        logs = {n: leaves[0].expand(p.shape) for n, p in model.named_parameters()}
    else:
        rest = iter(leaves)
        logs = {n: sum(next(rest) for _ in fs) for n, fs in probe.log_factors.items()}
    total = sum(
        -0.5
        * (
            log.exp() * model.get_parameter(n).detach().double() ** 2
            + (curved.diag[n].double() / temperature + log.exp()).log()
            - log
        ).sum()
        for n, log in logs.items()
    )
    gradients = torch.autograd.grad(total, leaves)
    before = [f.clone() for f in prior.factors()]
    evidence.ascend(
        prior, named_parameters(model), curved, steps=1, lr=0.1, temperature=temperature
    )
    for old, new, gradient in zip(before, prior.factors(), gradients, strict=True):
        clear = gradient.abs() > 1e-3
        moved = (new - old).double()
        torch.testing.assert_close(moved[clear], 0.1 * gradient.sign()[clear], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_adam_steps_raise_the_evidence(structure):
    model = network()
    prior, curved = Prior(model, structure), curvature(model)
    parameters = named_parameters(model)
    before = evidence.log_evidence(parameters, curved, prior.precision())
    evidence.ascend(prior, parameters, curved, steps=100)
    assert evidence.log_evidence(parameters, curved, prior.precision()) > before + 1


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


def test_weights_at_zero_and_zero_curvature_stay_finite():
    model = network()
    with torch.no_grad():
        model[0].weight.zero_()
    curved = curvature(model)
    curved.diag["2.weight"].zero_()
    prior = Prior(model, "parameterwise")
    evidence.maximise(prior, named_parameters(model), curved)
    assert all(d.isfinite().all() for d in prior.precision().values())


def test_misuse_is_refused():
    model = network()
    with pytest.raises(PosteriorError, match="unknown prior structure 'unit'"):
        Prior(model, "unit")
    with pytest.raises(PosteriorError, match="positive"):
        Prior(model, "scalar", 0.0)
    with pytest.raises(PosteriorError, match="parameterwise"):
        evidence.maximise(Prior(model, "scalar"), named_parameters(model), curvature(model))
    with pytest.raises(PosteriorError, match="another model"):
        Prior(model, "unitwise").load_state_dict(Prior(model, "layerwise").state_dict())
