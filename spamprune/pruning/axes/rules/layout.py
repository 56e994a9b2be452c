"""Operations that lay a tensor out anew, take parts of it, or join tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from spamprune.pruning.axes.axis import Axis, concat, cut, factor, fix, product, tie
from spamprune.pruning.axes.call import Axes, Call, broadcast, rule, unknown


def reshaped(axes: Axes, shape: Sequence[int], why: str) -> Axes:
    """Return the axes of a tensor that is laid out anew in row-major order."""
    if 0 in shape:
        return [Axis(n, fixed=why) for n in shape]
    source = [axis for axis in axes if axis.size != 1]
    result: Axes = []
    while len(result) < len(shape):
        size = shape[len(result)]
        if size == 1:
            result.append(Axis(1))
            continue
        taken, sizes = [source.pop(0)], [size]
        while (have := math.prod(a.size for a in taken)) != (want := math.prod(sizes)):
            if have < want:
                taken.append(source.pop(0))
            else:
                sizes.append(shape[len(result) + len(sizes)])
        whole = product(taken)
        parts = factor(whole, sizes)
        if parts is None:
            fix(whole, why)
            parts = [Axis(n, fixed=why) for n in sizes]
        result += parts
    return result


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "squeeze")
@rule("unsqueeze")
def _view(call: Call) -> list[Axes]:
    return [reshaped(call.of("self"), call.shape, call.why)]


@rule("as_strided")
def _as_strided(call: Call) -> list[Axes]:
    axes = call.of("self")
    sizes = [n for n in call.shape if n != 1]
    if sizes == [a.size for a in axes if a.size != 1]:  # another memory layout only
        return [reshaped(axes, call.shape, call.why)]
    return unknown(call)


@rule("permute")
def _permute(call: Call) -> list[Axes]:
    axes = call.of("self")
    return [[axes[d] for d in call["dims"]]]


@rule("transpose", "t", "swapaxes")
def _transpose(call: Call) -> list[Axes]:
    axes = list(call.of("self"))
    if len(axes) < 2:
        return [axes]
    a, b = (0, 1) if call["dim0"] is None else (call["dim0"], call["dim1"])
    axes[a], axes[b] = axes[b], axes[a]
    return [axes]


@rule("expand")
def _expand(call: Call) -> list[Axes]:
    return [broadcast([call.of("self")], call.shape)]


@rule("repeat")
def _repeat(call: Call) -> list[Axes]:
    axes, times = call.of("self"), call["repeats"]
    axes = [Axis(1)] * (len(times) - len(axes)) + axes
    return [[product([Axis(n), a]) for n, a in zip(times, axes, strict=True)]]


@rule("select")
def _select(call: Call) -> list[Axes]:
    axes = list(call.of("self"))
    axis, index = axes.pop(call["dim"]), call["index"] % max(axes_size(call), 1)
    before, own, after = _take(axis, [index, 1, axis.size - index - 1], call.why)
    for part in (own, before if call["index"] >= 0 else after):  # those that the number counts
        fix(part, call.why)
    return [axes]


def axes_size(call: Call) -> int:
    """Return the size of the dimension that the call is about."""
    return int(call["self"].shape[call["dim"]])


def _take(axis: Axis, sizes: list[int], why: str) -> Axes:
    """Cut an axis whose pieces have different meanings; fix it where it cannot be cut."""
    parts = cut(axis, sizes)
    if parts is None:
        fix(axis, why)
        return [Axis(n, fixed=why) for n in sizes]
    for part in parts:
        if part.size == 1:  # one position that code addresses by its number
            fix(part, why)
    return parts


@rule("slice")
def _slice(call: Call) -> list[Axes]:
    axes = list(call.of("self"))
    dim, size, step = call["dim"], axes_size(call), call["step"] or 1
    start = min(position(call["start"], size, 0), size)
    stop = max(min(position(call["end"], size, size), size), start)
    if step == 1:
        axes[dim] = _take(axes[dim], [start, stop - start, size - stop], call.why)[1]
        return [axes]
    regular = size % step == 0 and stop == size and start < step
    parts = factor(axes[dim], [size // step, step]) if regular else None
    if parts is None:
        fix(axes[dim], call.why)
        axes[dim] = Axis(call.shape[dim], fixed=call.why)
    else:
        fix(parts[1], call.why)
        axes[dim] = parts[0]
    return [axes]


def position(value: int | None, size: int, default: int) -> int:
    """Return where a bound of a slice lies, which may count from the end."""
    if value is None:
        return default
    return max(value + size, 0) if value < 0 else value


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk")
def _split(call: Call) -> list[Axes]:
    axes, dim = call.of("self"), call["dim"]
    sizes = [shape[dim] for shape in call.shapes]
    parts = _take(axes[dim], sizes, call.why)
    if call.name in ("split", "unsafe_split", "chunk"):
        keep_equal(axes[dim], parts, call.why)
    dim %= len(axes)
    return [[*axes[:dim], part, *axes[dim + 1 :]] for part in parts]


def keep_equal(axis: Axis, parts: Axes, why: str) -> None:
    """Tie the parts of an axis of which code asked for parts of one size."""
    for part in parts[1:]:
        if part.size == parts[0].size:
            tie(parts[0], part)
        else:
            fix(axis, why)


@rule("glu")
def _glu(call: Call) -> list[Axes]:
    axes = list(call.of("self"))
    half = axes_size(call) // 2
    value, gate = _take(axes[call["dim"]], [half, half], call.why)
    tie(value, gate)
    axes[call["dim"]] = value
    return [axes]


@rule("unbind")
def _unbind(call: Call) -> list[Axes]:
    axes = list(call.of("self"))
    axis = axes.pop(call["dim"])
    _take(axis, [1] * axis.size, call.why)
    return [axes for _ in call.shapes]


@rule("cat", "concatenate")
def _cat(call: Call) -> list[Axes]:
    dim = call["dim"] or 0
    operands = [t.axes for t in call["tensors"] if t.dim() == len(call.shape)]
    dim %= len(call.shape)
    result = [
        concat([axes[i] for axes in operands]) if i == dim else _tied([a[i] for a in operands])
        for i in range(len(call.shape))
    ]
    return [result]


@rule("stack")
def _stack(call: Call) -> list[Axes]:
    operands = [t.axes for t in call["tensors"]]
    result = [_tied(list(met)) for met in zip(*operands, strict=True)]
    dim = (call["dim"] or 0) % len(call.shape)
    result.insert(dim, Axis(len(operands), fixed=call.why))
    return [result]


def _tied(axes: Axes) -> Axis:
    for other in axes[1:]:
        tie(axes[0], other)
    return axes[0]


@rule("flip", "roll")
def _reorder(call: Call) -> list[Axes]:
    axes = call.of("self")
    for dim in call["dims"] or range(len(axes)):
        fix(axes[dim], call.why)
    return [axes]


@rule("tril", "triu")
def _triangle(call: Call) -> list[Axes]:
    axes = call.of("self")
    for axis in axes[-2:]:
        fix(axis, call.why)
    return [axes]
