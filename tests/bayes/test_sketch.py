import math
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spamprune.bayes.curvature import sketch
from spamprune.bayes.curvature.sketch import _signs
from spamprune.bayes.likelihood import Classification, Regression
from spamprune.errors import PosteriorError
from tests.bayes import reference


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(48, 4),
    ).double()


def test_a_network_of_large_tensors_alone():
    """Their gradients are taken as they come, and nothing is left to take together."""
    torch.manual_seed(0)
    model, loader = nn.Linear(2048, 1024, bias=False), [(torch.randn(4, 2048), torch.arange(4))]
    assert model.weight.numel() > import_module("spamprune.bayes.curvature.sketch")._SMALL
    found = sketch(model, loader, n_data=4, group=1)  # of single samples squares are exact
    squares = sum(
        torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), model.weight)[0].square()
        for x, y in zip(*loader[0], strict=True)
    )
    assert torch.allclose(found.diag["weight"], squares, rtol=1e-4, atol=1e-12)


def data(n=24):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(n, 1, 6, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 4, (n,), generator=generator)


def batches(inputs, targets, size):
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def test_one_sample_a_batch_is_the_exact_empirical_fisher():
    model, (inputs, targets) = small_network(), data()
    got = sketch(model, batches(inputs, targets, 1), n_data=len(inputs))
    expected = reference.squared(model.eval(), inputs, targets)
    assert set(got.diag) == set(expected)
    for name, diag in expected.items():
        torch.testing.assert_close(got.diag[name], diag)
    assert set(got.error.values()) == {0.0}
    assert set(got.how.values()) == {"sketch"}


@pytest.mark.parametrize("labels", ["ef", "ggn"])
def test_the_mean_of_many_sketches_is_the_exact_diagonal(labels):
    model, (inputs, targets) = small_network(), data()
    draws = 1000
    found = [
        sketch(model, batches(inputs, targets, 8), n_data=len(inputs), labels=labels, seed=s).diag
        for s in range(draws)
    ]
    model.eval()
    exact = (
        reference.squared(model, inputs, targets)
        if labels == "ef"
        else reference.gauss_newton(model, inputs)
    )
    outside = total = 0
    for name, truth in exact.items():
        values = torch.stack([f[name].double() for f in found])
        error = (values.mean(0) - truth).abs()
        allowed = 4 * values.std(0) / draws**0.5 + 1e-6 * truth + 1e-12
        outside += int((error > allowed).sum())
        total += truth.numel()
    assert outside <= 0.005 * total


def test_the_relative_error_is_within_the_stated_bound():
    model, (inputs, targets) = small_network(), data()
    exact = reference.squared(model.eval(), inputs, targets)["5.weight"]
    parts = batches(inputs, targets, 8)
    values = torch.stack(
        [sketch(model, parts, n_data=24, seed=s).diag["5.weight"].double() for s in range(300)]
    )
    squares = torch.stack([reference.squared(model, x, y)["5.weight"] for x, y in parts])
    bound = (2 * squares.square().sum(0)).sqrt()  # each batch: variance at most 2 (Σ g²)²
    assert (exact > 0).any()
    assert (values.std(0) <= 1.25 * bound + 1e-12).all()


def test_modes_gradients_and_random_state_are_left_alone():
    model, (inputs, targets) = small_network(), data()
    model.train()
    model[1].eval()
    model[5].weight.grad = torch.ones_like(model[5].weight)
    running = model[1].running_mean.clone()
    state = torch.get_rng_state()
    sketch(model, batches(inputs, targets, 8), n_data=24)
    assert [m.training for m in (model, model[3], model[1])] == [True, True, False]
    assert (model[5].weight.grad == 1).all()
    assert torch.equal(model[1].running_mean, running)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_fraction_of_the_data_is_scaled_to_all_of_it():
    model, (inputs, targets) = small_network(), data()
    part = sketch(model, batches(inputs[:8], targets[:8], 8), n_data=8, seed=3)
    scaled = sketch(model, batches(inputs, targets, 8), n_data=24, samples=8, seed=3)
    assert scaled.loss == pytest.approx(3 * part.loss)
    for name in part.diag:
        torch.testing.assert_close(scaled.diag[name], 3 * part.diag[name])


def test_frozen_parameters_are_left_out():
    model, (inputs, targets) = small_network(), data()
    model[0].weight.requires_grad_(False)
    assert "0.weight" not in sketch(model, batches(inputs, targets, 8), n_data=24).diag


