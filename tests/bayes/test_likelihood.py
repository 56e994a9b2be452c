import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import hessian

from spamprune.bayes.likelihood import CLASSIFICATION, Classification, Regression
from spamprune.errors import PosteriorError


@pytest.mark.parametrize("smoothing", [-0.5, 1.0, 1.5, math.nan])
def test_label_smoothing_that_makes_no_sense_is_refused(smoothing):
    with pytest.raises(PosteriorError, match="label_smoothing must be at least 0 and less than 1"):
        Classification(label_smoothing=smoothing)


def dense(ignored=True):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(3, 4, 2, 3, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 4, (3, 2, 3), generator=generator)
    if ignored:
        targets[0, 1, 2] = targets[2] = -100
    return outputs, targets


def plain():
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    return outputs, torch.tensor([0, 2, -100, 1, 1])


def regression(*shape):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, *shape, generator=generator, dtype=torch.float64).unbind(0)


CASES = [
    (Classification(), *plain()),
    (Classification(label_smoothing=0.3), *plain()),
    (Classification(ignore_index=1), *plain()[:1], torch.tensor([0, 1, 2, 1, 0])),
    (Classification(), *dense()),
    (Classification(label_smoothing=0.2), *dense()),
    (Regression(0.3), *regression(4)),
    (Regression(2.0), *regression(4, 3)),
]


@pytest.mark.parametrize(("likelihood", "outputs", "targets"), CASES)
def test_the_roots_make_up_the_hessian_of_each_sample(likelihood, outputs, targets):
    roots = list(likelihood.roots(outputs, targets))
    assert all(root.shape == outputs.shape for root in roots)
    for b in range(len(outputs)):
        size = outputs[b].numel()
        expected = hessian(lambda o, b=b: likelihood.losses(o, targets[b : b + 1])[0])(
            outputs[b : b + 1]
        ).reshape(size, size)
        rows = torch.stack([root[b].flatten() for root in roots])
        torch.testing.assert_close(rows.T @ rows, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("likelihood", "outputs", "targets"), CASES)
def test_the_gradients_of_drawn_losses_have_the_hessian_as_their_covariance(
    likelihood, outputs, targets
):
    generator = torch.Generator().manual_seed(0)
    draws, size = 4000, outputs[0].numel()
    leaf = outputs.clone().requires_grad_()
    gradients = []
    for _ in range(draws):
        losses = likelihood.drawn_losses(leaf, targets, generator)
        gradients.append(torch.autograd.grad(losses.sum(), leaf)[0][0].flatten())
    found = torch.stack(gradients)
    rows = torch.stack([root[0].flatten() for root in likelihood.roots(outputs, targets)])
    covariance = rows.T @ rows
    assert (found.mean(0).abs() <= 5 * (covariance.diagonal() / draws).sqrt() + 1e-12).all()
    products = found[:, :, None] * found[:, None, :]
    error = (products.mean(0) - covariance).abs()
    assert (error <= 5 * products.std(0) / math.sqrt(draws) + 1e-12).all()
    assert covariance.shape == (size, size)


def test_classification_losses_are_sums_over_the_positions_that_count():
    outputs, targets = dense()
    smoothing = 0.1
    logs = outputs.log_softmax(1)
    expected = torch.zeros(3, dtype=torch.float64)
    for b in range(3):
        for i in range(2):
            for j in range(3):
                if targets[b, i, j] != -100:
                    here = logs[b, :, i, j]
                    expected[b] -= (1 - smoothing) * here[
                        targets[b, i, j]
                    ] + smoothing * here.mean()
    torch.testing.assert_close(Classification(smoothing).losses(outputs, targets), expected)
    assert expected[2] == 0


def test_losses_of_half_precision_outputs_are_single():
    outputs, targets = plain()
    assert CLASSIFICATION.losses(outputs.bfloat16(), targets).dtype == torch.float32
    assert Regression().losses(outputs.half(), outputs.half()).dtype == torch.float32


def test_regression_is_the_gaussian_density():
    outputs, targets = regression(6, 2)
    expected = -torch.distributions.Normal(outputs, math.sqrt(0.7)).log_prob(targets).sum(1)
    torch.testing.assert_close(Regression(0.7).losses(outputs, targets), expected)
    flat = Regression(0.7).losses(outputs[:, 0], targets[:, 0])
    column = Regression(0.7).losses(outputs[:, :1], targets[:, :1])
    torch.testing.assert_close(flat, column)


@settings(deadline=None)
@given(
    noise=st.floats(1e-3, 1e3),
    log_ratio=st.floats(-0.5, 0.5).filter(lambda x: abs(x) > 0.01),
)
def test_without_parameters_the_learned_noise_is_the_most_likely_one(noise, log_ratio):
    outputs, targets = regression(20, 2)
    targets = outputs + (targets - outputs) * math.sqrt(noise)
    squares = (outputs - targets).square().sum().item()
    best = Regression().relearned(squares, 40, 0.0)
    assert best.noise == pytest.approx(squares / 40)
    other = Regression(best.noise * math.exp(log_ratio))
    assert best.losses(outputs, targets).sum() < other.losses(outputs, targets).sum()


def test_learned_noise_is_the_unbiased_one_of_least_squares():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    y = x.sum(1) + torch.randn(40, generator=generator, dtype=torch.float64)
    residuals = y - x @ torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    learned = Regression().relearned(residuals.square().sum().item(), 40, 6)
    assert learned.noise == pytest.approx(residuals.square().sum().item() / 34)


@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets", "message"),
    [
        (Classification(), torch.zeros(2, 3), torch.zeros(2, 3), "soft targets"),
        (Classification(), torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), "do not fit"),
        (Classification(), torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.long), "do not fit"),
        (Classification(), torch.zeros(2), torch.zeros(2, dtype=torch.long), "do not fit"),
        (Classification(), torch.zeros(2, 1), torch.zeros(2, dtype=torch.long), "two outputs"),
        (Regression(), torch.zeros(2, 1), torch.zeros(2), "squeeze"),
    ],
)
def test_targets_that_do_not_fit_are_refused(likelihood, outputs, targets, message):
    with pytest.raises(PosteriorError, match=message):
        likelihood.losses(outputs, targets)
    with pytest.raises(PosteriorError, match=message):
        likelihood.drawn_losses(outputs, targets, torch.Generator())
    with pytest.raises(PosteriorError, match=message):
        next(likelihood.roots(outputs, targets))


def test_noise_that_cannot_be_is_refused():
    for noise in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(PosteriorError, match="positive"):
            Regression(noise)
    with pytest.raises(PosteriorError, match="cannot be learned"):
        Regression().relearned(3.0, 10, 10.0)
    with pytest.raises(PosteriorError, match="cannot be learned"):
        Regression().relearned(0.0, 10, 1.0)
