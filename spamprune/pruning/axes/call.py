"""Calls of tensor operations during a trace, and the rules that say what they do with axes.

A rule gets a :class:`Call` and returns the axes of each output, tying axes of inputs on the way.
The operations are those of ATen, of which everything in torch is made, so a network may call what
it likes. An operation without a rule is safe: it fixes every axis that goes into it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from spamprune.pruning.axes.axis import Axis, fix, tie

Axes = list[Axis]

#: Why positions in space, and those of kernels, stay.
SPACE = "positions in space"


class Shadow:
    """What a trace keeps of a tensor: no values, so that no activation is held on to.

    Attributes:
        shape: Of the tensor.
        dtype: Of its elements.
        dims: The axis of each dimension; see :attr:`axes`.
        is_data: Whether it depends on the model's input.
        parameter: Its name, where it is a parameter of the model.
        makers: The calls that wrote it.
        readers: The calls that read it.
        places: The axis that its entries are places on, where they are.
    """

    def __init__(self, tensor: Tensor, axes: Axes, *, is_data: bool = False, parameter: str = ""):
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.dims = axes
        self.is_data, self.parameter = is_data, parameter
        self.makers: list[Call] = []
        self.readers: list[Call] = []
        self.places: Axis | None = None

    @property
    def axes(self) -> Axes:
        """The axes, roots all."""
        return [axis.root() for axis in self.dims]

    def dim(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    def asked(self) -> None:
        """Keep every position that the entries may name, now that somebody asks for these."""
        if self.places is not None:
            fix(self.places, self.makers[0].why)


class Call:
    """One call of an ATen operation during a trace.

    Attributes:
        name: Of the operation, without its overload.
        values: Its arguments by name, those left out included, tensors as shadows.
        shapes: Of the tensors that it returned.
        outputs: Their shadows, once the rule has been asked.
        where: In which module, for messages.
        costs: Multiply-accumulates of matrix products, as axes to be multiplied; appended to.
        number: Of the call within the trace.
        places: The axis that the entries of the last output are places on; set by a rule.
    """

    def __init__(
        self,
        name: str,
        values: dict[str, Any],
        shapes: list[tuple[int, ...]],
        where: str,
        costs: list[Axes],
        number: int,
    ):
        self.name, self.values, self.shapes, self.where = name, values, shapes, where
        self.costs, self.number = costs, number
        self.outputs: list[Shadow] = []
        self.places: Axis | None = None

    def __getitem__(self, name: str) -> Any:
        """Return an argument, None where the operation has none of that name."""
        return self.values.get(name)

    def of(self, name: str) -> Axes:
        """Return the axes of a tensor argument."""
        shadow: Shadow = self.values[name]
        return shadow.axes

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first output."""
        return self.shapes[0]

    @property
    def why(self) -> str:
        """Why an axis that is fixed here is."""
        return f"{self.name} in {self.where or 'the model'} needs all of its positions"

    def tensors(self) -> list[Shadow]:
        """Return the tensors among the arguments."""
        return [
            item
            for value in self.values.values()
            for item in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(item, Shadow)
        ]


@cache
def signature(operation: OpOverload) -> tuple[str, list[str], dict[str, Any]]:
    """Return an operation's name, its positional arguments, and every argument's default."""
    schema = operation._schema
    positional = [a.name for a in schema.arguments if not a.kwarg_only]
    defaults = {a.name: a.default_value for a in schema.arguments}
    return schema.name.partition("::")[2], positional, defaults


Rule = Callable[[Call], list[Axes]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the ATen operations of these names and their in-place forms."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = RULES[f"{name}_"] = function
        return function

    return register


def unknown(call: Call) -> list[Axes]:
    """Fix everything that goes in or comes out of an operation that is not followed."""
    for tensor in call.tensors():
        for axis in tensor.axes:
            fix(axis, f"{call.name} in {call.where or 'the model'} is not followed")
    return fresh(call)


def fresh(call: Call) -> list[Axes]:
    """Return fixed axes for every output."""
    return [[Axis(n, fixed=call.why) for n in shape] for shape in call.shapes]


def same(call: Call, axes: Axes) -> list[Axes]:
    """Return ``axes`` for every output of their shape, fixed ones for any other."""
    sizes = tuple(a.size for a in axes)
    return [
        axes if shape == sizes else [Axis(n, fixed=call.why) for n in shape]
        for shape in call.shapes
    ]


def broadcast(operands: Sequence[Axes], shape: Sequence[int]) -> Axes:
    """Tie axes that meet in an element-wise operation, and return those of its result."""
    result = []
    for i, size in enumerate(shape):
        place = i - len(shape)
        met = [axes[place] for axes in operands if -place <= len(axes)]
        met = [axis for axis in met if axis.size == size] or [Axis(size)]
        for other in met[1:]:
            tie(met[0], other)
        result.append(met[0])
    return result
