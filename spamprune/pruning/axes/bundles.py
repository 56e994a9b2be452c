"""Axes of which code wants products of counts to stay equal.

``B, N, C = x.shape; …; x.reshape(B, N, C)`` at the end of an attention asks that heads × depth
stay equal to the width of the input, though their positions have nothing to do with each other. The
leaves of such an equation are a *bundle*: they lose units in step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import floordiv, mul

from spamprune.pruning.axes.axis import Axis, factors, fix, leaves, pieces, product
from spamprune.pruning.axes.sizes import Attribute, Expression, Operation

#: Leaf → the units that it loses in each step.
Bundle = dict[Axis, int]


def add(
    bundles: list[Bundle], expression: Expression, axis: Axis, bound: Mapping[Attribute, Axis]
) -> bool:
    """Bundle the leaves of an expression with those of the axis that it must equal.

    Args:
        bundles: What is known so far; changed.
        expression: A size in the code.
        axis: Its axis.
        bound: The axes of attributes.

    Returns:
        Whether it is of a form that can be kept true.
    """
    sides = _sides(expression, axis, bound)
    if sides is None or sides[0].size != sides[1].size:
        return False
    steps = [_step(side) for side in sides]
    if steps[0] is None or steps[1] is None:
        return False
    (a, size_a), (b, size_b) = steps[0], steps[1]
    common = math.lcm(size_a, size_b)
    a = {leaf: n * (common // size_a) for leaf, n in a.items()}
    b = {leaf: n * (common // size_b) for leaf, n in b.items()}
    if a == b:  # equal as it is, once all but these leaves are fixed
        return True
    if any(a[leaf] != b[leaf] for leaf in a.keys() & b.keys()):
        return False
    return _join(bundles, a | b)


def _sides(
    expression: Expression, axis: Axis, bound: Mapping[Attribute, Axis]
) -> tuple[Axis, Axis] | None:
    """Return the two products that must stay equal."""
    if isinstance(expression, Operation) and expression.function is floordiv:
        whole = _product(expression.left, bound)
        part = _product(expression.right, bound)
        return None if whole is None or part is None else (whole, product([part, axis]))
    side = _product(expression, bound)
    return None if side is None else (side, axis)


def _product(expression: Expression, bound: Mapping[Attribute, Axis]) -> Axis | None:
    """Return an expression as a product of axes, None if it is none."""
    if isinstance(expression, Axis):
        return expression
    if isinstance(expression, Attribute):
        return bound.get(expression)
    if isinstance(expression, int):
        return Axis(expression, fixed="a number in the code")
    if expression.function is not mul:
        return None
    left, right = _product(expression.left, bound), _product(expression.right, bound)
    return None if left is None or right is None else product([left, right])


def _step(side: Axis) -> tuple[Bundle, int] | None:
    """Return the fewest units that can go from a side, and how many positions these are."""
    free = [part for part in factors(side) if not all(leaf.fixed for leaf in leaves(part))]
    if not free or any(part.form != "leaf" or part.fixed for part in pieces(free[0])):
        return None
    for other in free[1:]:
        fix(other, "only whole heads or groups can go where code takes their number from its input")
    parts = pieces(free[0])  # the same leaf may be there several times
    share = math.gcd(*(part.size for part in parts))
    return {part: part.size // share for part in parts}, side.size // share


def _join(bundles: list[Bundle], new: Bundle) -> bool:
    """Merge a bundle with those that share a leaf with it."""
    for old in [b for b in bundles if b.keys() & new.keys()]:
        shared = old.keys() & new.keys()
        ratios = {(old[leaf], new[leaf]) for leaf in shared}
        first, second = next(iter(ratios))
        if any(a * second != b * first for a, b in ratios):
            return False
        step = math.lcm(first, second)
        merged = {leaf: n * (step // first) for leaf, n in old.items()}
        merged |= {leaf: n * (step // second) for leaf, n in new.items()}
        if any(leaf.size % n for leaf, n in merged.items()):
            return False
        bundles.remove(old)
        new = merged
    bundles.append(new)
    return True


def settle(bundles: list[Bundle]) -> None:
    """Fix all leaves of a bundle of which one is fixed, and forget it."""
    while stuck := [b for b in bundles if any(leaf.fixed for leaf in b)]:
        for bundle in stuck:
            why = next(leaf.fixed for leaf in bundle if leaf.fixed)
            for leaf in bundle:
                fix(leaf, f"its number must follow another that is fixed: {why}")
            bundles.remove(bundle)