def test_no_data_and_infinite_losses_are_refused():
    model, (inputs, targets) = small_network(), data()
    with pytest.raises(PosteriorError, match="no batches"):
        sketch(model, [], n_data=24)
    for labels in ("ef", "ggn"):
        with pytest.raises(PosteriorError, match="loss is nan"):
            sketch(model, batches(inputs * float("nan"), targets, 8), n_data=24, labels=labels)


def test_groups_of_one_are_the_exact_empirical_fisher():
    model, (inputs, targets) = small_network(), data()
    got = sketch(model, batches(inputs, targets, 8), n_data=24, group=1)
    expected = reference.squared(model.eval(), inputs, targets)
    for name, diag in expected.items():
        torch.testing.assert_close(got.diag[name], diag)


@given(size=st.integers(1, 70), draws=st.integers(1, 80), seed=st.integers(0, 9))
@settings(deadline=None)
def test_sign_vectors_are_orthogonal_over_the_whole_matrix(size, draws, seed):
    signs = _signs(size, draws, torch.Generator().manual_seed(seed)).double()
    order = 2 ** math.ceil(math.log2(size))
    assert signs.shape == (min(draws, order), size)
    assert (signs.abs() == 1).all()
    if draws >= order:
        torch.testing.assert_close(signs.T @ signs / order, torch.eye(size, dtype=torch.float64))
    if size == order:
        eye = torch.eye(len(signs), dtype=torch.float64)
        torch.testing.assert_close(signs @ signs.T / order, eye)


@pytest.mark.parametrize("size", [8, 6])
def test_as_many_draws_as_samples_are_the_exact_empirical_fisher(size):
    model, (inputs, targets) = small_network(), data()
    got = sketch(model, batches(inputs, targets, size), n_data=24, draws=8)
    expected = reference.squared(model.eval(), inputs, targets)
    for name, diag in expected.items():
        torch.testing.assert_close(got.diag[name], diag)
    assert set(got.error.values()) == {0.0}


def gradient_sketches(draws, count=6000):
    """Return true sums of squares and many sketches of 12 fixed gradients."""
    generator = torch.Generator().manual_seed(3)
    gradients = torch.randn(12, 5, generator=generator, dtype=torch.float64).pow(3)
    signs = torch.stack([_signs(12, draws, generator).double() for _ in range(count)])
    return gradients, (signs @ gradients).square().mean(1)


@pytest.mark.parametrize("draws", [1, 2, 5, 12])
def test_mean_and_variance_of_draws_are_the_stated_ones(draws):
    gradients, values = gradient_sketches(draws)
    truth, order = gradients.square().sum(0), 16
    stated = 2 * (truth.square() - gradients.pow(4).sum(0)) * (order - draws)
    stated /= draws * (order - 1)
    assert ((values.mean(0) - truth).abs() <= 5 * (stated / len(values)).sqrt()).all()
    assert (values.var(0) / stated - 1).abs().max() < 0.15


def test_orthogonal_draws_and_small_groups_reduce_the_error():
    model, (inputs, targets) = small_network(), data()
    exact = reference.squared(model.eval(), inputs, targets)["5.weight"]

    def error(**arguments):
        parts = batches(inputs, targets, 8)
        found = [
            sketch(model, parts, n_data=24, seed=s, **arguments).diag["5.weight"] - exact
            for s in range(40)
        ]
        return torch.stack(found).square().mean().item()

    plain = error()
    assert error(draws=4) < 0.4 * plain  # (8 − 4) / (4 (8 − 1)) of it, and chance
    assert error(group=4) < 0.9 * plain


@pytest.mark.parametrize(
    ("arguments", "excess"),
    [
        ({"labels": "ef"}, 1.6),
        ({"labels": "ef", "group": 3}, 2.7),  # most gradients vanish: one sample makes a square
        ({"labels": "ef", "draws": 3}, 1.6),
        ({"labels": "ggn"}, 1.6),
        ({"labels": "ggn", "draws": 4}, 1.6),
    ],
)
def test_the_error_estimate_is_about_the_true_error(arguments, excess):
    model, (inputs, targets) = small_network(), data(96)
    model.eval()
    exact = (
        reference.squared(model, inputs, targets)
        if arguments["labels"] == "ef"
        else reference.gauss_newton(model, inputs)
    )
    parts = batches(inputs, targets, 12)
    found = [sketch(model, parts, n_data=96, seed=s, **arguments) for s in range(40)]
    for name, truth in exact.items():
        errors = torch.stack([f.diag[name] - truth for f in found])
        true = errors.square().mean().sqrt() / truth.square().mean().sqrt()
        estimates = torch.tensor([f.error[name] for f in found])
        stated = estimates.square().mean().sqrt()
        assert 0.7 < stated / true < excess, name


