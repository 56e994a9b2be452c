"""Unstructured pruning: masks that keep the best-scored weights and hold through training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spamprune.bayes.parameters import check_shapes, named_parameters
from spamprune.copies import copied
from spamprune.errors import PruningError

Masks = dict[str, Tensor]


def global_masks(scores: Mapping[str, Tensor], sparsity: float) -> Masks:
    """Return masks that zero the lowest-scored fraction of all weights taken together.

    Exactly ``round(sparsity · n)`` weights are masked; ties go in parameter order.

    Args:
        scores: A score for every parameter, by name; those of :func:`lamp` make tensors comparable.
        sparsity: Fraction of weights to zero, in [0, 1).

    Returns:
        Boolean tensors shaped like the scores, True where a weight stays.

    Raises:
        PruningError: The sparsity is out of range, or a score is not a number.
    """
    _check_sparsity(sparsity)
    check_numbers(scores)
    flat = torch.cat([score.flatten() for score in scores.values()])
    keep = torch.ones(flat.numel(), dtype=torch.bool, device=flat.device)
    keep[flat.argsort(stable=True)[: round(sparsity * flat.numel())]] = False
    parts = keep.split([score.numel() for score in scores.values()])
    return {
        name: part.view(score.shape)
        for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def gone_first(scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return scores by which what is masked already goes before all else, whatever its score."""
    return {name: score.masked_fill(~masks[name], -torch.inf) for name, score in scores.items()}


def lamp(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return layer-adaptive scores ``s_p / Σ_{q: s_q ≥ s_p} s_q``, the sum within p's tensor.

    With squared magnitudes and a global threshold this is LAMP (Lee et al. 2021). Other scores that
    are damages, such as OPD, are squares already. The best entry of each tensor gets 1. Of equal
    scores the earlier counts as the smaller.

    Args:
        scores: A score for every parameter, by name, none negative.

    Returns:
        Scores in float64; a tensor of zeros keeps them.

    Raises:
        PruningError: A score is negative or not a number.
    """
    check_numbers(scores)
    result = {}
    for name, score in scores.items():
        if (score < 0).any():
            raise PruningError(
                f"scores of {name!r} are negative in part, and LAMP divides by their sums: use a "
                "criterion without signs, or no layer-adaptive threshold"
            )
        ranked, order = score.flatten().double().sort(stable=True)
        above = ranked.flip(0).cumsum(0).flip(0)
        shares = torch.where(above > 0, ranked / above, 0.0)
        result[name] = torch.empty_like(shares).scatter_(0, order, shares).view(score.shape)
    return result


def iterative_masks(
    model: nn.Module,
    score: Callable[[nn.Module], Mapping[str, Tensor]],
    sparsity: float,
    *,
    rounds: int = 100,
    start: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Score, mask and score again; round k of n keeps the fraction ``(1 − sparsity)^(k/n)``.

    The schedule of synaptic flow (Tanaka et al. 2020, algorithm 1), for any criterion. What is
    masked stays masked.

    Args:
        model: The network; it is left as it was.
        score: Returns the scores of the network that it is given, a copy under the masks so far.
        sparsity: Fraction of weights to zero in the end, in [0, 1).
        rounds: How many times weights are scored; 1 is one-shot.
        start: Masks that the network has already. Of the weights that these leave each round
            keeps the same fraction.

    Raises:
        PruningError: The sparsity or the number of rounds is out of range, the masks to start with
            leave nothing, or a score is not a number.
    """
    _check_sparsity(sparsity)
    if rounds < 1:
        raise PruningError(f"masks take at least one round of scores, not {rounds}")
    pruned = copied(model)
    parameters = named_parameters(model)
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in parameters.items()}
    masks |= start or {}
    before = 1 - sparsity_of(masks)
    if before <= 0:
        raise PruningError("the masks to start with leave no weight: give others")
    for k in range(1, rounds + 1):
        scores = gone_first(score(pruned), masks)
        kept = before * min(1, (1 - sparsity) / before) ** (k / rounds)
        masks = global_masks(scores, 1 - kept)
        apply_masks(pruned, masks)
    return masks


def sparsity_of(masks: Mapping[str, Tensor]) -> float:
    """Return the fraction of masked weights."""
    total = sum(mask.numel() for mask in masks.values())
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / total


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set masked weights of ``model`` to exactly zero.

    Raises:
        PosteriorError: The masks are those of another model.
    """
    check_shapes(named_parameters(model), masks, "the set of masks")
    for name, parameter in named_parameters(model).items():
        parameter.masked_fill_(~masks[name], 0)


@contextmanager
def held(
    model: nn.Module, masks: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> Iterator[None]:
    """Keep masked weights at exactly zero after each step of ``optimizer``.

    Zeroing after the step holds under momentum, adaptive step sizes and weight decay alike.
    """
    apply_masks(model, masks)
    handle = optimizer.register_step_post_hook(lambda *_: apply_masks(model, masks))
    try:
        yield
    finally:
        handle.remove()


def check_numbers(scores: Mapping[str, Tensor]) -> None:
    """Raise a :class:`PruningError` that names the first tensor with a score that is no number."""
    for name, score in scores.items():
        if score.isnan().any():
            raise PruningError(f"scores of {name!r} are not numbers: is the posterior finite?")


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise PruningError(f"a sparsity lies in [0, 1), not {sparsity}")
