"""Importances for torch-pruning: the scores of a unit's parameters, summed over all couplings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from weakref import WeakKeyDictionary

import torch
import torch_pruning as tp
from torch import Tensor, nn

from spamprune.bayes.curvature.squares import at_least_single
from spamprune.bayes.posterior import Posterior
from spamprune.errors import PruningError
from spamprune.pruning.coupling import couple, layer_name
from spamprune.pruning.following import Aligned, follow
from spamprune.pruning.slices import Slice, sum_over_units


class ScoreImportance(tp.importance.GroupMagnitudeImportance):
    """Importance of a unit: the sum of its parameters' scores (SpaM paper, eq. 4).

    The sum runs over everything that goes with the unit: its weights and bias, what reads it in
    the next layers, normalisation parameters, units that cannot stay without it; each entry once.

    A plug-in for any torch-pruning code, also for pruning in several steps, with training between
    them or without: the scores of a model are cut together with its parameters, from the first
    time that one of its groups is scored. One importance serves several copies of a model.

    Args:
        scores: A score for every trainable parameter, by name, as every criterion returns it.
        group_reduction: ``"sum"``, each entry once; or another of torch-pruning's, over the sums
            that each parameter of a group has by itself: ``"mean"``, ``"max"``, ``"prod"``,
            ``"first"``, ``"gate"`` (the last), or None for one row each.
        normalizer: None, a function of a group's importances, or a name that torch-pruning knows,
            such as ``"mean"``, ``"sum"``, ``"max"``, ``"standarization"``, ``"gaussian"``.

    Raises:
        PruningError: torch-pruning has no such reduction or normalizer; or, on use, a layer of
            the group cannot be followed, or an importance is not finite.
        PosteriorError: On use, the scores are not those of the model's parameters.
    """

    #: What the cached tensors are called in messages.
    _what = "the scores"

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        *,
        group_reduction: str | None = "sum",
        normalizer: str | Callable[[Tensor], Tensor] | None = None,
    ):
        self.group_reduction = group_reduction
        self.normalizer = normalizer
        self._check_arguments()
        self._cached = scores
        self._of_model: WeakKeyDictionary[nn.Module, Aligned] = WeakKeyDictionary()

    def _score(self, cached: Tensor, parameter: nn.Parameter) -> Tensor:
        """Return the scores of a parameter, shaped like it, from what is cached for it."""
        return cached

    @torch.no_grad()
    def __call__(self, group: tp.dependency.Group) -> Tensor | None:
        """Return the importance of each unit at the group's root, shape ``(units,)``, in float32.

        None, torch-pruning's sign for a group to be left alone, only where there is nothing to
        score: the group has no trainable parameter.
        """
        aligned = self._aligned(group._DG.model)
        follow(group, aligned)
        coupling = couple(group)
        scores = {}
        for name, parameter in coupling.parameters.items():
            tensor = aligned.get(name, parameter)
            if tensor is not None and parameter.requires_grad:
                scores[name] = self._score(tensor, parameter)
        pieces = [piece for piece in coupling.pieces if piece.name in scores]
        if not pieces:
            return None
        totals = self._totals(pieces, scores, int(coupling.bundle.max()) + 1)
        raw = totals[..., coupling.bundle.to(totals.device)]
        # Of a group that is worth nothing (a head that starts at zero) there is nothing to divide.
        importance = self._normalize(raw, self.normalizer) if raw.any() else raw
        if not importance.isfinite().all():
            culprit = "their scores" if not raw.isfinite().all() else f"{self.normalizer!r} of them"
            raise PruningError(
                f"{layer_name(group)}: the importances of its units are not finite: look at "
                f"{culprit}: {', '.join(scores)}"
            )
        return importance

    def _aligned(self, model: nn.Module) -> Aligned:
        """Return the cached tensors as they fit ``model`` now."""
        if model not in self._of_model:
            self._of_model[model] = Aligned(self._cached, model, self._what)
        return self._of_model[model]

    def _totals(self, pieces: list[Slice], scores: dict[str, Tensor], units: int) -> Tensor:
        """Return the reduced scores of each unit, shape ``(units,)``."""
        if self.group_reduction == "sum":
            return sum_over_units(pieces, scores, units, torch.float32)
        # Units that a layer does not reach must not change what torch-pruning's reductions find.
        neutral = {"prod": 1.0, "max": -torch.inf}.get(self.group_reduction or "", 0.0)
        rows = []
        for piece in pieces:
            row = sum_over_units([piece], scores, units, torch.float32)
            reached = torch.zeros(units, dtype=torch.bool).index_fill_(0, piece.unit, True)
            rows.append(row.masked_fill(~reached.to(row.device), neutral))
        return self._reduce(rows, [list(range(units))] * len(rows))

    def _check_arguments(self) -> None:
        """Let torch-pruning try the reduction and the normalizer, so that a slip shows at once."""
        try:
            self._reduce([torch.ones(2)], [[0, 1]])
        except NotImplementedError:
            raise PruningError(
                f"torch-pruning has no group_reduction {self.group_reduction!r}: valid are 'sum', "
                "'mean', 'max', 'prod', 'first', 'gate' and None"
            ) from None
        if not callable(self.normalizer):
            try:
                self._normalize(torch.ones(2), self.normalizer)
            except (NotImplementedError, AttributeError, IndexError, ValueError):
                raise PruningError(
                    f"torch-pruning has no normalizer {self.normalizer!r}: valid are None, 'sum', "
                    "'mean', 'max', 'standarization', 'gaussian', 'lamp', 'sentinel_0.5' and "
                    "functions"
                ) from None


class OPDImportance(ScoreImportance):
    """Structured optimal posterior damage: the sum of ``P_pp θ_p²`` over a unit's parameters.

    A plug-in for existing torch-pruning code: see :class:`ScoreImportance`, also for the other
    arguments. θ is read when a group is scored; P stays as it was fitted.

    Args:
        posterior: Fitted on the model that is to be pruned: see
            :func:`spamprune.fit_posterior`.
        group_reduction: As for scores.
        normalizer: As for scores.

    Raises:
        PruningError: As for scores, or it is no posterior.
    """

    _what = "the posterior"

    def __init__(
        self,
        posterior: Posterior,
        *,
        group_reduction: str | None = "sum",
        normalizer: str | Callable[[Tensor], Tensor] | None = None,
    ):
        if not isinstance(posterior, Posterior):
            raise PruningError(
                f"OPDImportance needs a posterior, not a {type(posterior).__name__}: fit one with "
                "spamprune.fit_posterior, or give scores to ScoreImportance"
            )
        super().__init__(
            posterior.precision(), group_reduction=group_reduction, normalizer=normalizer
        )

    def _score(self, cached: Tensor, parameter: nn.Parameter) -> Tensor:
        return cached * at_least_single(parameter).square()
