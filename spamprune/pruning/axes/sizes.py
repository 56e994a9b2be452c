"""Integers that remember where they come from.

Code such as ``x.reshape(B, N, 3, self.num_heads, C // self.num_heads)`` keeps sizes in attributes
of modules and takes others from tensors. While a network is traced, both are :class:`Size`, an
``int`` that carries its expression through arithmetic, so that it is known afterwards which
attribute must follow which axis, and which sizes are plain numbers and can never change.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import nn

from spamprune.pruning.axes.axis import Axis, count


@dataclass(frozen=True)
class Attribute:
    """An integer that a module keeps: ``path.name``, or an item of it where it is a sequence."""

    path: str
    name: str
    item: int | None = None

    def __str__(self) -> str:
        """Return how code would write it."""
        dotted = f"{self.path}.{self.name}" if self.path else self.name
        return dotted if self.item is None else f"{dotted}[{self.item}]"


@dataclass(frozen=True, eq=False)
class Operation:
    """An arithmetic operation on two expressions."""

    function: Callable[[int, int], int]
    left: Expression
    right: Expression


Expression = int | Attribute | Axis | Operation
Counts = Mapping[Axis, int]
Values = Mapping[Attribute, int]

#: What code computed with while a network was tracked, other than sizes.
_NUMBERS: ContextVar[list[Expression]] = ContextVar("_NUMBERS")


class Size(int):
    """An integer and the expression that gave it."""

    expression: Expression

    def __new__(cls, value: int, expression: Expression) -> Size:
        """Return ``value`` with its origin."""
        size = super().__new__(cls, value)
        size.expression = expression
        return size

    def __neg__(self) -> Size:
        """Return the negative, with its origin."""
        own = self.expression
        if isinstance(own, Operation) and own.function is operator.sub and own.left == 0:
            return Size(-int(self), own.right)
        return Size(-int(self), Operation(operator.sub, 0, own))

    def as_number(self) -> int:
        """Return a number to compute with, such as a scale: it changes when positions go."""
        _NUMBERS.get([]).append(self.expression)
        return int(self)

    def __float__(self) -> float:
        """Return a number to compute with."""
        return float(self.as_number())

    def __truediv__(self, other: Any) -> Any:
        """Divide as a number to compute with."""
        return self.as_number() / other

    def __rtruediv__(self, other: Any) -> Any:
        """Divide as a number to compute with."""
        return other / self.as_number()

    def __pow__(self, other: Any) -> Any:  # type: ignore[override]
        """Raise as a number to compute with."""
        return self.as_number() ** other

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Take part in numpy's arithmetic as a number to compute with."""
        numbers = (v.as_number() if isinstance(v, Size) else v for v in inputs)
        return getattr(ufunc, method)(*numbers, **options)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        """Copy and pickle as a plain integer."""
        return int, (int(self),)


def _arithmetic(name: str) -> None:
    function = getattr(operator, name)
    plain, reflected = getattr(int, f"__{name}__"), getattr(int, f"__r{name}__")

    def forward(self: Size, other: Any) -> Any:
        if isinstance(other, float):
            return function(float(self), other)
        result = plain(self, other)
        if type(result) is not int:
            return result
        return Size(result, Operation(function, self.expression, expression_of(other)))

    def backward(self: Size, other: Any) -> Any:
        result = reflected(self, other)
        if type(result) is not int:
            return result
        return Size(result, Operation(function, expression_of(other), self.expression))

    setattr(Size, f"__{name}__", forward)
    setattr(Size, f"__r{name}__", backward)


for _name in ("add", "sub", "mul", "floordiv"):
    _arithmetic(_name)


def expression_of(value: int) -> Expression:
    """Return the expression of a size, a plain number's being itself."""
    return value.expression if isinstance(value, Size) else int(value)


@contextmanager
def tracked(model: nn.Module) -> Iterator[list[Expression]]:
    """Make every integer that a module keeps, alone or in a list or tuple, a :class:`Size`.

    Afterwards modules have the attributes they had, whatever a forward pass set. Yields what code
    computes with meanwhile, other than sizes.
    """
    originals = [(vars(module), dict(vars(module))) for module in model.modules()]
    for path, module in model.named_modules():
        own = vars(module)
        own.update({k: _wrap(v, path, k) for k, v in own.items() if type(v) in (int, list, tuple)})
    numbers: list[Expression] = []
    token = _NUMBERS.set(numbers)
    try:
        yield numbers
    finally:
        _NUMBERS.reset(token)
        for attributes, before in originals:
            attributes.clear()
            attributes.update(before)


def _wrap(value: Any, path: str, name: str) -> Any:
    if type(value) is int:
        return Size(value, Attribute(path, name))
    if type(value) in (list, tuple) and any(type(v) is int for v in value):
        items = [
            Size(v, Attribute(path, name, i)) if type(v) is int else v for i, v in enumerate(value)
        ]
        return type(value)(items)
    return value


def axes_of(expression: Expression) -> Iterator[Axis]:
    """Yield the axes whose sizes an expression reads."""
    if isinstance(expression, Axis):
        yield expression
    elif isinstance(expression, Operation):
        yield from axes_of(expression.left)
        yield from axes_of(expression.right)


def attributes_of(expression: Expression) -> set[Attribute]:
    """Return the attributes that an expression reads."""
    if isinstance(expression, Attribute):
        return {expression}
    if isinstance(expression, Operation):
        return attributes_of(expression.left) | attributes_of(expression.right)
    return set()


def evaluate(expression: Expression, values: Values, counts: Counts) -> int:
    """Return what an expression is worth, given attributes and what each leaf axis keeps.

    Raises:
        KeyError: It reads an attribute that has no value.
    """
    if isinstance(expression, int):
        return expression
    if isinstance(expression, Attribute):
        return values[expression]
    if isinstance(expression, Axis):
        return count(expression, counts)
    left = evaluate(expression.left, values, counts)
    right = evaluate(expression.right, values, counts)
    return expression.function(left, right)


def solve(expression: Expression, wanted: int, values: Values, counts: Counts) -> int | None:
    """Return the value of the expression's only unknown attribute, None if there is no inverse."""
    if isinstance(expression, Attribute):
        return wanted
    if not isinstance(expression, Operation):
        return None
    unknown_left = any(a not in values for a in attributes_of(expression.left))
    unknown_right = any(a not in values for a in attributes_of(expression.right))
    if unknown_left == unknown_right:
        return None
    inside = expression.left if unknown_left else expression.right
    known = evaluate(expression.right if unknown_left else expression.left, values, counts)
    inverse = _inverse(expression.function, wanted, known, unknown_left)
    return None if inverse is None else solve(inside, inverse, values, counts)


def _inverse(
    function: Callable[[int, int], int], wanted: int, known: int, left: bool
) -> int | None:
    """Solve ``function(x, known) = wanted`` for x, or ``function(known, x)`` where not ``left``."""
    if function is operator.add:
        return wanted - known
    if function is operator.sub:
        return wanted + known if left else known - wanted
    if function is operator.mul:
        return wanted // known if known and wanted % known == 0 else None
    if left:
        return wanted * known
    return known // wanted if wanted and known % wanted == 0 else None
