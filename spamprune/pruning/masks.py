"""Unstructured pruning: masks that keep the best-scored weights and hold through training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spamprune.bayes.parameters import check_shapes, named_parameters
from spamprune.errors import PruningError

Masks = dict[str, Tensor]


def global_masks(scores: Mapping[str, Tensor], sparsity: float) -> Masks:
    """Return masks that zero the lowest-scored fraction of all weights taken together.

    Exactly ``round(sparsity · n)`` weights are masked; ties go in parameter order.

    Args:
        scores: A score for every parameter, by name.
        sparsity: Fraction of weights to zero, in [0, 1).

    Returns:
        Boolean tensors shaped like the scores, True where a weight stays.

    Raises:
        PruningError: The sparsity is out of range, or a score is not a number.
    """
    if not 0 <= sparsity < 1:
        raise PruningError(f"a sparsity lies in [0, 1), not {sparsity}")
    for name, score in scores.items():
        if score.isnan().any():
            raise PruningError(f"scores of {name!r} are not numbers: is the posterior finite?")
    flat = torch.cat([score.flatten() for score in scores.values()])
    keep = torch.ones(flat.numel(), dtype=torch.bool, device=flat.device)
    keep[flat.argsort(stable=True)[: round(sparsity * flat.numel())]] = False
    parts = keep.split([score.numel() for score in scores.values()])
    return {
        name: part.view(score.shape)
        for (name, score), part in zip(scores.items(), parts, strict=True)
    }


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
    check_shapes(model, masks, "the set of masks")
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
