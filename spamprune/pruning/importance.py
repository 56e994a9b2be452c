"""Importances for torch-pruning: the scores of a unit's parameters, summed over all couplings."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch_pruning as tp
from torch import Tensor, nn

from spamprune.bayes.posterior import Posterior
from spamprune.errors import PosteriorError
from spamprune.pruning.coupling import slices, sum_over_units


class ScoreImportance(tp.importance.Importance):
    """Importance of a unit: the sum of its parameters' scores (SpaM paper, eq. 4).

    The sum runs over everything that goes with the unit: its weights and bias, what reads it in
    the next layers, normalisation parameters; each entry once.

    Args:
        scores: A score for every parameter, by name, as every criterion returns it.

    Raises:
        PosteriorError: On use, a parameter has no score, or one of another shape.
    """

    def __init__(self, scores: Mapping[str, Tensor]):
        self._scores = scores

    def score(self, name: str, parameter: nn.Parameter) -> Tensor:
        """Return the score of a parameter, shaped like it."""
        return _fitting(self._scores, name, parameter, "the scores")

    @torch.no_grad()
    def __call__(self, group: tp.dependency.Group) -> Tensor | None:
        """Return the importance of each unit at the group's root, shape ``(units,)``.

        None, torch-pruning's sign for a group to be left alone, only where there is nothing to
        score: the group has no trainable parameter.
        """
        pieces = [piece for piece in slices(group) if piece.parameter.requires_grad]
        if not pieces:
            return None
        scores = {piece.name: self.score(piece.name, piece.parameter) for piece in pieces}
        return sum_over_units(pieces, scores, list(group.items[0].root_idxs))


class OPDImportance(ScoreImportance):
    """Structured optimal posterior damage: the sum of ``P_pp θ_p²`` over a unit's parameters.

    A plug-in for existing torch-pruning code; θ is read when a group is scored.

    Args:
        posterior: Fitted on the model that is to be pruned: see
            :func:`spamprune.fit_posterior`.

    Raises:
        PosteriorError: On use, the posterior does not fit the model's parameters.
    """

    def __init__(self, posterior: Posterior):
        self._precision = posterior.precision()

    def score(self, name: str, parameter: nn.Parameter) -> Tensor:
        """Return ``P θ²``, shaped like the parameter."""
        return _fitting(self._precision, name, parameter, "the posterior") * parameter.square()


def _fitting(
    tensors: Mapping[str, Tensor], name: str, parameter: nn.Parameter, what: str
) -> Tensor:
    if name not in tensors:
        raise PosteriorError(f"{what} lacks parameter {name!r}: fit it on this model")
    if tensors[name].shape != parameter.shape:
        raise PosteriorError(
            f"{what} has shape {tuple(tensors[name].shape)} for {name!r}, the model has "
            f"{tuple(parameter.shape)}: fit it again after each pruning"
        )
    return tensors[name].to(parameter.device)
