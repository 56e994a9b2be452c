"""The posterior of one parameter tensor, and what removing parts of it gains.

See :mod:`spamprune.bayes.reduction` for the formulas. All tensors are float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from spamprune.bayes.curvature.blocks import Kronecker


class Gaussian(Protocol):
    """The posterior of one parameter tensor under a prior, in float64."""

    @property
    def mean(self) -> Tensor:
        """θ, in the parameter's shape."""
        ...

    def under(self, delta: float) -> Gaussian:
        """Return the posterior under a prior of one precision."""
        ...

    def moments(self, delta: float) -> tuple[float, float]:
        """Return ``tr(P' − δ₀)Σ'``, how many parameters the data determine, and ``|θ'|²``."""
        ...

    def log_normaliser(self) -> float:
        """Return ``½ ln|δ| − ½ ln|P| + ½ θᵀPθ``: the log evidence up to what no prior changes."""
        ...

    def each(self) -> Tensor:
        """Return ΔF of each parameter."""
        ...

    def groups(self, dim: int, members: Tensor) -> Tensor:
        """Return ΔF of groups of rows or columns."""
        ...


@dataclass(frozen=True)
class DiagonalGaussian:
    """A posterior of precision ``h + prior``.

    Attributes:
        mean: θ.
        prior: δ.
        h: The curvature over the temperature.
    """

    mean: Tensor
    prior: Tensor
    h: Tensor

    @property
    def precision(self) -> Tensor:
        """P."""
        return self.h + self.prior

    def under(self, delta: float) -> DiagonalGaussian:
        """Return the posterior under a prior of one precision."""
        mean = self.precision * self.mean / (self.h + delta)
        return DiagonalGaussian(mean, torch.full_like(mean, delta), self.h)

    def moments(self, delta: float) -> tuple[float, float]:
        """Return how many parameters the data determine under it, and ``|θ'|²``."""
        after = self.under(delta)
        return (self.h / after.precision).sum().item(), after.mean.square().sum().item()

    def log_normaliser(self) -> float:
        """Return ``½ ln|δ| − ½ ln|P| + ½ θᵀPθ``."""
        return -self.each().sum().item()

    def each(self) -> Tensor:
        """Return ΔF of each parameter."""
        precision = self.precision
        return 0.5 * ((precision / self.prior).log() - precision * self.mean.square())

    def groups(self, dim: int, members: Tensor) -> Tensor:
        """Return ΔF of groups of rows or columns."""
        each = self.each().movedim(dim, 0)
        return each.reshape(len(each), -1).sum(1)[members].sum(1)


