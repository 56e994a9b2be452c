"""What a trace sees of each operation: which axes it ties, and in which module."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from spamprune.errors import PruningError
from spamprune.pruning.axes.axis import Axis, fix, leaves, tie
from spamprune.pruning.axes.call import RULES, Axes, Call, Shadow, signature, unknown
from spamprune.pruning.axes.logits import Logits
from spamprune.pruning.axes.rules.elementwise import pointwise
from spamprune.pruning.axes.sizes import Attribute, Expression

#: A forward pass that takes longer is given up, seconds.
LIMIT = 600
_NOT_A_PARAMETER = "a tensor that is neither parameter nor buffer"
#: In-place operations after which a tensor has other axes.
_RELAID = frozenset({"t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_"})
#: Marks of operations whose result, or the size of it, is not known before they run.
_LOOKS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Recorder(TorchDispatchMode):
    """Follows the axes through every operation; :class:`Code` adds what code says of sizes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.named: dict[str, Shadow] = {}
        self.costs: list[Axes] = []
        self.sizes: list[tuple[Expression, Axis]] = []
        self.logits: list[Logits] = []
        self.bound: dict[Attribute, Axis] = {}
        self.calls = 0
        self.looked = False  # whether Python looked at data, so that these may say what it does
        self.stack: list[nn.Module] = []
        self._paths = {id(m): name for name, m in model.named_modules()}
        self._shadows: dict[int, tuple[weakref.ref[Tensor], Shadow]] = {}
        self._places: dict[tuple[Any, ...], Shadow] = {}
        self._deadline = time.monotonic() + LIMIT
        parameters = dict(model.named_parameters())
        for name, tensor in (*parameters.items(), *model.named_buffers()):
            shadow = Shadow(
                tensor,
                [Axis(n) for n in tensor.shape],
                parameter=name if name in parameters else "",
            )
            self.named[name] = self._places[_place(tensor)] = self._put(tensor, shadow)

    @property
    def where(self) -> str:
        """The path of the module that runs."""
        return self._paths.get(id(self.stack[-1]), "") if self.stack else ""

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Keep track of which module runs."""
        with ExitStack() as hooks:
            for handle in (
                register_module_forward_pre_hook(lambda m, _: self.stack.append(m)),
                register_module_forward_hook(lambda *_: self._leave()),
            ):
                hooks.callback(handle.remove)
            yield

    def _leave(self) -> None:
        self.stack.pop()

    def data(self, example: Tensor) -> Tensor:
        """Return the model's input, known as such."""
        axes = [Axis(n, fixed="the model's input") for n in example.shape]
        self._put(example, Shadow(example, axes, is_data=True))
        return example

    def _put(self, tensor: Tensor, shadow: Shadow) -> Shadow:
        self._shadows[id(tensor)] = (weakref.ref(tensor), shadow)
        return shadow

    def _known(self, tensor: Tensor) -> Shadow | None:
        reference, shadow = self._shadows.get(id(tensor), (None, None))
        if reference is None or reference() is not tensor:  # an id may be used again
            return None
        return shadow

    def shadow(self, tensor: Tensor) -> Shadow:
        """Return the shadow of a tensor; of one from elsewhere all axes are fixed."""
        shadow = self._known(tensor) or self._places.get(_place(tensor))
        if shadow is None:
            shadow = Shadow(tensor, [Axis(n, fixed=_NOT_A_PARAMETER) for n in tensor.shape])
        return self._put(tensor, shadow)

    def axes(self, tensor: Tensor) -> Axes:
        """Return the axes of a tensor, roots all."""
        return self.shadow(tensor).axes

    def knows(self, tensor: Tensor) -> bool:
        """Tell whether a tensor came from an operation that was followed."""
        return self._known(tensor) is not None

    def bind(self, size: Expression, axis: Axis) -> None:
        """Note that a size in the code is the number of positions of ``axis``."""
        settled = axis.size == 1 or all(leaf.fixed for leaf in leaves(axis))
        if settled and not isinstance(size, Attribute):
            return
        if isinstance(size, int):
            fix(axis, f"its size {size} is a plain number in the code of {self.where}")
            return
        if isinstance(size, Attribute):
            known = self.bound.setdefault(size, axis)
            if known.root() is not axis.root():
                tie(known, axis)
                return
        self.sizes.append((size, axis))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if time.monotonic() > self._deadline:
            raise PruningError(
                f"following the network took over {LIMIT} s, up to {self.where}: give a smaller "
                "example"
            )
        several = result if isinstance(result, (tuple, list)) else [result]
        outputs = [t for t in several if isinstance(t, Tensor)]
        name, positional, defaults = signature(func)
        values = defaults | dict(zip(positional, args, strict=False)) | (kwargs or {})
        values = {key: self._shadowed(value) for key, value in values.items()}
        shapes = [tuple(t.shape) for t in outputs]
        call = Call(name, values, shapes, self.where, self.costs, self.calls)
        read = call.tensors()
        for shadow in read:
            shadow.asked()
        self.looked |= not _LOOKS.isdisjoint(func.tags) and not _by_number(call)
        if not outputs:
            return result
        self.calls += 1
        rule = RULES.get(name)
        if rule is None:
            rule = pointwise if torch.Tag.pointwise in func.tags else unknown
        found = rule(call)
        is_data = any(shadow.is_data for shadow in read)
        for tensor, axes in zip(outputs, found, strict=True):
            shadow = self._known(tensor)
            if shadow is not None and name not in _RELAID:  # written in place
                for old, new in zip(shadow.axes, axes, strict=True):
                    tie(old, new)
            else:
                shadow = self._put(tensor, Shadow(tensor, axes))
            shadow.is_data |= is_data
            shadow.makers.append(call)
            call.outputs.append(shadow)
        call.outputs[-1].places = call.places
        for shadow in read:
            shadow.readers.append(call)
        return result

    def _shadowed(self, value: Any) -> Any:
        """Return an argument with its tensors replaced by their shadows."""
        if isinstance(value, Tensor):
            return self.shadow(value)
        if isinstance(value, (list, tuple)):
            return [self._shadowed(item) for item in value]
        return value


def _by_number(call: Call) -> bool:
    """Tell an index by numbers, whose size is known, from one by a mask."""
    return call.name in ("index", "_unsafe_index") and not any(
        table.dtype.itemsize == 1 for table in call["indices"] if table is not None
    )


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
