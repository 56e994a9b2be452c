"""What a network computes with and an artifact does not hold, in words that can be compared.

Text, functions, dicts and other objects are never set by ``load``. Their words tell whether two
networks agree in them; objects of classes unknown here are told apart by class only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cached_property, partial
from inspect import getattr_static
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from spamprune.artifact.format import kind, own_attributes, slots
from spamprune.modules import evaluation_mode

Facts = dict[str, dict[str, str]]  # module → attribute → words

HOOKS = ("_forward_hooks", "_forward_pre_hooks")

_LONG = 160  # characters, beyond which words end in a digest
_PRINTED = (bool, int, float, complex, str, bytes, slice, range, torch.dtype)
_CACHED = ("tensor", "a ")  # how the words of tensors, and of objects of unknown classes, begin
_RECOMPUTING = (WeightNorm, SpectralNorm, BasePruningMethod)  # torch's own hooks
# where a network came from and where it is; not what it computes
_IGNORED = frozenset(
    {
        "_compiled_call_impl",
        "_model_args",
        "default_cfg",
        "device",
        "example_input_array",  # Lightning's
        "feature_info",
        "pretrained_cfg",
        "pretrained_model_args",
        "spamprune_source",
        "train",
    }
)


class Words:
    """Words for the attributes of one network.

    Args:
        model: The network; its parameters, buffers and modules need no words of their own.
        exact: Tell apart tensors that differ in any bit. Else floating-point ones are told apart
            by type, shape and norms, since a factory may round otherwise on another machine.
        spelled: Text as it is. Else by a digest: an artifact may be published, and a user's
            network may hold what is not for others.
    """

    def __init__(self, model: nn.Module, *, exact: bool, spelled: bool = True):
        self._tensors = {id(slot.tensor) for slot in slots(model).values()}
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._exact, self._spelled = exact, spelled

    def of(self, value: Any) -> str:
        """Return words for a value: the same for equal ones, built anew included."""
        try:
            text = self._of(value)
        except Exception:  # a container in itself, an object that cannot be read
            text = f"a {type(value).__name__}"
        if len(text) <= _LONG:
            return text
        return f"{text[: _LONG // 2]}… {_digest(text.encode(errors='backslashreplace'))}"

    def _of(self, value: Any) -> str:
        if isinstance(value, Enum):
            return f"{type(value).__name__}.{value.name or value.value}"
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, (str, bytes)) and not self._spelled:
            content = value if isinstance(value, bytes) else value.encode(errors="replace")
            return f"text {_digest(content)}"
        if value is None or isinstance(value, _PRINTED):
            return repr(value)
        if isinstance(value, Tensor):
            return "its parameter or buffer" if id(value) in self._tensors else self._tensor(value)
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            return self._tensor(torch.from_numpy(value.copy()))
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, (list, tuple)):
            items = [self._of(item) for item in value]
            return _marked(items) + f"[{', '.join(items)}]"
        if isinstance(value, (set, frozenset)):
            return f"{{{', '.join(sorted(map(self._of, value)))}}}"
        if isinstance(value, Mapping):
            pairs = sorted((self._of(key), self._of(item)) for key, item in value.items())
            text = ", ".join(f"{key}: {item}" for key, item in pairs)
            return _marked([item for _, item in pairs]) + f"{{{text}}}"
        return self._object(value)

    def _object(self, value: Any) -> str:
        if isinstance(value, partial):
            return f"partial of {self._of([value.func, value.args, value.keywords])}"
        if isinstance(value, type):
            return f"class {value.__name__}"
        if callable(value) and hasattr(value, "__name__"):
            return f"function {value.__name__}"
        if is_dataclass(value):
            state = {entry.name: getattr(value, entry.name, None) for entry in fields(value)}
            return f"{type(value).__name__} {self._of(state)}"
        return f"a {type(value).__name__}"

    def _module(self, module: nn.Module) -> str:
        if id(module) in self._modules:
            return f"module {self._modules[id(module)]!r}"
        state = {name: slot.tensor for name, slot in slots(module).items()}
        return f"{type(module).__name__} {self._of(state)}"

    def _tensor(self, tensor: Tensor) -> str:
        text = f"tensor {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            return text
        values = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        if tensor.is_floating_point() and not self._exact:
            norms = [values.double().norm(p).item() for p in (1, 2)]
            return f"{text} of norms {norms[0]:.4g} and {norms[1]:.4g}"
        return f"{text} {_digest(values.view(torch.uint8).numpy().tobytes())}"


def facts(model: nn.Module) -> Facts:
    """Return, in words, what an artifact does not hold: attributes in evaluation mode, hooks."""
    found: Facts = {}
    by_class = {spelled: Words(model, exact=False, spelled=spelled) for spelled in (True, False)}
    with evaluation_mode(model):
        for name, module in model.named_modules():
            words, own = by_class[is_torchs(module)], telling(module)
            told = {key: words.of(value) for key, value in own.items() if not kind(value)}
            told |= {key: words.of(hooks(module, key)) for key in HOOKS if hooks(module, key)}
            if told:
                found[name] = told
    return found


def differing(saved: Facts, model: nn.Module) -> Iterator[tuple[str, str, str, str]]:
    """Yield module, attribute, words saved and words found wherever ``model`` has other facts."""
    by_class = {spelled: Words(model, exact=False, spelled=spelled) for spelled in (True, False)}
    for name, module in model.named_modules():
        words = by_class[is_torchs(module)]
        told = saved.get(name, {})
        for key in HOOKS:
            found = words.of(hooks(module, key))
            if told.get(key, "[]") != found:
                yield name, key, told.get(key, "[]"), found
        there = telling(module)
        for key in told.keys() - set(HOOKS):
            value = there[key] if key in there else default(module, key)
            found = words.of(value)
            if value is not ... and not alike(told[key], found):
                yield name, key, told[key], found


def is_torchs(module: nn.Module) -> bool:
    """Tell whether torch defines a module's class, all of whose settings count."""
    return type(module).__module__.partition(".")[0] == "torch"


