"""Running statistics of BatchNorm, which pruning leaves behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spamprune.errors import DataError
from spamprune.modules import batch_norms, device_of, evaluation_mode


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> int:
    """Take every BatchNorm's running statistics anew, as means over the batches.

    All else is in evaluation mode: dropout would change what a BatchNorm behind it sees. Each call
    of a layer counts by its samples. Modes and momenta are restored; so are the statistics of
    layers that do not run, and on an error those of all.

    Args:
        model: The network; its running statistics change in place.
        batches: Inputs, whatever comes with them.

    Returns:
        How many layers have new statistics.

    Raises:
        DataError: There are no batches, or one is too small for a variance.
    """
    layers = batch_norms(model)
    if not layers:
        return 0
    device, empty = device_of(model), True
    with evaluation_mode(model), _averaging(layers) as seen:
        for inputs, _ in batches:
            empty = False
            try:
                model(inputs.to(device))
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise DataError(
                    f"BatchNorm cannot be recalibrated on a batch of {len(inputs)} ({error}): use "
                    "larger batches"
                ) from error
        if empty:
            raise DataError("BatchNorm cannot be recalibrated without data: the loader is empty")
    return len(seen)


@contextmanager
def _averaging(layers: list[_BatchNorm]) -> Iterator[Counter[_BatchNorm]]:
    """Average the statistics of ``layers`` over all their calls; yield each one's sample count."""
    seen: Counter[_BatchNorm] = Counter()
    before = [(layer.momentum, [b.clone() for b in layer.buffers()]) for layer in layers]

    def weigh(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        samples = len(next(iter((*args, *kwargs.values()))))
        if samples:  # torch takes no statistics of none
            seen[layer] += samples
            layer.momentum = samples / seen[layer]

    hooks = [layer.register_forward_pre_hook(weigh, with_kwargs=True) for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.train()
        yield seen
    except BaseException:
        seen.clear()  # nothing is kept of it
        raise
    finally:
        for layer, hook, (momentum, buffers) in zip(layers, hooks, before, strict=True):
            hook.remove()
            layer.momentum = momentum
            if layer not in seen:
                for buffer, old in zip(layer.buffers(), buffers, strict=True):
                    buffer.copy_(old)
