"""Matrix products, convolutions and recurrent layers."""

from __future__ import annotations

from spamprune.pruning.axes.axis import Axis, concat, factor, fix, mark, product, tie
from spamprune.pruning.axes.call import (
    SPACE,
    Axes,
    Call,
    Shadow,
    broadcast,
    rule,
    same,
    unknown,
)
from spamprune.pruning.axes.rules.space import window


def _matmul(call: Call, left: str, right: str) -> Axes:
    a, b = call.of(left), call.of(right)
    tie(a[-1], b[-2])
    if len(a) == 3:
        tie(a[0], b[0])
    call.costs.append([*a, b[-1]])
    if call[left].is_data and call[right].is_data:
        for axis in (*a[-2:], b[-1]):
            mark(axis, "head_dims")
        if len(a) == 3:
            mark(a[0], "heads")
    return [*a[:-1], b[-1]]


@rule("mm", "bmm", "matmul")
def _mm(call: Call) -> list[Axes]:
    return [_matmul(call, "self", "mat2")]


@rule("addmm")
def _addmm(call: Call) -> list[Axes]:
    return [broadcast([_matmul(call, "mat1", "mat2"), call.of("self")], call.shape)]


@rule("baddbmm")
def _baddbmm(call: Call) -> list[Axes]:
    return [broadcast([_matmul(call, "batch1", "batch2"), call.of("self")], call.shape)]


@rule("mv", "dot")
def _mv(call: Call) -> list[Axes]:
    a = call.of("self")
    b = call.tensors()[1].axes
    tie(a[-1], b[0])
    call.costs.append(a)
    return [a[:-1]]


@rule("linear")
def _linear(call: Call) -> list[Axes]:
    x, weight = call.of("input"), call.of("weight")
    tie(x[-1], weight[1])
    if isinstance(call["bias"], Shadow):
        tie(weight[0], call.of("bias")[0])
    call.costs.append([*x, weight[0]])
    return [[*x[:-1], weight[0]]]


@rule("convolution", "_convolution", "mkldnn_convolution", "convolution_overrideable")
def _convolution(call: Call) -> list[Axes]:
    x, weight, groups = call.of("input"), call.of("weight"), call["groups"]
    channels, first, second = x[1], weight[0], weight[1]
    for axis in weight[2:]:
        fix(axis, SPACE)
    transposed = bool(call["transposed"])
    space = window(call, x[2:], call.shape[2:])
    call.costs.append([x[0], *weight, *(x[2:] if transposed else space)])
    source, result = (first, second) if transposed else (second, first)
    if groups > 1:
        # a grouped convolution sees (groups · channels of a group) on both sides
        inputs = factor(channels, [groups, channels.size // groups])
        rows = factor(first, [groups, first.size // groups])
        if inputs is None or rows is None:
            return unknown(call)
        tie(inputs[0], rows[0])
        if source.size > 1 or rows[1].size > 1:
            mark(rows[0], "groups")
            for axis in (inputs[1], rows[1]):
                mark(axis, "group_dims")
        tie(inputs[1], rows[1] if transposed else second)
        result = product([rows[0], second]) if transposed else first
    else:
        tie(channels, source)
    if isinstance(call["bias"], Shadow):
        tie(result, call.of("bias")[0])
    return [[x[0], result, *space]]


@rule("mkldnn_rnn_layer")
def _lstm(call: Call) -> list[Axes]:
    """Long short-term memory: the rows of its weights are four gates one after another."""
    x, hidden = call.of("input"), call.of("weight1")[1]
    tie(x[-1], call.of("weight0")[1])
    for name in ("weight0", "weight1", "weight2", "weight3"):
        tie(call.of(name)[0], concat([hidden] * 4))
    for name in ("hx_", "cx_"):
        tie(call.of(name)[-1], hidden)
    states = [[Axis(n, fixed=call.why) for n in shape[:-1]] for shape in call.shapes[1:3]]
    kept = [[*x[:-1], hidden], *([*state, hidden] for state in states)]
    rest = [[Axis(n, fixed=call.why) for n in shape] for shape in call.shapes[3:]]
    call.costs += [[*x, call.of("weight0")[0]], [*x[:-1], *call.of("weight1")]]
    return kept + rest


@rule("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell")
def _cell(call: Call) -> list[Axes]:
    """One step of a recurrent layer on a GPU, whose gates come one after another."""
    state = call.of("cx" if call.name == "_thnn_fused_lstm_cell" else "hx")
    for name in ("input_gates", "hidden_gates", "input_bias", "hidden_bias"):
        if isinstance(call[name], Shadow):
            gates = call.of(name)[-1]
            tie(gates, concat([state[-1]] * (gates.size // state[-1].size)))
    return same(call, state)
