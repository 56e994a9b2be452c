"""Trying a plan: which groups cannot be pruned after all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spamprune.errors import PruningError
from spamprune.modules import evaluation_mode
from spamprune.pruning.compaction import Plan, apply, difference, masked

#: Largest difference of a compacted network from its masked original, relative to the outputs.
TOLERANCE = 1e-3
Test = Callable[[Sequence[str]], str | None]


def broken(
    model: nn.Module,
    example: Tensor,
    parts: Mapping[str, bool],
    build: Callable[[Iterable[str]], Plan],
) -> dict[str, str]:
    """Return the layers that must be left whole, each with the reason.

    Args:
        model: The network.
        example: Inputs to try it on.
        parts: What loses units, by the name of its first layer, and whether the pruned network
            may differ from the masked one.
        build: Makes the plan for some of the parts only.
    """
    with evaluation_mode(model), torch.no_grad():
        shapes = _shapes(model(example))

    def attempt(layers: Sequence[str], agree: bool) -> str | None:
        try:
            plan = build(layers)
        except PruningError as error:
            return str(error)
        small = apply(model, plan)
        failure = _run(small, example, shapes)
        if failure is not None or not agree:
            return failure
        apart = difference(masked(model, plan), small, example)
        if apart <= TOLERANCE:
            return None
        return f"without its units the outputs differ by {apart:.1e} from the masked network's"

    def runs(layers: Sequence[str]) -> str | None:
        return attempt(layers, agree=False)

    def agrees(layers: Sequence[str]) -> str | None:
        return attempt(layers, agree=True)

    found = _culprits([name for name, joint in parts.items() if not joint], agrees)
    if any(parts.values()):
        found |= _culprits([name for name in parts if name not in found], runs)
    return found


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


def _run(small: nn.Module, example: Tensor, shapes: list[torch.Size]) -> str | None:
    try:
        with evaluation_mode(small), torch.no_grad():
            found = _shapes(small(example))
    except Exception as error:  # a network may raise anything where its code does not fit
        first = str(error).strip().partition("\n")[0]
        return f"without its units the network fails: {type(error).__name__}: {first}"
    if found != shapes:
        return "without its units the network's outputs have other shapes"
    return None


def _shapes(output: object) -> list[torch.Size]:
    return [t.shape for t in tree_leaves(output) if isinstance(t, Tensor)]
