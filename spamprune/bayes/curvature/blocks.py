"""The two forms that the curvature of one parameter tensor takes: diagonal and Kronecker."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from types import EllipsisType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

#: Some rows of a tensor, or all of it.
Index = slice | EllipsisType


class Block(Protocol):
    """Curvature of one parameter tensor; ``P = H/T + δ`` for a diagonal prior precision δ.

    δ may have any shape that broadcasts to the parameter's.
    """

    def precision(self, delta: Tensor, temperature: float) -> Tensor:
        """Return the diagonal of P, shaped like the parameter."""
        ...

    def log_det(self, delta: Tensor, temperature: float) -> Tensor:
        """Return log |P|, a float64 scalar."""
        ...

    def log_det_gradient(self, delta: Tensor, temperature: float) -> Tensor:
        """Return ``∂ log |P| / ∂ log δ`` for each parameter, shaped like it."""
        ...

    def parts(self, elements: int) -> Iterator[tuple[Index, Block]]:
        """Yield blocks that do not interact, of about ``elements`` each, and where they lie."""
        ...


@dataclass(frozen=True)
class Diagonal:
    """Diagonal curvature ``h``, shaped like the parameter."""

    h: Tensor

    def precision(self, delta: Tensor, temperature: float) -> Tensor:
        """Return ``h/T + δ``."""
        return self.h / temperature + delta

    def log_det(self, delta: Tensor, temperature: float) -> Tensor:
        """Return ``Σ log(h/T + δ)``."""
        return (self.h.double() / temperature + delta).log().sum()

    def log_det_gradient(self, delta: Tensor, temperature: float) -> Tensor:
        """Return ``δ / (h/T + δ)``."""
        return delta / torch.add(delta, self.h, alpha=1 / temperature)

    def parts(self, elements: int) -> Iterator[tuple[Index, Block]]:
        """Yield slices along the first dimension, the whole where it is small enough."""
        if self.h.numel() <= elements:
            yield ..., self
            return
        rows = max(1, elements * len(self.h) // self.h.numel())
        for start in range(0, len(self.h), rows):
            index = slice(start, start + rows)
            yield index, Diagonal(self.h[index])


class _Eigen(NamedTuple):
    """Eigenvalues (groups, n), and eigenvectors squared element-wise (groups, n, n)."""

    values: Tensor
    squares: Tensor


@dataclass(frozen=True)
class Kronecker:
    """Curvature ``G ⊗ A``, one pair of factors for each group of a grouped layer.

    Together with a diagonal prior it is handled in the factors' eigenbasis (paper, Proposition 1):
    ``δ̂ = (Q_G²)ᵀ δ Q_A²``, ``M = λ_G λ_Aᵀ/T + δ̂``, ``log |P| = Σ log M``,
    ``diag P = Q_G² M (Q_A²)ᵀ``, squares element-wise. That is exact where δ is one number; else it
    keeps the trace and takes ``log |P|`` too large.

    Attributes:
        outputs: G, shape (groups, out, out), summed over the data set.
        inputs: A, shape (groups, in, in), a mean over the data set; None for a bias.
        shape: Of the parameter: (groups · out, …) with the rest of a group's row holding ``in``
            elements.
    """

    outputs: Tensor
    inputs: Tensor | None
    shape: tuple[int, ...]

    def to(self, device: torch.device) -> Kronecker:
        """Return the factors on a device."""
        inputs = None if self.inputs is None else self.inputs.to(device)
        return Kronecker(self.outputs.to(device), inputs, self.shape)

    @cached_property
    def diag(self) -> Tensor:
        """The diagonal of ``G ⊗ A``, shaped like the parameter."""
        outputs = self.outputs.diagonal(dim1=-2, dim2=-1)
        if self.inputs is None:
            return outputs.reshape(self.shape)
        inputs = self.inputs.diagonal(dim1=-2, dim2=-1)
        return (outputs[:, :, None] * inputs[:, None, :]).reshape(self.shape)

    @cached_property
    def _eigen(self) -> tuple[_Eigen, _Eigen]:
        """Of G and of A, which is 1 for a bias."""
        inputs = self.inputs
        if inputs is None:
            inputs = self.outputs.new_ones(len(self.outputs), 1, 1)
        return _eigen(self.outputs), _eigen(inputs)

    def _spectrum(self, delta: Tensor, temperature: float) -> Tensor:
        """Return M, shape (groups, out, in)."""
        outputs, inputs = self._eigen
        blocks = delta.expand(self.shape).reshape(len(self.outputs), self.outputs.shape[-1], -1)
        with self._precisely():
            prior = outputs.squares.mT @ blocks.to(outputs.squares) @ inputs.squares
        return prior.addcmul_(outputs.values[:, :, None], inputs.values[:, None, :] / temperature)

    def _back(self, spectrum: Tensor) -> Tensor:
        """Return ``Q_G² spectrum (Q_A²)ᵀ``, shaped like the parameter."""
        outputs, inputs = self._eigen
        with self._precisely():
            return (outputs.squares @ spectrum @ inputs.squares.mT).reshape(self.shape)

    def _precisely(self) -> torch.autocast:
        """Return a context whose products have the factors' own precision, whatever is outside."""
        return torch.autocast(self.outputs.device.type, enabled=False)

    def precision(self, delta: Tensor, temperature: float) -> Tensor:
        """Return ``Q_G² M (Q_A²)ᵀ``."""
        return self._back(self._spectrum(delta, temperature))

    def log_det(self, delta: Tensor, temperature: float) -> Tensor:
        """Return ``Σ log M``."""
        return self._spectrum(delta, temperature).double().log().sum()

    def log_det_gradient(self, delta: Tensor, temperature: float) -> Tensor:
        """Return ``δ · Q_G² (1/M) (Q_A²)ᵀ``; it may exceed 1 where δ varies."""
        return delta * self._back(self._spectrum(delta, temperature).reciprocal_())

    def parts(self, elements: int) -> Iterator[tuple[Index, Block]]:
        """Yield the block itself: its elements hang together."""
        yield ..., self


def _eigen(factor: Tensor) -> _Eigen:
    """Decompose in float64; a curvature has no negative eigenvalues, but rounding does."""
    values, vectors = torch.linalg.eigh(factor.double())
    dtype = torch.promote_types(factor.dtype, torch.float32)
    return _Eigen(values.clamp(min=0).to(dtype), vectors.square().to(dtype))