def alike(saved: str, built: str) -> bool:
    """Tell whether words agree; what use may have put where nothing was built counts as equal."""
    cached = built == "None" and saved.startswith(_CACHED)
    return saved == built or built in ("[]", "{}") or cached


def telling(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes less those that say nothing of what it computes.

    A metric of torchmetrics, as training modules have them, watches and computes nothing.
    """
    if any(cls.__module__.partition(".")[0] == "torchmetrics" for cls in type(module).__mro__):
        return {}
    recomputed = {
        getattr(hook, "_tensor_name", getattr(hook, "name", None))
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, _RECOMPUTING)
    }
    return {
        key: value
        for key, value in own_attributes(module).items()
        if key not in _IGNORED and key not in recomputed
    }


def default(module: nn.Module, key: str) -> Any:
    """Return what the class has for an attribute that the module lacks; ``...`` for nothing."""
    value = getattr(type(module), key, ...)
    return ... if isinstance(value, (property, cached_property)) else value


def hooks(module: nn.Module, which: str) -> list[Callable[..., Any]]:
    """Return a module's hooks, less those of torch that recompute weights from what is stored."""
    found = getattr(module, which).values()
    return [hook for hook in found if not isinstance(hook, _RECOMPUTING)]


def replaces_method(module: nn.Module, key: str, value: object) -> bool:
    """Tell whether an attribute stands before a method of the class and is none of its methods."""
    method = getattr_static(type(module), key, None)
    if not isinstance(method, FunctionType) or method is nn.Module.forward:
        return False
    return not (
        isinstance(value, MethodType)
        and value.__self__ is module
        and getattr_static(type(module), value.__name__, None) is value.__func__
    )


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors in an attribute, those in containers and in modules there included."""
    waiting, seen = [value], set[int]()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, nn.Module):
            yield from item.parameters()
        elif isinstance(item, (list, tuple, set, frozenset, Mapping)):
            waiting.extend(item.values() if isinstance(item, Mapping) else item)


def _marked(items: list[str]) -> str:
    """Return the mark of a container of tensors and nothing else, for ``alike``."""
    return "tensors " if items and all(item.startswith("tensor") for item in items) else ""


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
