import importlib

import pytest
import torch
from torch import nn

from spamprune.bayes.curvature import CurvatureMethod
from spamprune.bayes.curvature.preflight import Preflight, preflight
from spamprune.bayes.likelihood import Regression
from spamprune.errors import PosteriorError

# the package's name for it is the function's
MODULE = importlib.import_module("spamprune.bayes.curvature.preflight")


def network(width=64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, width, 3, padding=1, groups=2),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.Flatten(),
        nn.Linear(width * 64, 10),
    )


def batches(n=64, size=32):
    inputs, targets = torch.randn(n, 4, 8, 8), torch.randint(0, 10, (n,))
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def test_the_line_reads_well():
    assert (
        str(Preflight("sketch", 60_000, 9.2, 1_210_000, 35_400_000))
        == "sketch of 60 000 samples: about 9.2 s, 1.2 MB beside activations of 35 MB"
    )
    long = Preflight("exact", 1_281_167, 9000.0, 999, 12_000_000_000)
    assert str(long) == "exact of 1 281 167 samples: about 2.5 h, 999 B beside activations of 12 GB"
    assert "about 3.3 min, 86 kB" in str(Preflight("exact", 1, 200.0, 86_000, 1))


@pytest.fixture
def one_second_forward_two_backward(monkeypatch):
    def measured(model, likelihood, inputs, targets):
        return 1.0, 2.0, model(inputs)[0].numel()

    monkeypatch.setattr(MODULE, "_gradient_pass", measured)


@pytest.mark.parametrize(
    ("method", "backward"),
    [
        (CurvatureMethod(), 1),
        (CurvatureMethod(draws=10), 10),
        (CurvatureMethod(labels="ggn"), 1),
        (CurvatureMethod(labels="ggn", estimator="exact"), 10),
        (CurvatureMethod(labels="ggn", estimator="exact", draws=3), 3),
        (CurvatureMethod(structure="kron"), 1),
    ],
)
def test_backward_passes_multiply(one_second_forward_two_backward, method, backward):
    kind = "kron" if method.structure == "kron" else method.chosen
    factor = MODULE._BACKWARD[kind]
    told = preflight(network(), batches(), n_data=10_000, curvature=method)
    assert told.seconds == pytest.approx((1 + backward * factor * 2) / 8 * 10_000)


def test_samples_count_and_the_estimate_is_linear_in_them(one_second_forward_two_backward):
    part = preflight(network(), batches(), n_data=10_000, curvature=CurvatureMethod(samples=500))
    assert part.samples == 500
    whole = preflight(network(), batches(), n_data=10_000)
    assert whole.seconds == pytest.approx(20 * part.seconds)


def test_time_is_really_measured():
    assert 0 < preflight(network(8), batches(), n_data=64).seconds < 600


def test_memory_is_counted():
    width = 64
    model = network(width)
    parameters = sum(p.numel() for p in model.parameters())
    told = preflight(model, batches(), n_data=64)
    assert told.bytes == 8 * parameters
    # the inputs of BatchNorm, of the second convolution and of the last layer
    assert told.activations == pytest.approx(32 * 4 * 3 * width * 64, rel=0.02)
    factors = 2 * (18**2 + 32**2) + (9 * width) ** 2 + width**2 + (64 * width) ** 2 + 10**2
    kron = preflight(model, batches(), n_data=64, curvature=CurvatureMethod(structure="kron"))
    assert kron.bytes == told.bytes + 4 * factors
    assert str(kron).startswith("Kronecker factors of 64 samples")
    model[5].weight.requires_grad_(False)
    frozen = preflight(model, batches(), n_data=64, curvature=CurvatureMethod(structure="kron"))
    assert frozen.bytes < kron.bytes - 4 * (64 * width) ** 2


def test_the_model_is_left_alone():
    model = network().train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    running = model[1].running_mean.clone()
    preflight(model, batches(), n_data=64)
    assert model.training
    assert (model[0].weight.grad == 1).all()
    assert torch.equal(model[1].running_mean, running)


def test_regression_counts_its_outputs():
    model = nn.Linear(3, 2)
    parts = [(torch.randn(4, 3), torch.randn(4, 2))]
    method = CurvatureMethod(labels="ggn", estimator="exact")
    told = preflight(model, parts, n_data=4, curvature=method, likelihood=Regression())
    assert told.seconds > 0


def test_no_data_and_coupled_samples_are_refused():
    with pytest.raises(PosteriorError, match="no batches"):
        preflight(network(), [], n_data=64)
    model = network()
    model[1] = nn.BatchNorm2d(64, track_running_stats=False)
    with pytest.raises(PosteriorError, match="BatchNorm2d"):
        preflight(model, batches(), n_data=64)
