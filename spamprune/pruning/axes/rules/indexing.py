"""Reading and writing by index, and order."""

from __future__ import annotations

from spamprune.pruning.axes.axis import Axis, fix, tie
from spamprune.pruning.axes.call import Axes, Call, Shadow, rule, unknown


@rule("index", "_unsafe_index")
def _index(call: Call) -> list[Axes]:
    axes, tables = call.of("self"), list(call["indices"])
    tables += [None] * (len(axes) - len(tables))
    used = [i for i, table in enumerate(tables) if table is not None]
    if any(tables[i].dtype.is_floating_point or tables[i].dtype.itemsize == 1 for i in used):
        return unknown(call)  # a mask: the size depends on the data
    for i in used:
        fix(axes[i], call.why)
    ranks = max(tables[i].dim() for i in used)
    adjacent = used[-1] - used[0] + 1 == len(used)
    place = used[0] if adjacent else 0
    rest = [a for i, a in enumerate(axes) if i not in used]
    rows = [Axis(n, fixed=call.why) for n in call.shape[place : place + ranks]]
    return [[*rest[:place], *rows, *rest[place:]]]


@rule("index_select")
def _index_select(call: Call) -> list[Axes]:
    axes = list(call.of("self"))
    fix(axes[call["dim"]], call.why)
    axes[call["dim"]] = Axis(call.shape[call["dim"]], fixed=call.why)
    return [axes]


@rule("gather")
def _gather(call: Call) -> list[Axes]:
    dim = call["dim"]
    axes, table = call.of("self"), call.of("index")
    fix(axes[dim], call.why)
    fix(table[dim], call.why)
    result = list(table)
    for i, (a, b) in enumerate(zip(axes, table, strict=True)):
        if i != dim % len(axes):
            _tie_or_fix(call, a, b)
    return [result]


def _tie_or_fix(call: Call, a: Axis, b: Axis) -> None:
    """Tie axes of one size; of two sizes only the first positions meet, so both stay."""
    if a.size == b.size:
        tie(a, b)
    else:
        fix(a, call.why)
        fix(b, call.why)


@rule("scatter", "scatter_add")
def _scatter(call: Call) -> list[Axes]:
    for name in ("self", "index", "src"):
        if isinstance(call[name], Shadow):
            fix(call.of(name)[call["dim"]], call.why)
    axes = call.of("self")
    for name in ("index", "src"):
        if isinstance(call[name], Shadow):
            for a, b in zip(axes, call.of(name), strict=True):
                _tie_or_fix(call, a, b)
    return [axes]


@rule("topk", "sort", "cumsum", "cumprod", "argsort")
def _ordered(call: Call) -> list[Axes]:
    axes = list(call.of("self"))
    dim = -1 if call["dim"] is None else call["dim"]
    fix(axes[dim], call.why)
    axes[dim] = Axis(call.shape[dim], fixed=call.why)
    return [axes for _ in call.shapes]


@rule("embedding")
def _embedding(call: Call) -> list[Axes]:
    table = call.of("weight")
    fix(table[0], call.why)
    return [[*call.of("indices"), table[1]]]
