"""Trying a plan: which groups cannot be pruned after all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import zip_longest

from torch import Tensor, nn

from spamprune.errors import PruningError
from spamprune.pruning.axes.steps import Steps
from spamprune.pruning.axes.trace import Trace, shapes_of
from spamprune.pruning.compaction import outputs_of

Test = Callable[[Sequence[str]], str | None]


def broken(
    example: Tensor,
    traced: Trace,
    parts: Sequence[str],
    prune: Callable[[Sequence[str]], nn.Module],
) -> dict[str, str]:
    """Return the parts that must be left whole, each with the reason.

    Args:
        example: Inputs to try pruned networks on.
        traced: The trace of the network on them.
        parts: What loses units, each by the name of its first layer.
        prune: Prunes some of the parts only.
    """

    def failure(chosen: Sequence[str]) -> str | None:
        try:
            small = prune(chosen)
        except PruningError as error:
            return str(error)
        try:
            with Steps() as steps:
                outputs = outputs_of(small, example)
            if any(isinstance(m, nn.MultiheadAttention) for m in small.modules()):
                outputs = outputs_of(small, example)  # along its fast path, which Steps closes
        except Exception as error:  # a network may raise anything where its code does not fit
            first = str(error).strip().partition("\n")[0]
            return f"without its units the network fails: {type(error).__name__}: {first}"
        if shapes_of(outputs) != traced.outputs:
            return "without its units the network's outputs have other shapes"
        if traced.steps in (None, steps.names):
            return None
        # it may have been the first to run, and keep what it made for later calls
        return _detour(second_steps(), _steps(small, example))

    @cache
    def second_steps() -> list[str]:
        whole = prune(())
        _steps(whole, example)
        return _steps(whole, example)

    return _culprits(parts, failure)


def _steps(network: nn.Module, example: Tensor) -> list[str]:
    """Return the functions that a network's code calls."""
    with Steps() as steps:
        outputs_of(network, example)
    return steps.names


def _detour(expected: Sequence[str], found: Sequence[str]) -> str | None:
    """Say where a pruned network's code takes another way than the network's own."""
    for a, b in zip_longest(expected, found, fillvalue="nothing"):
        if a != b:
            return f"without its units the code goes another way: it calls {b} in place of {a}"
    return None


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
