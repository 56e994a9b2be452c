"""Small things that every part does with a module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode and restore each one's own mode afterwards.

    timm's attention modules with an ``attention_bias_cache`` are left in training mode, which in
    them does nothing else: the cache would hold on to the graph of another forward pass.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for module in modes:
        if hasattr(module, "attention_bias_cache"):
            module.training = True
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter."""
    return next(model.parameters()).device