@dataclass(frozen=True)
class KroneckerGaussian:
    """A posterior of precision ``(Q_G ⊗ Q_A) M (Q_G ⊗ Q_A)ᵀ``, one for each group of a layer.

    ``M = λ_G λ_Aᵀ/T + δ̂`` is exact under a slab. Under a prior that varies it is Proposition 1 of
    the SpaM paper; what the slab's mean is computed from is exact there too.

    Attributes:
        mean: θ, in the parameter's shape.
        prior: δ, likewise.
        outputs: Q_G, shape (groups, out, out).
        inputs: Q_A, shape (groups, in, in).
        h: ``λ_G λ_Aᵀ/T``, shape (groups, out, in).
        spectrum: M, likewise.
    """

    mean: Tensor
    prior: Tensor
    outputs: Tensor
    inputs: Tensor
    h: Tensor
    spectrum: Tensor

    @classmethod
    def of(
        cls, block: Kronecker, mean: Tensor, prior: Tensor, temperature: float
    ) -> KroneckerGaussian:
        """Return the posterior of a parameter with Kronecker factors."""
        values_out, outputs = torch.linalg.eigh(block.outputs.double())
        if block.inputs is None:
            inputs = outputs.new_ones(len(outputs), 1, 1)
            values_in = outputs.new_ones(len(outputs), 1)
        else:
            values_in, inputs = torch.linalg.eigh(block.inputs.double())
        # a curvature has no negative eigenvalues, but rounding does
        values_out, values_in = values_out.clamp(min=0), values_in.clamp(min=0)
        h = values_out[:, :, None] * values_in[:, None, :] / temperature
        rotated = outputs.square().mT @ prior.reshape(h.shape) @ inputs.square()
        return cls(mean, prior, outputs, inputs, h, h + rotated)

    def _rotated(self, tensor: Tensor) -> Tensor:
        """Return ``Q_Gᵀ tensor Q_A``, shape (groups, out, in)."""
        return self.outputs.mT @ tensor.reshape(self.h.shape) @ self.inputs

    @cached_property
    def _natural(self) -> Tensor:
        """``b = Pθ`` in the eigenbasis."""
        return self.h * self._rotated(self.mean) + self._rotated(self.prior * self.mean)

    def under(self, delta: float) -> KroneckerGaussian:
        """Return the posterior under a prior of one precision."""
        spectrum = self.h + delta
        mean = self.outputs @ (self._natural / spectrum) @ self.inputs.mT
        return replace(
            self,
            mean=mean.reshape(self.mean.shape),
            prior=torch.full_like(self.prior, delta),
            spectrum=spectrum,
        )

    def moments(self, delta: float) -> tuple[float, float]:
        """Return how many parameters the data determine under it, and ``|θ'|²``."""
        spectrum = self.h + delta
        square = (self._natural / spectrum).square()
        return (self.h / spectrum).sum().item(), square.sum().item()

    def log_normaliser(self) -> float:
        """Return ``½ ln|δ| − ½ ln|P| + ½ θᵀPθ``."""
        quadratic = (self._natural * self._rotated(self.mean)).sum()
        return 0.5 * (self.prior.log().sum() - self.spectrum.log().sum() + quadratic).item()

    def each(self) -> Tensor:
        """Return ΔF of each parameter."""
        variance = self.outputs.square() @ self.spectrum.reciprocal() @ self.inputs.square().mT
        variance = variance.reshape(self.mean.shape)
        return -0.5 * ((self.prior * variance).log() + self.mean.square() / variance)

    def groups(self, dim: int, members: Tensor) -> Tensor:
        """Return ΔF of groups of rows or columns."""
        _, out, inner = self.h.shape
        variances = self.spectrum.reciprocal()
        mean, prior = self.mean.reshape(self.h.shape), self.prior.reshape(self.h.shape)
        total = mean.new_zeros(len(members))
        if dim == 0:
            for unit, rows in enumerate(members):
                for g in (rows // out).unique().tolist():
                    own = rows[rows // out == g] % out
                    rotated = mean[g, own] @ self.inputs[g]
                    total[unit] += _gain(self.outputs[g, own], variances[g], rotated, prior[g, own])
            return total
        pixels = inner // self.mean.shape[1]
        for unit, channels in enumerate(members):
            own = (
                channels[:, None] * pixels + torch.arange(pixels, device=channels.device)
            ).flatten()
            for g in range(len(mean)):
                rotated = mean[g, :, own].mT @ self.outputs[g]
                prior_g = prior[g, :, own]
                total[unit] += _gain(self.inputs[g, own], variances[g].mT, rotated, prior_g)
        return total


def _gain(vectors: Tensor, variances: Tensor, rotated: Tensor, prior: Tensor) -> Tensor:
    """Return ΔF of some rows of a matrix whose covariance is diagonal in an eigenbasis.

    In the basis of the other dimension the columns are independent, each with a covariance
    ``vectors diag(variances) vectorsᵀ``, so that nothing larger is ever formed.

    Args:
        vectors: The rows of the eigenvectors, shape (rows, k).
        variances: 1/M, shape (k, l).
        rotated: The rows of the mean, in the basis of the other dimension, shape (rows, l).
        prior: δ of the rows, of any shape.
    """
    covariance = (vectors * variances.mT[:, None, :]) @ vectors.mT  # (l, rows, rows)
    root = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(root, rotated.mT[..., None], upper=False)
    log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum()
    return -0.5 * (log_det + prior.log().sum() + white.square().sum())
