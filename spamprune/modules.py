"""Small things that every part does with a module."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from spamprune.errors import SpampruneError


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
        for module, mode in modes.items():  # their own methods may do more than set a flag
            if module.training != mode:
                module.train(mode)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Evaluation mode in which the loss's own gradients can be taken, whatever mode is outside.

    Hooks that change gradients, such as those that clip them in training, are set aside, and
    buffers that a forward pass changes are restored. cuDNN takes no gradients of recurrent layers
    in evaluation mode, and no second ones: models that have such layers do without it.
    """
    before = torch.backends.cudnn.enabled
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with (
        evaluation_mode(model),
        same_buffers(model),
        _without_backward_hooks(model),
        torch.enable_grad(),
    ):
        torch.backends.cudnn.enabled = before and not recurrent
        try:
            yield
        finally:
            torch.backends.cudnn.enabled = before


@contextmanager
def _without_backward_hooks(model: nn.Module) -> Iterator[None]:
    """Set aside what is called with gradients of parameters or modules, and may change them."""
    owners: list[Any] = [*model.modules(), *model.parameters()]
    names = ("_backward_hooks", "_backward_pre_hooks")
    hooks = [(o, name, getattr(o, name)) for o in owners for name in names if hasattr(o, name)]
    for owner, name, found in hooks:
        if found:
            setattr(owner, name, OrderedDict() if isinstance(owner, nn.Module) else None)
    try:
        yield
    finally:
        for owner, name, found in hooks:
            if found:
                setattr(owner, name, found)


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 numbers as they are, not rounded to ten bits (TF32) on a GPU.

    Convolutions are by default, where a kernel for the shape does so: what is the same in two
    shapes may be a thousandth apart.
    """
    value: Any
    places: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    name, value = "allow_tf32", False
    if hasattr(torch.backends.cudnn, "conv"):  # from torch 2.9, where mixing in the old way fails
        places[0] = torch.backends.cudnn.conv
        name, value = "fp32_precision", "ieee"
    before = [getattr(place, name) for place in places]
    try:
        for place in places:
            setattr(place, name, value)
        yield
    finally:
        for place, old in zip(places, before, strict=True):
            setattr(place, name, old)


def _is_written(buffer: Tensor) -> bool:
    """Tell whether a forward pass can write to a tensor, and that can be seen and undone."""
    if buffer.layout != torch.strided or buffer.is_meta or buffer.is_nested:
        return False
    expanded = not buffer.is_quantized and any(
        n > 1 and stride == 0 for n, stride in zip(buffer.shape, buffer.stride(), strict=True)
    )
    return not expanded


@contextmanager
def same_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the buffers that a forward pass changes or replaces, such as a count of its calls."""
    own = [
        (module._buffers, dict(module._buffers))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)  # whose buffers no one can put back
    ]
    values = [(buffer, buffer.clone()) for buffer in model.buffers() if _is_written(buffer)]
    try:
        yield
    finally:
        for buffers, before in own:
            buffers.update(before)
        for buffer, value in values:
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)


def check_python(model: nn.Module, kind: type[SpampruneError]) -> None:
    """Raise an error of this kind if TorchScript holds code of ``model``, which is not followed."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise kind(
                f"{name or 'the model'} is a torch.jit.{type(module).__name__}, whose code cannot "
                "be followed: give the Python module that it was made from"
            )


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
