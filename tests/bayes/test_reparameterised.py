"""Tests against autograd through the plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spamprune.bayes import reparameterised


@pytest.fixture
def parts() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    mean, spread = torch.randn(2, 3, 4, dtype=torch.float64)
    return mean.requires_grad_(), spread.requires_grad_(), torch.rand(3, 4) < 0.7


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (3, 4)])
def test_draws_and_their_gradients_are_those_of_the_formula(
    parts: tuple[Tensor, Tensor, Tensor], shape: tuple[int, ...]
) -> None:
    mean, spread, mask = parts
    scale = torch.rand(shape, dtype=torch.float64).requires_grad_()
    up = torch.randn(2, 3, 4, dtype=torch.float64)

    torch.manual_seed(1)
    centre, deviation = reparameterised.draw(mean, spread, scale, mask)
    found = torch.autograd.grad((centre * up[0] + deviation * up[1]).sum(), (mean, spread, scale))

    torch.manual_seed(1)
    noise = torch.randn_like(spread)
    plain = scale * mean * mask, scale * F.softplus(spread) * noise * mask
    wanted = torch.autograd.grad((plain[0] * up[0] + plain[1] * up[1]).sum(), (mean, spread, scale))
    torch.testing.assert_close((centre, deviation), plain)
    torch.testing.assert_close(found, wanted)


def test_the_divergence_and_its_gradients_are_those_of_torchs(
    parts: tuple[Tensor, Tensor, Tensor],
) -> None:
    mean, spread, mask = parts
    total = reparameterised.divergence(mean, spread, mask)
    found = torch.autograd.grad(3 * total, (mean, spread))
    posterior = torch.distributions.Normal(mean, F.softplus(spread))
    prior = torch.distributions.Normal(0.0, 1.0)
    plain = torch.distributions.kl_divergence(posterior, prior)[mask].sum()
    torch.testing.assert_close(total, plain)
    torch.testing.assert_close(found, torch.autograd.grad(3 * plain, (mean, spread)))


def test_nothing_the_size_of_the_parameters_is_kept_but_the_noise(
    parts: tuple[Tensor, Tensor, Tensor],
) -> None:
    mean, spread, mask = parts
    there = {t.data_ptr() for t in (mean, spread, mask)}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in there:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        reparameterised.draw(mean, spread, torch.ones(1, dtype=torch.float64), mask)
        reparameterised.divergence(mean, spread, mask)
    assert kept == [1, mean.numel()]  # the scale and the noise
