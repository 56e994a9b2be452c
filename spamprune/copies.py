"""Copies of a network that compute with nothing of the original's."""

from __future__ import annotations

import copy
import dis
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, partial
from types import CodeType, FunctionType, MethodType

from torch import Tensor, nn

from spamprune.errors import PruningError

#: What is looked at otherwise, or called with gradients, state dicts or modes, never in a forward
#: pass.
_ASIDE = {
    *("_parameters", "_buffers", "_modules", "train"),
    *("_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
}

#: Where a search ends: their own parts are looked at in other ways.
_ENDS = (nn.Module, Tensor)


def copied(model: nn.Module, replaced: Mapping[int, object] | None = None) -> nn.Module:
    """Return a deep copy of ``model``.

    ``copy.deepcopy`` leaves functions as they are: what they have captured is still the original's.

    Args:
        model: The network; it is left as it is.
        replaced: What takes the place of some of its tensors, by their ``id``.

    Raises:
        PruningError: It cannot be copied, or the copy would compute with the original's weights.
    """
    name = type(model).__name__
    try:
        result = copy.deepcopy(model, dict(replaced or {}))
    except RuntimeError as error:  # such as the results that torch.nn.utils.weight_norm keeps
        raise PruningError(f"the {name} cannot be copied: {error}") from error
    place = _shared(result, model)
    if place is not None:
        raise PruningError(
            f"the {name} cannot be copied: the copy might go on computing with the original's "
            f"weights, which a function in {place!r} has captured: wrap, hook or compile the "
            "network after pruning, and write functions of its own layers as methods"
        )
    return result


def _shared(result: nn.Module, original: nn.Module) -> str | None:
    """Return the attribute of a copy whose function reaches something of the original, if any."""
    parts = {id(part) for part in _parts(original)}
    checked: set[int] = set()
    for path, module in result.named_modules():
        for name, value in vars(module).items():
            for end in () if name in _ASIDE else _reached(value):
                if isinstance(end, _ENDS) and id(end) not in checked:
                    checked.add(id(end))
                    if any(id(part) in parts for part in _parts(end)):
                        return f"{path}.{name}" if path else name
    return None


def _parts(value: nn.Module | Tensor) -> Iterator[nn.Module | Tensor]:
    """Yield a tensor, or a module and all modules and tensors in it."""
    if isinstance(value, Tensor):
        yield value
        return
    for parts in (value.modules(), value.parameters(), value.buffers()):
        yield from parts


def _reached(start: object) -> Iterator[object]:
    """Yield what can be called or taken from ``start``."""
    seen: set[int] = set()
    waiting = [start]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if not isinstance(value, _ENDS):
            waiting.extend(_children(value))


def _children(value: object) -> Iterable[object]:
    """Return what a container holds, or what a function or a wrapper of one calls upon."""
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    if isinstance(value, MethodType):
        return value.__self__, value.__func__
    if not callable(value) or isinstance(value, type):
        return ()  # it may hold anything, such as all that a training loop knows
    own = getattr(value, "__dict__", {}).values()
    if isinstance(value, partial):
        return *own, value.func, *value.args, *value.keywords.values()
    if isinstance(value, FunctionType):
        defaults = *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()
        return *own, *defaults, *_enclosed(value), *_globals(value)
    return own


def _enclosed(function: FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # nothing was ever assigned
            continue


def _globals(function: FunctionType) -> Iterator[object]:
    """Yield the networks, tensors and methods that a function reads as global variables."""
    for name in _global_names(function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, (*_ENDS, MethodType)):
            yield value


@cache
def _global_names(code: CodeType) -> frozenset[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    read = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return frozenset(read).union(*map(_global_names, inner))
