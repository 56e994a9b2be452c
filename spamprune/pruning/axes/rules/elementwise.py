"""Element-wise operations, copies and constants."""

from __future__ import annotations

from spamprune.pruning.axes.axis import mark
from spamprune.pruning.axes.call import Axes, Axis, Call, Shadow, broadcast, fresh, rule, same


def pointwise(call: Call) -> list[Axes]:
    """Tie axes position by position, with broadcasting."""
    tensors = call.tensors()
    if call.name in ("add", "sub", "add_", "sub_", "__iadd__"):
        for axis in _added(call, tensors):
            mark(axis, "residual")
    return [broadcast([t.axes for t in tensors], call.shape)]


# element-wise operations that torch does not tag as such
rule("hardswish", "hardsigmoid", "hardtanh", "threshold", "_prelu_kernel", "masked_fill")(pointwise)
rule("mish", "celu", "softplus", "log_sigmoid_forward", "dropout", "rsub", "fill")(pointwise)
rule("lerp")(pointwise)


def _added(call: Call, tensors: list[Shadow]) -> Axes:
    """Return the axes along which two streams of data join."""
    data = [t.axes for t in tensors if t.is_data and t.dim() > 1]
    if len(data) < 2 or len(data[0]) != len(data[1]):
        return []
    pairs = zip(*data, strict=False)
    return [a for a, b in pairs if a.size == b.size and a.root() is not b.root()]


@rule("_to_copy", "clone", "detach", "alias", "lift_fresh", "lift_fresh_copy", "contiguous")
@rule("zero", "empty_like", "zeros_like", "ones_like", "full_like")
@rule("native_dropout", "bernoulli", "rand_like", "randn_like", "normal", "uniform")
def _unchanged(call: Call) -> list[Axes]:
    return same(call, call.of("self" if isinstance(call["self"], Shadow) else "input"))


@rule("copy")
def _copy(call: Call) -> list[Axes]:
    return [broadcast([call.of("self"), call.of("src")], call.shape)]


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
@rule("scalar_tensor")
def _constant(call: Call) -> list[Axes]:
    return [[Axis(n) for n in call.shape]]


@rule("arange", "linspace", "eye", "rand", "randn", "randint", "randperm", "nonzero")
@rule("_local_scalar_dense", "equal", "is_same_size")
def _fixed(call: Call) -> list[Axes]:
    return fresh(call)
