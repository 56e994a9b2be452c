"""Small things that every part does with a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm


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


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorms that have running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter."""
    return next(model.parameters()).device


def call_with(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Tensor) -> Any:
    """Call ``model`` with other tensors in the place of its own, by name.

    ``torch.func.functional_call`` leaves a module that is used in two places with the tensors it
    was called with (torch 2.15); here every module has its own back afterwards.
    """
    given = {id(tensor) for tensor in tensors.values()}
    own = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    try:
        return functional_call(model, dict(tensors), (inputs,))
    finally:
        for module, parameters, buffers in own:
            module._parameters.update(parameters)
            # a buffer that the forward pass itself replaced stays
            kept = {key: old for key, old in buffers.items() if id(module._buffers[key]) in given}
            module._buffers.update(kept)
