"""Trying a plan: which groups cannot be pruned after all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from spamprune.errors import PruningError
from spamprune.pruning.axes.trace import shapes_of
from spamprune.pruning.compaction import outputs_of

Test = Callable[[Sequence[str]], str | None]


def broken(
    example: Tensor,
    shapes: Sequence[torch.Size],
    parts: Sequence[str],
    prune: Callable[[Sequence[str]], nn.Module],
) -> dict[str, str]:
    """Return the parts that must be left whole, each with the reason.

    Args:
        example: Inputs to try pruned networks on.
        shapes: Of the network's outputs for them.
        parts: What loses units, each by the name of its first layer.
        prune: Prunes some of the parts only.
    """

    def failure(chosen: Sequence[str]) -> str | None:
        try:
            small = prune(chosen)
        except PruningError as error:
            return str(error)
        try:
            outputs = outputs_of(small, example)
        except Exception as error:  # a network may raise anything where its code does not fit
            first = str(error).strip().partition("\n")[0]
            return f"without its units the network fails: {type(error).__name__}: {first}"
        if shapes_of(outputs) != shapes:
            return "without its units the network's outputs have other shapes"
        return None

    return _culprits(parts, failure)


def _culprits(layers: Sequence[str], test: Test) -> dict[str, str]:
    """Find by halving which layers make a test fail."""
    if not layers:
        return {}
    failure = test(layers)
    if failure is None:
        return {}
    if len(layers) == 1:
        return {layers[0]: failure}
    half = len(layers) // 2
    found = _culprits(layers[:half], test) | _culprits(layers[half:], test)
    # each half alone is fine: the two together are not
    return found or dict.fromkeys(layers[half:], failure)
