"""Gaussian priors whose precisions are tied in a structure (paper, section 2.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from spamprune.bayes.parameters import check_positive, named_parameters
from spamprune.errors import PosteriorError

Structure = Literal["scalar", "layerwise", "unitwise", "parameterwise"]


def _factor_shapes(structure: Structure, shape: torch.Size) -> list[list[int]]:
    """Return the shapes of the factors whose logarithms add up to a tensor's log δ."""
    rank = len(shape)
    if structure == "scalar":
        return [[]]
    if structure == "layerwise":
        return [[1] * rank]
    if structure == "parameterwise":
        return [list(shape)]
    if rank < 2:  # a bias or scale: a vector of its own
        return [list(shape)]
    # log δ_ij = a_i + b_j for output unit i and input unit j, shared over kernel pixels
    rest = [1] * (rank - 2)
    return [[shape[0], 1, *rest], [1, shape[1], *rest]]


class Prior:
    """A zero-mean Gaussian prior over the parameters of a model.

    The log precision of a parameter tensor is the broadcast sum of one or two *factors*, held in
    ``log_factors``; a scalar prior is one factor shared by all tensors.

    Args:
        model: Whose parameters the prior is for.
        structure: How precisions are tied: one for all (scalar), one per tensor (layerwise), one
            per output and input unit (unitwise), one per parameter (parameterwise).
        precision: δ₀, the precision that every parameter starts with.

    Raises:
        PosteriorError: The structure is unknown or the precision not a positive number.
    """

    def __init__(self, model: nn.Module, structure: Structure, precision: float = 1.0):
        if structure not in get_args(Structure):
            raise PosteriorError(
                f"unknown prior structure {structure!r}: one of {', '.join(get_args(Structure))}"
            )
        check_positive(precision=precision)
        self.structure: Structure = structure
        self.log_factors: dict[str, list[Tensor]] = {}
        shared: Tensor | None = None
        for name, parameter in named_parameters(model).items():
            shapes = _factor_shapes(structure, parameter.shape)
            start = math.log(precision) / len(shapes)
            if structure == "scalar":
                if shared is None:
                    shared = torch.full((), start, device=parameter.device)
                self.log_factors[name] = [shared]
            else:
                self.log_factors[name] = [
                    torch.full(shape, start, device=parameter.device) for shape in shapes
                ]
        self._shapes = {name: p.shape for name, p in named_parameters(model).items()}
        self._shared = shared

    def factors(self) -> list[Tensor]:
        """Return the free log factors, each once; changing them in place changes the prior."""
        if self._shared is not None:
            return [self._shared]
        return [factor for factors in self.log_factors.values() for factor in factors]

    def precision(self) -> dict[str, Tensor]:
        """Return δ for every parameter, shaped like it."""
        return {
            name: sum(factors[1:], factors[0]).exp().expand(self._shapes[name])
            for name, factors in self.log_factors.items()
        }

    def ties(self) -> list[tuple[list[Tensor], list[str]]]:
        """Return the free log factors in sets that share no parameter, with those they govern."""
        if self._shared is not None:
            return [([self._shared], list(self.log_factors))]
        return [(factors, [name]) for name, factors in self.log_factors.items()]

    def inherit(self, other: Prior, cut: Callable[[str, Tensor], Tensor]) -> None:
        """Take over the log precisions of a larger network's prior, of the same structure.

        Args:
            other: That prior.
            cut: Given a parameter's name and one of its factors there, returns what this network
                has of it.
        """
        for name, factors in self.log_factors.items():
            for factor, larger in zip(factors, other.log_factors[name], strict=True):
                factor.copy_(cut(name, larger) if larger.dim() else larger)

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the free log factors, by position."""
        return {str(i): factor.clone() for i, factor in enumerate(self.factors())}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            PosteriorError: The state is that of another prior.
        """
        factors = self.factors()
        shapes = [tuple(factor.shape) for factor in factors]
        if [tuple(state[key].shape) for key in sorted(state, key=int)] != shapes:
            raise PosteriorError("the saved prior belongs to another model or structure")
        for i, factor in enumerate(factors):
            factor.copy_(state[str(i)])
