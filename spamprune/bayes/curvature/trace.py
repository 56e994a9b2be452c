"""Where parameters meet data: the operations of a forward pass, recorded as they are called.

A :class:`Recorder` intercepts every torch function of a forward pass of an unmodified model.
Tensors that are parameters, or made of parameters alone (a standardised weight, a gathered position
bias), are *pure*; an operation that takes both a pure tensor and data is a *use* of it. Modules
play no part, so subclasses, functional calls, shared weights and repeated calls need no care.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: Operations that repeat a pure tensor for each sample, e.g. a class token.
_BROADCASTS = frozenset({"expand", "expand_as", "broadcast_to", "repeat", "tile"})


def _without_dispatch(function: Any) -> Callable[..., Any]:
    """Return a composite function of torch with its own dispatch to a mode taken out.

    A mode sees such a function whole; the copy lets it see the operations inside.
    """
    names = {**function.__globals__, "has_torch_function": lambda *_: False}
    copy = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


#: Composite functions whose inner operations a mode can see.
COMPOSITES: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: _without_dispatch(F.multi_head_attention_forward)
}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


@dataclass(frozen=True)
class Use:
    """One operation in which pure tensors meet data.

    Attributes:
        name: Of the operation, e.g. ``"linear"``.
        function: The operation itself.
        args: Its positional arguments; data that it changed in place as it was before.
        kwargs: Its keyword arguments.
        output: What it returned.
        pure: The pure tensors among its arguments, each with the names of the parameters that it
            is made of.
        data: The other tensors among its arguments that depend on the data or on parameters.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    pure: tuple[tuple[Tensor, frozenset[str]], ...]
    data: tuple[Tensor, ...]


class Recorder(TorchFunctionMode):
    """A context in which a forward pass reports each :class:`Use`, in the order of the calls.

    Args:
        parameters: The parameters of interest, by name; all others count as constants.
        inputs: The model's input, a batch.
        on_use: Called after each use, before anything can change its output in place.
        repeats: What :attr:`repeats` was in another pass; by default sizes tell.

    Attributes:
        repeats: Of each broadcast of a tensor without samples, in the order of the calls, whether
            it repeats the tensor for each sample.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        inputs: Tensor,
        on_use: Callable[[Use], None],
        repeats: Iterable[bool] | None = None,
    ):
        super().__init__()
        self._on_use = on_use
        self._samples = len(inputs)
        self.repeats: list[bool] = []
        self._told = None if repeats is None else iter(repeats)
        self._origins = {id(p): frozenset([name]) for name, p in parameters.items()}
        self._derived: list[Tensor] = []  # kept alive, so that their ids stay theirs
        self._data: dict[int, weakref.ref[Tensor]] = {}
        self._mark(inputs)

    def _mark(self, tensor: Tensor) -> None:
        """Remember data that needs no gradient; data that does is known by needing it."""
        if not tensor.requires_grad:
            self._data[id(tensor)] = weakref.ref(tensor)

    def _is_data(self, tensor: Tensor) -> bool:
        if id(tensor) in self._origins:
            return False
        if tensor.requires_grad:
            return True
        marked = self._data.get(id(tensor))
        return marked is not None and marked() is tensor

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func in COMPOSITES:
            with self:
                return COMPOSITES[func](*args, **kwargs)
        given = [*tensors_in(args), *tensors_in(kwargs)]
        pure = [t for t in given if id(t) in self._origins]
        data = tuple(t for t in given if self._is_data(t))
        name = getattr(func, "__name__", str(func))
        origins = tuple({id(t): (t, self._origins[id(t)]) for t in pure}.values())
        if pure and data and in_place(name):
            before = args[0].clone()
            output = func(*args, **kwargs)
            data = tuple(before if t is args[0] else t for t in data)
            args = (before, *args[1:])
        else:
            output = func(*args, **kwargs)
        results = list(tensors_in(output))
        if not results:
            if pure and name == "__setitem__":  # writes to data, and returns nothing
                self._on_use(Use(name, func, args, kwargs, output, origins, data))
            return output
        of_samples = data or self._repeats(name, given, results[0])
        if of_samples:
            if pure and any(t.requires_grad for t in results):
                self._on_use(Use(name, func, args, kwargs, output, origins, data))
            for result in results:
                self._mark(result)
        elif pure:
            origin = frozenset().union(*(self._origins[id(t)] for t in pure))
            for result in results:
                if result.requires_grad and id(result) not in self._origins:
                    self._origins[id(result)] = origin
                    self._derived.append(result)
        return output

    def _repeats(self, name: str, given: list[Tensor], result: Tensor) -> bool:
        """Return whether a tensor without samples is repeated here once for each sample."""
        if name not in _BROADCASTS:
            return False
        if self._told is not None:  # in a batch of any size another axis may have that size too
            self.repeats.append(next(self._told, False))
        else:
            source = (1,) * (result.dim() - given[0].dim()) + given[0].shape
            sizes = zip(source, result.shape, strict=True)
            self.repeats.append(any(n == 1 and after == self._samples for n, after in sizes))
        return self.repeats[-1]


def in_place(name: str) -> bool:
    """Return whether an operation of this name writes to its first argument."""
    return (name.endswith("_") and not name.endswith("__")) or (
        name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    )
