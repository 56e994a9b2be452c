"""Draws from a mean-field Gaussian and its divergence, with gradients that keep next to nothing.

What autograd would keep of the same formulas for the backward pass is several times the parameters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def draw(mean: Tensor, spread: Tensor, scale: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Draw weights ``γ (μ + σε)``, ``ε ~ N(0, 1)``, zero where they are masked.

    Args:
        mean: μ.
        spread: Of the same shape; ``σ = softplus(spread)``.
        scale: γ > 0, of a shape that broadcasts to theirs.
        mask: True where a weight stays.

    Returns:
        ``γμ`` and ``γσε``, whose sum the weights are.
    """
    return _Draw.apply(mean, spread, scale, mask)


def divergence(mean: Tensor, spread: Tensor, mask: Tensor) -> Tensor:
    """Return ``Σ KL(N(μ, σ²) ‖ N(0, 1))`` over what is not masked, in nats."""
    return _Divergence.apply(mean, spread, mask)


class _Draw(Function):
    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, spread: Tensor, scale: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(spread)
        ctx.save_for_backward(mean, spread, scale, mask, noise)
        held = scale * mask
        return mean * held, F.softplus(spread).mul_(noise).mul_(held)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor, of_deviation: Tensor) -> tuple[Tensor | None, ...]:
        mean, spread, scale, mask, noise = ctx.saved_tensors
        held = scale * mask
        of_mean, of_sigma = of_mean * held, held.mul_(of_deviation).mul_(noise)
        of_scale = (of_mean * mean).addcmul_(of_sigma, F.softplus(spread)).sum_to_size(scale.shape)
        return of_mean, of_sigma.mul_(spread.sigmoid()), of_scale / scale, None


class _Divergence(Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, spread: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mean, spread, mask)
        sigma = F.softplus(spread)
        each = mean.square().addcmul_(sigma, sigma).sub_(1).mul_(0.5).sub_(sigma.log_())
        return each.mul_(mask).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_sum: Tensor) -> tuple[Tensor | None, ...]:
        mean, spread, mask = ctx.saved_tensors
        sigma = F.softplus(spread)
        of_spread = sigma.reciprocal().neg_().add_(sigma).mul_(spread.sigmoid())
        held = of_sum * mask
        return mean * held, of_spread.mul_(held), None
