"""How a model differs from the freshly built one that it was made from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from spamprune.artifact.facts import (
    HOOKS,
    Words,
    alike,
    default,
    hooks,
    replaces_method,
    telling,
    tensors_in,
)
from spamprune.artifact.format import kind, own_attributes, slots
from spamprune.errors import ArtifactError

Attributes = dict[str, dict[str, Any]]  # module → attribute → value


def check_rebuildable(model: nn.Module, built: nn.Module) -> None:
    """Check that both models have the same modules, hooks and places for tensors.

    Raises:
        ArtifactError: They differ in what an artifact cannot record.
    """
    modules, expected = dict(model.named_modules()), dict(built.named_modules())
    for name in {**modules, **expected}:
        found, wanted = modules.get(name), expected.get(name)
        if found is None or wanted is None or _class_of(found) != _class_of(wanted):
            what = f"is {type(found).__name__}, not {type(wanted).__name__} as built"
            raise _not_rebuildable(name, what)
        for which in HOOKS:
            if len(getattr(found, which)) != len(getattr(wanted, which)):
                raise _not_rebuildable(name, "has forward hooks, which are code")
        _check_extra_state(name, found)
    places, wanted_places = slots(model), slots(built)
    for name in sorted(places.keys() ^ wanted_places.keys()):
        state = "is not there" if name in wanted_places else "was added"
        raise _not_rebuildable(name, state)


def check_self_contained(model: nn.Module) -> None:
    """Check that a function which calls the model's class can remake what an artifact lacks.

    Raises:
        ArtifactError: Tensors lie outside parameters and buffers, or there is code that does not
            come from the network's classes.
    """
    kept = {id(slot.tensor) for slot in slots(model).values()}
    for name, module in model.named_modules():
        _check_extra_state(name, module)
        for key, value in telling(module).items():
            lost = [tensor for tensor in tensors_in(value) if id(tensor) not in kept]
            if any(isinstance(tensor, nn.Parameter) for tensor in lost):
                how = "use nn.ModuleList, nn.ModuleDict or nn.ParameterList"
                raise _not_kept(name, key, "holds parameters that are not the module's own", how)
            if lost and isinstance(value, Tensor):  # those in containers are compared by ``load``
                how = "register it as a buffer, or set it to None if nothing is computed with it"
                raise _not_kept(name, key, "is a plain tensor", how)
            if replaces_method(module, key, value):
                raise _not_rebuildable(name, f"has its own {key!r}, which is code")
        for which in HOOKS:
            if not all(_is_code_of(model, hook) for hook in hooks(module, which)):
                raise _not_rebuildable(name, "has forward hooks, which are code")


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
    words, words_built = Words(model, exact=True), Words(built, exact=True)
    for name, module in model.named_modules():
        before = own_attributes(expected[name])
        for key, new in telling(module).items():
            if key not in before and replaces_method(module, key, new):
                raise _not_rebuildable(name, f"has its own {key!r}, which is code")
            old = before[key] if key in before else default(module, key)
            if old is ...:
                continue
            settable = old is None or kind(old) == kind(new)
            if kind(new) and settable:
                if _as_lists(old) != _as_lists(new):
                    changed.setdefault(name, {})[key] = new
                continue
            said, expected_words = words.of(new), words_built.of(old)
            if not alike(said, expected_words):
                raise _not_rebuildable(name, f"has {key} = {said}, built with {expected_words}")
    return changed


def same(first: Tensor, second: Tensor | None) -> bool:
    """Tell whether two tensors are equal in type, shape and every bit that counts."""
    return (
        second is not None
        and first.dtype == second.dtype
        and torch.equal(first.cpu(), second.cpu())
    )


def _class_of(module: nn.Module) -> tuple[bool, tuple[type, ...]]:
    """Return what tells a module's class: torch makes a new one for each parametrized module."""
    parametrized = is_parametrized(module)
    return parametrized, type(module).__bases__ if parametrized else (type(module),)


def _is_code_of(model: nn.Module, function: Callable[..., Any]) -> bool:
    """Tell whether a function was defined in a class of the network, or beside one by name."""
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__qualname__", "<>")
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    beside = "<" not in name and function.__module__ in {cls.__module__ for cls in classes}
    return beside or any(name.startswith(f"{cls.__qualname__}.") for cls in classes)


def _check_extra_state(name: str, module: nn.Module) -> None:
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        raise ArtifactError(
            f"{name or 'the model'!r} has get_extra_state, whose result an artifact cannot hold: "
            "keep that state in buffers"
        )


def _not_kept(name: str, key: str, what: str, how: str) -> ArtifactError:
    return ArtifactError(
        f"{key!r} of {name or 'the model'!r} {what}, which an artifact does not hold: {how}, or, "
        "where it is the same each time the model is built, pass spamprune.save the factory"
    )


def _not_rebuildable(name: str, what: str) -> ArtifactError:
    return ArtifactError(
        f"{name or 'the model'!r} {what}, which an artifact cannot record: make that change inside "
        "a function that builds the unpruned model, and pass it as the factory of both "
        "spamprune.save and spamprune.load"
    )


def _as_lists(value: Any) -> Any:
    """Return ``value`` with its tuples turned into lists, as JSON would."""
    return [_as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value