def test_draws_of_labels_are_independent_and_unbiased():
    model, (inputs, targets) = small_network(), data()
    exact = reference.gauss_newton(model.eval(), inputs)["0.weight"]
    parts = batches(inputs, targets, 8)
    values = torch.stack(
        [
            sketch(model, parts, n_data=24, labels="ggn", draws=3, seed=s).diag["0.weight"]
            for s in range(150)
        ]
    )
    error = (values.mean(0) - exact).abs()
    assert (error <= 4.5 * values.std(0) / 150**0.5).all()


class Segmenter(nn.Module):
    """Gives dense outputs (B, C, H, W); its last parameter takes no part."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(1, 3, 3)
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.body(x)


def dense_case():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(4)
    model = Segmenter().double()
    inputs = torch.randn(6, 1, 4, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 3, (6, 2, 3), generator=generator)
    targets[0, 1] = targets[3] = -100
    return model, inputs, targets, Classification(label_smoothing=0.2)


def regression_case():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    targets = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    return model, inputs, targets, Regression(0.4)


@pytest.mark.parametrize("case", [dense_case, regression_case])
def test_other_likelihoods(case):
    model, inputs, targets, likelihood = case()
    used = [n for n, _ in model.named_parameters() if n != "idle"]

    def loss_of(outputs, targets):
        return likelihood.losses(outputs, targets).sum()

    exact = reference.squared(model, inputs, targets, loss_of)
    got = sketch(model, [(inputs, targets)], n_data=6, group=1, likelihood=likelihood)
    for name in used:
        torch.testing.assert_close(got.diag[name], exact[name])
    newton = reference.gauss_newton_by_hessians(model, inputs, targets, loss_of)
    values = [
        sketch(
            model, [(inputs, targets)], n_data=6, labels="ggn", likelihood=likelihood, seed=s
        ).diag
        for s in range(300)
    ]
    for name in used:
        found = torch.stack([v[name] for v in values])
        error = (found.mean(0) - newton[name]).abs()
        assert (error <= 4.5 * found.std(0) / 300**0.5).all()


def test_a_parameter_that_the_loss_does_not_use_is_told():
    model, inputs, targets, likelihood = dense_case()
    got = sketch(model, [(inputs, targets)], n_data=6, likelihood=likelihood)
    assert got.how["idle"] == "sketch: not used by the loss"
    assert got.how["body.weight"] == "sketch"
    assert got.error["idle"] == 0.0
    assert (got.diag["idle"] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_accumulate_in_single(dtype):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(6)
    model = nn.Linear(4, 3).to(dtype)
    inputs = (1e-3 * torch.randn(512, 4, generator=generator)).to(dtype)
    targets = torch.randint(0, 3, (512,), generator=generator)
    got = sketch(model, [(inputs, targets)], n_data=512, group=1)
    assert {d.dtype for d in got.diag.values()} == {torch.float32}
    double = nn.Linear(4, 3).double()
    double.load_state_dict(model.state_dict())
    expected = reference.squared(double, inputs.double(), targets)
    for name, diag in expected.items():  # squares near 1e-7: half precision would lose them
        torch.testing.assert_close(got.diag[name].double(), diag, rtol=0.02, atol=0)


def test_seeds_tell_passes_apart_and_repeat_them():
    model, (inputs, targets) = small_network(), data()
    parts = batches(inputs, targets, 8)
    a, b, c = (sketch(model, parts, n_data=24, seed=s).diag["5.weight"] for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_gradients_that_overflow_and_no_draws_are_refused():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return x * self.scale.sqrt()

    parts = [(torch.ones(4, 3), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(PosteriorError, match="scale overflows"):
        sketch(Root(), parts, n_data=4)
    with pytest.raises(PosteriorError, match="draws must be at least 1"):
        sketch(nn.Linear(3, 2), parts, n_data=4, draws=0)


def test_a_layer_whose_squared_gradients_underflow_is_all_error():
    torch.manual_seed(0)
    dead = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.no_grad():
        dead[1].weight.mul_(1e-25)  # as collapsed layers have
    parts = [(torch.randn(8, 3), torch.arange(8) % 2)]
    got = sketch(dead, parts, n_data=8)
    assert not got.diag["0.weight"].any()
    assert got.error["0.weight"] == 1.0
