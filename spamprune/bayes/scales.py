"""Priors of the scales γ of a layer's weights, with log-normal posteriors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spamprune.bayes.curvature.squares import at_least_single


def softplus_inverse(value: float) -> float:
    """Return x with ``ln(1 + eˣ) = value``."""
    return math.log(math.expm1(value))


class Positive(nn.Module):
    """Positive numbers with a Gamma prior and independent log-normal posteriors.

    Args:
        shape: How many.
        concentration: Of the Gamma prior.
        rate: Of the Gamma prior.
        start: Their medians at the start.
    """

    def __init__(self, shape: Sequence[int], concentration: float, rate: float, start: float = 1.0):
        super().__init__()
        self.concentration, self.rate = concentration, rate
        self.location = nn.Parameter(torch.full(tuple(shape), math.log(start)))
        self.spread = nn.Parameter(torch.full(tuple(shape), softplus_inverse(0.1)))

    def forward(self, *, draw: bool) -> Tensor:
        """Return a draw, or the medians."""
        if not draw:
            return self.location.exp()
        noise = torch.randn_like(self.location)
        return (self.location + F.softplus(self.spread) * noise).exp()

    def divergence(self) -> Tensor:
        """Return KL(q‖p) in nats, summed."""
        a, b = self.concentration, self.rate
        m, s = at_least_single(self.location), F.softplus(at_least_single(self.spread))
        entropy = m + s.log() + 0.5 * (1 + math.log(2 * math.pi))
        density = a * math.log(b) - math.lgamma(a) + (a - 1) * m - b * (m + 0.5 * s.square()).exp()
        return -(entropy + density).sum()


def _start(values: Sequence[Tensor], default: float) -> float:
    """Return the root mean square of a layer's weights: where its scale starts.

    Weights that start at next to nothing (timm's class tokens and layer scales, at 1e-6) say as
    little as zeros do, and far from its prior a scale would cost millions of nats: the default.
    """
    square = sum(v.double().square().sum().item() for v in values)
    found = math.sqrt(square / sum(v.numel() for v in values))
    return found if found > default / 100 else default


class LayerScale(nn.Module):
    """One scale for a layer: ``γ = c/10``, in the last layer c, with ``c⁻² ~ Gamma(2, 2)``.

    Args:
        values: The layer's parameters.
        last: Whether it is the last layer.
    """

    def __init__(self, values: Sequence[Tensor], *, last: bool):
        super().__init__()
        self.unit = 1.0 if last else 0.1
        self.count = len(values)
        start = (self.unit / _start(values, self.unit)) ** 2
        self.inverse_square = Positive((), 2, 2, start)

    def forward(self, *, draw: bool) -> list[Tensor]:
        """Return γ, drawn or at its median, for each parameter of the layer."""
        return [self.unit * self.inverse_square(draw=draw).rsqrt()] * self.count

    def divergence(self) -> Tensor:
        """Return KL(q‖p) in nats."""
        return self.inverse_square.divergence()


class Horseshoe(nn.Module):
    """The regularised horseshoe: a scale for the layer and one for each row, with heavy tails.

    ``γ_i² = ψ_i / (1 + c⁻² ψ_i)`` with ``ψ_i = τ₀² t² λ_i²``, t and λ_i half-Cauchy and
    ``c⁻² ~ Gamma(2, 6)`` (Piironen & Vehtari 2017). A half-Cauchy squared is a quotient of two
    Gamma(½, 1). The last layer has ``γ = t``. So in the BMR paper's code (its "reduced" form).

    Args:
        values: The layer's parameters; rows run along their first dimension.
        last: Whether it is the last layer.
    """

    #: τ₀, as in the paper's code.
    GLOBAL = 1e-2

    def __init__(self, values: Sequence[Tensor], *, last: bool):
        super().__init__()
        self.last = last
        self.dims = [v.dim() for v in values]
        self.rows = [len(v) if v.dim() else 1 for v in values]
        start = _start(values, 1.0 if last else self.GLOBAL)
        t = start if last else 1.0
        self.layer = nn.ModuleList([Positive((), 0.5, 1, t), Positive((), 0.5, 1, 1 / t)])
        if not last:
            self.inverse_square = Positive((), 2, 6, 1 / 3)
            # weight and bias of one layer share rows
            wide = max(self.rows)
            ratio = start / self.GLOBAL
            self.row = nn.ModuleList(
                [Positive((wide,), 0.5, 1, ratio), Positive((wide,), 0.5, 1, 1 / ratio)]
            )

    def forward(self, *, draw: bool) -> list[Tensor]:
        """Return γ, drawn or at its median, for each parameter of the layer."""
        over, under = (part(draw=draw) for part in self.layer)
        if self.last:
            return [(over / under).sqrt()] * len(self.dims)
        numerator, denominator = (part(draw=draw) for part in self.row)
        psi = self.GLOBAL**2 * over * numerator
        slab = self.inverse_square(draw=draw)
        gamma = (psi / (under * denominator + slab * psi)).sqrt()
        return [
            gamma[:rows].reshape(rows, *[1] * (dims - 1)) if dims else gamma[0]
            for rows, dims in zip(self.rows, self.dims, strict=True)
        ]

    def divergence(self) -> Tensor:
        """Return KL(q‖p) in nats."""
        parts = [part for part in self.modules() if isinstance(part, Positive)]
        return torch.stack([part.divergence() for part in parts]).sum()
