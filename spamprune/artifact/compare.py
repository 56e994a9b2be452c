"""How a model differs from the freshly built one that it was made from."""

from __future__ import annotations

from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from spamprune.artifact.format import kind, own_attributes, slots
from spamprune.errors import ArtifactError

Attributes = dict[str, dict[str, Any]]  # module → attribute → value

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def check_rebuildable(model: nn.Module, built: nn.Module) -> None:
    """Check that both models have the same modules, hooks and places for tensors.

    Raises:
        ArtifactError: They differ in what an artifact cannot record.
    """
    modules, expected = dict(model.named_modules()), dict(built.named_modules())
    for name in {**modules, **expected}:
        found, wanted = modules.get(name), expected.get(name)
        if type(found) is not type(wanted):
            what = f"is {type(found).__name__}, not {type(wanted).__name__} as built"
            raise _not_rebuildable(name, what)
        for hooks in _HOOKS:
            if len(getattr(found, hooks)) != len(getattr(wanted, hooks)):
                raise _not_rebuildable(name, "has forward hooks, which are code")
    places, wanted_places = slots(model), slots(built)
    for name in sorted(places.keys() ^ wanted_places.keys()):
        state = "is not there" if name in wanted_places else "was added"
        raise _not_rebuildable(name, state)


def plain_attributes(model: nn.Module) -> Attributes:
    """Return every attribute that an artifact may set."""
    return {
        name: {key: value for key, value in own_attributes(module).items() if kind(value)}
        for name, module in model.named_modules()
    }


def changed_attributes(model: nn.Module, built: nn.Module) -> Attributes:
    """Return the attributes that differ.

    Raises:
        ArtifactError: A difference cannot be recorded.
    """
    changed: Attributes = {}
    expected = dict(built.named_modules())
    for name, module in model.named_modules():
        before, after = own_attributes(expected[name]), own_attributes(module)
        for key, new in after.items():
            if key not in before:
                if callable(new) and hasattr(type(module), key):
                    raise _not_rebuildable(name, f"has its own {key!r}, which is code")
                continue
            old = before[key]
            if kind(new) and (old is None or kind(old) == kind(new)):
                if _as_lists(old) != _as_lists(new):
                    changed.setdefault(name, {})[key] = new
            elif kind(old) or kind(new) or _opaque_change(old, new):
                raise _not_rebuildable(name, f"has {key} = {new!r:.80}, built with {old!r:.80}")
    return changed


def same(first: Tensor, second: Tensor | None) -> bool:
    """Tell whether two tensors are equal in type, shape and every bit that counts."""
    return (
        second is not None
        and first.dtype == second.dtype
        and torch.equal(first.cpu(), second.cpu())
    )


def _opaque_change(old: object, new: object) -> bool:
    """Tell whether an attribute that cannot be saved has visibly changed."""
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return not same(old, new)
    if isinstance(old, (FunctionType, BuiltinFunctionType)):
        return getattr(new, "__qualname__", None) != old.__qualname__
    return isinstance(old, (str, float)) and old != new and repr(old) != repr(new)


def _not_rebuildable(name: str, what: str) -> ArtifactError:
    return ArtifactError(
        f"{name or 'the model'!r} {what}, which an artifact cannot record: make that change inside "
        "a function that builds the unpruned model, and pass it as the factory of both "
        "spamprune.save and spamprune.load"
    )


def _as_lists(value: Any) -> Any:
    """Return ``value`` with its tuples turned into lists, as JSON would."""
    return [_as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value
