"""Running statistics of BatchNorm, which pruning leaves behind."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from spamprune.errors import DataError
from spamprune.modules import batch_norms, device_of, evaluation_mode


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> int:
    """Take every BatchNorm's running statistics anew, as means over the batches.

    All else is in evaluation mode: dropout would change what a BatchNorm behind it sees. Batches
    count by their size. Modes and momenta are restored.

    Args:
        model: The network; its running statistics change in place.
        batches: Inputs, whatever comes with them.

    Returns:
        How many layers have running statistics; nothing is done for 0.

    Raises:
        DataError: There are no batches, or one is too small for a variance.
    """
    layers = batch_norms(model)
    if not layers:
        return 0
    momenta = [layer.momentum for layer in layers]
    device, seen = device_of(model), 0
    with evaluation_mode(model):
        for layer in layers:
            layer.reset_running_stats()
            layer.train()
        try:
            for inputs, _ in batches:
                seen += len(inputs)
                for layer in layers:
                    layer.momentum = len(inputs) / seen
                model(inputs.to(device))
        except ValueError as error:  # torch's, of one value per channel
            raise DataError(
                f"BatchNorm cannot be recalibrated on a batch of {len(inputs)} ({error}): use "
                "larger batches"
            ) from error
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
    if seen == 0:
        raise DataError("BatchNorm cannot be recalibrated without data: the loader is empty")
    return len(layers)
