import pytest
import torch
from torch import nn

from spamprune.bayes.curvature import sketch
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
        torch.testing.assert_close(got.diag[name].double(), diag, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("labels", ["ef", "ggn"])
def test_the_mean_of_many_sketches_is_the_exact_diagonal(labels):
    model, (inputs, targets) = small_network(), data()
    draws = 400
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
    with pytest.raises(PosteriorError, match="loss is nan"):
        sketch(model, batches(inputs * float("nan"), targets, 8), n_data=24)
