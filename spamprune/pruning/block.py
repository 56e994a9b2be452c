"""Block OPD: the damage of a whole unit under a Kronecker posterior, not of its weights one by one.

A diagonal adds up what each weight would cost alone. Weights of a unit go together, and what their
correlations add or cancel is in the block: ``θ_gᵀ P_gg θ_g``, with ``P = (G ⊗ A)/T + δ`` for a
layer with weights W (out × in). For rows R of W the curvature's part is
``Σ_{r,r'∈R} (G ∘ W A Wᵀ)_rr'``, for columns C it is ``Σ_{c,c'∈C} (A ∘ Wᵀ G W)_cc'``: no block is
formed, and none of Proposition 1's approximations is needed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from spamprune.bayes.curvature.blocks import Kronecker
from spamprune.bayes.curvature.squares import at_least_single
from spamprune.bayes.parameters import named_parameters
from spamprune.bayes.posterior import Posterior
from spamprune.pruning.slices import Slice, sum_over_units


class BlockOPD:
    """Importance of units by blocks of the posterior precision; ``sp.plan`` takes it for scores.

    Parameters without Kronecker factors, and those of which a unit takes rows and columns at once,
    are summed by their diagonal.

    Args:
        model: The network, as it is to be pruned.
        posterior: Fitted on it with ``CurvatureMethod(structure="kron")``.

    Raises:
        PosteriorError: The posterior has no Kronecker factors, or belongs to another model.
    """

    def __init__(self, model: nn.Module, posterior: Posterior):
        posterior.check_factors(model, "block OPD")
        posterior = posterior.on(model)
        self._parameters = named_parameters(model)
        self._factors = posterior.curvature.kron
        self._temperature = posterior.temperature
        precision = posterior.precision()
        squares = {n: at_least_single(p).square() for n, p in self._parameters.items()}
        #: For each parameter, what is summed one by one: the prior's part where blocks do the rest.
        self._whole = {n: precision[n] * square for n, square in squares.items()}
        self._prior = {n: posterior.prior_precision[n] * square for n, square in squares.items()}

    @torch.no_grad()
    def over(self, pieces: Iterable[Slice], units: int, dtype: torch.dtype) -> Tensor:
        """Return the damage of each unit, shape ``(units,)``.

        Args:
            pieces: The trainable slices of a group.
            units: How many units there are.
            dtype: In which sums are taken.
        """
        pieces = list(pieces)
        names = [piece.name for piece in pieces]
        blocks = [p for p in pieces if p.name in self._factors and names.count(p.name) == 1]
        in_blocks = {piece.name for piece in blocks}
        scores = {n: self._prior[n] if n in in_blocks else self._whole[n] for n in names}
        total = sum_over_units(pieces, scores, units, dtype)
        for piece in blocks:
            weight, factors = self._parameters[piece.name], self._factors[piece.name]
            part = _quadratic(weight.to(dtype), factors, piece, units)
            total += part.to(total.device) / self._temperature
        return total


def _quadratic(weight: Tensor, factors: Kronecker, piece: Slice, units: int) -> Tensor:
    """Return ``θ_gᵀ (G ⊗ A)_gg θ_g`` for the entries g of each unit in one tensor."""
    outputs = factors.outputs.to(weight)
    groups, rows, _ = outputs.shape
    inputs = factors.inputs
    inputs = weight.new_ones(groups, 1, 1) if inputs is None else inputs.to(weight)
    matrix = weight.reshape(groups, rows, -1)
    unit = torch.full((weight.shape[piece.dim],), -1, device=weight.device)
    unit[piece.index.to(weight.device)] = piece.unit.to(weight.device)
    if piece.dim == 0:
        pairs = outputs * (matrix @ inputs @ matrix.mT)
        unit = unit.reshape(groups, rows)
    else:
        pairs = inputs * (matrix.mT @ outputs @ matrix)
        unit = _columns(weight, unit, piece.dim).expand(groups, -1)
    together = (unit[:, :, None] == unit[:, None, :]) & (unit >= 0)[:, :, None]
    sums = (pairs * together).sum(2)
    chosen = unit >= 0
    return weight.new_zeros(units).index_add_(0, unit[chosen], sums[chosen])


def _columns(weight: Tensor, unit: Tensor, dim: int) -> Tensor:
    """Return the unit of each column of the flattened weight, given those along ``dim``."""
    shape = [1] * (weight.dim() - 1)
    shape[dim - 1] = -1
    return unit.reshape(shape).expand(weight.shape[1:]).reshape(-1)
