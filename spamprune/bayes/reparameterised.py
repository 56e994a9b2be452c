"""Draws from a mean-field Gaussian and its divergence, with gradients that keep next to nothing.

What autograd would keep of the same formulas for the backward pass is several times the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from spamprune.bayes.curvature.squares import at_least_single


class Weight(NamedTuple):
    """The distribution of a parameter tensor: ``γ (μ + σε)``, ``ε ~ N(0, 1)``.

    Attributes:
        mean: μ.
        spread: Of the same shape; ``σ = softplus(spread)``.
        scale: γ > 0, of a shape that broadcasts to theirs.
        mask: True where a weight stays; the others are zero.
    """

    mean: Tensor
    spread: Tensor
    scale: Tensor
    mask: Tensor

    def draw(self) -> tuple[Tensor, Tensor]:
        """Return ``γμ`` and ``γσε``, whose sum the weights are."""
        return _Draw.apply(*self)


def linear(inputs: Tensor, weight: Weight, bias: Weight | None = None) -> Tensor:
    """Return ``inputs @ weight.mT + bias``, weight and bias drawn anew for each row of the inputs.

    Outputs of one row are independent normals then, so that they are drawn instead (local
    reparameterisation, Kingma et al. 2015, eq. 6).

    Args:
        inputs: Shape (B, in).
        weight: Shape (out, in).
        bias: Shape (out,).

    Returns:
        Shape (B, out).
    """
    return _Linear.apply(inputs, *weight, *(bias or ()))


def divergence(mean: Tensor, spread: Tensor, mask: Tensor) -> Tensor:
    """Return ``Σ KL(N(μ, σ²) ‖ N(0, 1))`` over what is not masked, in nats.

    Of half-precision parameters it is float32: eight bits are too few for a sum.
    """
    return _Divergence.apply(mean, spread, mask)


class _Draw(Function):
    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, spread: Tensor, scale: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(spread)
        ctx.save_for_backward(mean, spread, scale, mask, noise)
        weight = _Rescaled.of(mean, spread, scale, mask)
        return weight.mean(), weight.deviation().mul_(noise)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor, of_deviation: Tensor) -> tuple[Tensor | None, ...]:
        *weight, noise = ctx.saved_tensors
        of_mean, of_deviation = (
            g.to_dense() if g.is_sparse else g for g in (of_mean, of_deviation)
        )
        return _Rescaled.of(*weight).gradients(of_mean, of_deviation * noise)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, *parts: Tensor) -> Tensor:
        weight, bias = _weight_and_bias(parts)
        output = F.linear(inputs, weight.mean(), bias.mean() if bias else None)
        variance = F.linear(inputs.square(), weight.variance(), bias.variance() if bias else None)
        root = variance.sqrt_()
        noise = torch.randn_like(root)
        output.addcmul_(root, noise)
        # outputs without variance divide by next to nothing, and meet zeros on the way back
        noise.div_(root.clamp_(min=torch.finfo(root.dtype).tiny ** 0.5))
        ctx.save_for_backward(inputs, noise, *parts)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_output: Tensor) -> tuple[Tensor | None, ...]:
        inputs, ratio, *parts = ctx.saved_tensors
        weight, bias = _weight_and_bias(parts)
        of_variance = ratio.mul(of_output)  # twice it: a square's derivative has another 2
        of_inputs = None
        if ctx.needs_input_grad[0]:
            of_inputs = (of_variance @ weight.variance()).mul_(inputs)
            of_inputs.addmm_(of_output, weight.mean())
        # arguments without names go as soon as they are used
        found = weight.gradients(
            of_output.mT @ inputs, (of_variance.mT @ inputs.square()).mul_(weight.deviation())
        )
        if bias:
            found += bias.gradients(of_output.sum(0), of_variance.sum(0).mul_(bias.deviation()))
        return of_inputs, *found


@dataclass(frozen=True)
class _Rescaled:
    """A weight's normal distribution with its scale in it, and the way back.

    What is not kept is computed when asked for, so that few tensors of a weight's size are there
    at a time.

    Attributes:
        weight: What it is of.
        held: γ where a weight stays, 0 elsewhere.
        sigma: σ.
    """

    weight: Weight
    held: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, mean: Tensor, spread: Tensor, scale: Tensor, mask: Tensor) -> _Rescaled:
        """Return what the parts of a weight amount to."""
        held = torch.where(mask, scale, 0.0)
        return cls(Weight(mean, spread, scale, mask), held, F.softplus(spread))

    def mean(self) -> Tensor:
        """Return γμ."""
        return self.weight.mean * self.held

    def deviation(self) -> Tensor:
        """Return γσ."""
        return self.sigma * self.held

    def variance(self) -> Tensor:
        """Return γ²σ²."""
        return self.deviation().square_()

    def gradients(self, of_mean: Tensor, of_deviation: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients by the weight's parts from those by γμ and γσ."""
        scale = self.weight.scale
        of_mean = of_mean * self.held  # now by μ and σ
        of_deviation = of_deviation * self.held
        of_scale = (of_mean * self.weight.mean).addcmul_(of_deviation, self.sigma)
        of_scale = of_scale.sum_to_size(scale.shape) / scale
        return of_mean, of_deviation.mul_(self.weight.spread.sigmoid()), of_scale, None


def _weight_and_bias(parts: Sequence[Tensor]) -> tuple[_Rescaled, _Rescaled | None]:
    return _Rescaled.of(*parts[:4]), _Rescaled.of(*parts[4:]) if parts[4:] else None


class _Divergence(Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, spread: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mean, spread, mask)
        mean, sigma = at_least_single(mean), F.softplus(at_least_single(spread))
        each = mean.square().addcmul_(sigma, sigma).sub_(1).mul_(0.5).sub_(sigma.log_())
        return each.mul_(mask).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_sum: Tensor) -> tuple[Tensor | None, ...]:
        mean, spread, mask = ctx.saved_tensors
        spread = at_least_single(spread)
        sigma = F.softplus(spread)
        of_spread = sigma.reciprocal().neg_().add_(sigma).mul_(spread.sigmoid())
        held = of_sum * mask
        return mean * held, of_spread.mul_(held), None
