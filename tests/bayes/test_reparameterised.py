"""Tests against autograd through the plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spamprune.bayes import reparameterised
from spamprune.bayes.reparameterised import Weight


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
    centre, deviation = Weight(mean, spread, scale, mask).draw()
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
        Weight(mean, spread, torch.ones(1, dtype=torch.float64), mask).draw()
        reparameterised.divergence(mean, spread, mask)
    assert kept == [1, mean.numel()]  # the scale and the noise


def _linear_weight(*shape: int, scale: tuple[int, ...]) -> Weight:
    mean, spread = torch.randn(2, *shape, dtype=torch.float64)
    gamma = torch.rand(scale, dtype=torch.float64).requires_grad_()
    mask = torch.rand(shape) < 0.7
    return Weight(mean.requires_grad_(), spread.requires_grad_(), gamma, mask)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("scale", [(), (3, 1), (3, 4)])
def test_outputs_of_linear_layers_and_their_gradients_are_those_of_the_formula(
    scale: tuple[int, ...], with_bias: bool
) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(5, 4, dtype=torch.float64).requires_grad_()
    weight = _linear_weight(3, 4, scale=scale)
    bias = _linear_weight(3, scale=(3,)) if with_bias else None
    up = torch.randn(5, 3, dtype=torch.float64)
    leaves = (inputs, *weight[:3], *(bias[:3] if bias else ()))

    torch.manual_seed(1)
    output = reparameterised.linear(inputs, weight, bias)
    found = torch.autograd.grad((output * up).sum(), leaves)

    torch.manual_seed(1)
    noise = torch.randn(5, 3, dtype=torch.float64)
    mean, deviation = (
        weight.scale * part * weight.mask for part in (weight.mean, F.softplus(weight.spread))
    )
    plain, variance = inputs @ mean.mT, inputs.square() @ deviation.square().mT
    if bias:
        plain = plain + bias.scale * bias.mean * bias.mask
        variance = variance + (bias.scale * F.softplus(bias.spread) * bias.mask).square()
    plain = plain + variance.sqrt() * noise
    torch.testing.assert_close(output, plain)
    torch.testing.assert_close(found, torch.autograd.grad((plain * up).sum(), leaves))


def test_outputs_without_any_variance_have_gradients() -> None:
    """All weights of a unit are pruned, or all of its inputs zero."""
    torch.manual_seed(0)
    inputs = torch.randn(5, 4).requires_grad_()
    mean, spread, scale = torch.randn(3, 4), torch.randn(3, 4), torch.ones(())
    leaves = mean.requires_grad_(), spread.requires_grad_(), scale.requires_grad_()
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    output = reparameterised.linear(
        inputs * torch.tensor([[1.0], [0], [1], [1], [1]]), Weight(*leaves, mask)
    )
    assert not output[:, 1].any()
    assert not output[1].any()
    for gradient in torch.autograd.grad(output.square().sum(), (inputs, *leaves)):
        assert gradient.isfinite().all()


def test_linear_layers_keep_nothing_of_the_size_of_the_weights() -> None:
    inputs, kept = torch.randn(5, 40), []
    weight = Weight(
        torch.randn(30, 40), torch.randn(30, 40), torch.ones(()), torch.ones(30, 40) > 0
    )
    there = {t.data_ptr() for t in (*weight, inputs)}
    for part in weight[:2]:
        part.requires_grad_()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in there:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        reparameterised.linear(inputs, weight)
    assert kept == [5 * 30]  # of the outputs' size
