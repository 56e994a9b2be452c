"""What each tensor operation does with the axes of its inputs.

A rule gets a :class:`Call` and returns the axes of each output, tying axes of inputs on the way.
The operations are those of ATen, of which everything in torch is made, so a network may call what
it likes. An operation without a rule is safe: it fixes every axis that goes into it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from spamprune.pruning.axes.axis import Axis, concat, cut, factor, fix, mark, mix, product, tie

Axes = list[Axis]

#: Why positions in space, and those of kernels, stay.
SPACE = "positions in space"


class Call:
    """One call of an ATen operation during a trace.

    Attributes:
        name: Of the operation, without its overload.
        values: Its arguments by name, those left out included.
        outputs: The tensors that it returned.
        where: In which module, for messages.
        costs: Multiply-accumulates of matrix products, as axes to be multiplied; appended to.
        number: Of the call within the trace.
    """

    def __init__(
        self,
        name: str,
        values: dict[str, Any],
        outputs: list[Tensor],
        where: str,
        axes: Callable[[Tensor], Axes],
        is_data: Callable[[Tensor], bool],
        costs: list[Axes],
        number: int,
    ):
        self.name, self.values, self.outputs, self.where = name, values, outputs, where
        self.axes, self.is_data, self.costs, self.number = axes, is_data, costs, number

    def __getitem__(self, name: str) -> Any:
        """Return an argument, None where the operation has none of that name."""
        return self.values.get(name)

    def of(self, name: str) -> Axes:
        """Return the axes of a tensor argument."""
        return self.axes(self.values[name])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first output."""
        return tuple(self.outputs[0].shape)

    @property
    def why(self) -> str:
        """Why an axis that is fixed here is."""
        return f"{self.name} in {self.where or 'the model'} needs all of its positions"

    def tensors(self) -> list[Tensor]:
        """Return the tensors among the arguments."""
        return [
            item
            for value in self.values.values()
            for item in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(item, Tensor)
        ]


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
        for axis in call.axes(tensor):
            fix(axis, f"{call.name} in {call.where or 'the model'} is not followed")
    return fresh(call)


def fresh(call: Call) -> list[Axes]:
    """Return fixed axes for every output."""
    return [[Axis(n, fixed=call.why) for n in out.shape] for out in call.outputs]


def _same(call: Call, axes: Axes) -> list[Axes]:
    """Return ``axes`` for every output of their shape, fixed ones for any other."""
    sizes = tuple(a.size for a in axes)
    return [
        axes if tuple(out.shape) == sizes else [Axis(n, fixed=call.why) for n in out.shape]
        for out in call.outputs
    ]


def _broadcast(operands: Sequence[Axes], shape: Sequence[int]) -> Axes:
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


def pointwise(call: Call) -> list[Axes]:
    """Tie axes position by position, with broadcasting."""
    tensors = call.tensors()
    if call.name in ("add", "sub", "add_", "sub_", "__iadd__"):
        for axis in _added(call, tensors):
            mark(axis, "residual")
    return [_broadcast([call.axes(t) for t in tensors], call.shape)]


# element-wise operations that torch does not tag as such
rule("hardswish", "hardsigmoid", "hardtanh", "threshold", "_prelu_kernel", "masked_fill")(pointwise)
rule("mish", "celu", "softplus", "log_sigmoid_forward", "dropout", "rsub", "fill")(pointwise)
rule("lerp")(pointwise)


def _added(call: Call, tensors: list[Tensor]) -> Axes:
    """Return the axes along which two streams of data join."""
    data = [call.axes(t) for t in tensors if call.is_data(t) and t.dim() > 1]
    if len(data) < 2 or len(data[0]) != len(data[1]):
        return []
    pairs = zip(*data, strict=False)
    return [a for a, b in pairs if a.size == b.size and a.root() is not b.root()]


@rule("_to_copy", "clone", "detach", "alias", "lift_fresh", "lift_fresh_copy", "contiguous")
@rule("zero", "empty_like", "zeros_like", "ones_like", "full_like")
@rule("native_dropout", "bernoulli", "rand_like", "randn_like", "normal", "uniform")
def _unchanged(call: Call) -> list[Axes]:
    return _same(call, call.of("self" if isinstance(call["self"], Tensor) else "input"))


@rule("copy")
def _copy(call: Call) -> list[Axes]:
    return [_broadcast([call.of("self"), call.of("src")], call.shape)]


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
@rule("scalar_tensor")
def _constant(call: Call) -> list[Axes]:
    return [[Axis(n) for n in call.shape]]


@rule("arange", "linspace", "eye", "rand", "randn", "randint", "randperm", "nonzero")
@rule("_local_scalar_dense", "equal", "is_same_size")
def _fixed(call: Call) -> list[Axes]:
    return fresh(call)


# --- layout ---------------------------------------------------------------------------------------


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
    return [_broadcast([call.of("self")], call.shape)]


@rule("repeat")
def _repeat(call: Call) -> list[Axes]:
    axes, times = call.of("self"), call["repeats"]
    axes = [Axis(1)] * (len(times) - len(axes)) + axes
    return [[product([Axis(n), a]) for n, a in zip(times, axes, strict=True)]]


@rule("select")
def _select(call: Call) -> list[Axes]:
    axes = list(call.of("self"))
    axis, index = axes.pop(call["dim"]), call["index"] % max(axes_size(call), 1)
    _take(axis, [index, 1, axis.size - index - 1], call.why)
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
    start = min(_position(call["start"], size, 0), size)
    stop = max(min(_position(call["end"], size, size), size), start)
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


def _position(value: int | None, size: int, default: int) -> int:
    if value is None:
        return default
    return max(value + size, 0) if value < 0 else value


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk")
def _split(call: Call) -> list[Axes]:
    axes, dim = call.of("self"), call["dim"]
    sizes = [int(out.shape[dim]) for out in call.outputs]
    parts = _take(axes[dim], sizes, call.why)
    if call.name in ("split", "unsafe_split", "chunk"):  # code asked for parts of one size
        for part in parts[1:]:
            if part.size == parts[0].size:
                tie(parts[0], part)
            else:
                fix(axes[dim], call.why)
    dim %= len(axes)
    return [[*axes[:dim], part, *axes[dim + 1 :]] for part in parts]


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
    return [axes for _ in call.outputs]


@rule("cat", "concatenate")
def _cat(call: Call) -> list[Axes]:
    dim = call["dim"] or 0
    operands = [call.axes(t) for t in call["tensors"] if t.dim() == len(call.shape)]
    dim %= len(call.shape)
    result = [
        concat([axes[i] for axes in operands]) if i == dim else _tied([a[i] for a in operands])
        for i in range(len(call.shape))
    ]
    return [result]


@rule("stack")
def _stack(call: Call) -> list[Axes]:
    operands = [call.axes(t) for t in call["tensors"]]
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


# --- reading and writing by index -----------------------------------------------------------------


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
        if i == dim % len(axes):
            continue
        if a.size == b.size:
            tie(a, b)
        else:
            fix(a, call.why)
            fix(b, call.why)
    return [result]


@rule("scatter", "scatter_add")
def _scatter(call: Call) -> list[Axes]:
    for name in ("self", "index", "src"):
        if isinstance(call[name], Tensor):
            fix(call.of(name)[call["dim"]], call.why)
    axes = call.of("self")
    for name in ("index", "src"):
        if isinstance(call[name], Tensor):
            for a, b in zip(axes, call.of(name), strict=True):
                if a.size == b.size:
                    tie(a, b)
                else:
                    fix(a, call.why)
                    fix(b, call.why)
    return [axes]


@rule("topk", "sort", "cumsum", "cumprod", "argsort")
def _ordered(call: Call) -> list[Axes]:
    axes = list(call.of("self"))
    dim = -1 if call["dim"] is None else call["dim"]
    fix(axes[dim], call.why)
    axes[dim] = Axis(call.shape[dim], fixed=call.why)
    return [axes for _ in call.outputs]


@rule("embedding")
def _embedding(call: Call) -> list[Axes]:
    table = call.of("weight")
    fix(table[0], call.why)
    return [[*call.of("indices"), table[1]]]


# --- reductions and normalisation -----------------------------------------------------------------


@rule("sum", "mean", "amax", "amin", "max", "min", "any", "all", "prod", "var")
@rule("std", "var_mean", "std_mean", "logsumexp", "norm", "linalg_vector_norm", "nansum", "median")
def _reduce(call: Call) -> list[Axes]:
    if isinstance(call["other"], Tensor):  # max and min of two tensors
        return pointwise(call)
    axes = call.of("self")
    dims = call["dim"]
    if dims is None or dims == []:
        dims = range(len(axes))
    gone = {d % len(axes) for d in (dims if isinstance(dims, (list, tuple, range)) else [dims])}
    for d in gone:
        mix(axes[d], call.why)
    keep = [Axis(1) if d in gone else axis for d, axis in enumerate(axes)]
    if not call["keepdim"]:
        keep = [axis for d, axis in enumerate(keep) if d not in gone]
    return [keep for _ in call.outputs]


@rule("argmax", "argmin")
def _position_of(call: Call) -> list[Axes]:
    axes = call.of("self")
    for axis in axes if call["dim"] is None else [axes[call["dim"]]]:
        fix(axis, call.why)
    return _reduce(call)


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def _softmax(call: Call) -> list[Axes]:
    axes = call.of("self")
    mix(axes[call["dim"]], call.why)
    return [axes]


@rule("native_layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(call: Call) -> list[Axes]:
    axes = call.of("input")
    normalised = axes[-len(call["normalized_shape"]) :]
    for axis in normalised:
        mix(axis, call.why)
    for name in ("weight", "bias"):
        if isinstance(call[name], Tensor):
            for a, b in zip(normalised, call.of(name), strict=True):
                tie(a, b)
    return _same(call, axes)


@rule("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit", "batch_norm")
@rule("_native_batch_norm_legit_no_training", "_batch_norm_no_update", "native_group_norm")
def _channel_norm(call: Call) -> list[Axes]:
    axes = call.of("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(call[name], Tensor):
            tie(axes[1], call.of(name)[0])
    if call.name == "native_group_norm":
        groups = factor(axes[1], [call["group"], axes[1].size // call["group"]])
        mixed = [axes[1] if groups is None else groups[1], *axes[2:]]
    elif call["training"]:
        mixed = [axes[0], *axes[2:]]
    else:
        mixed = []
    for axis in mixed:
        mix(axis, call.why)
    return _same(call, axes)


# --- matrix products ------------------------------------------------------------------------------


def _matmul(call: Call, left: str, right: str) -> Axes:
    a, b = call.of(left), call.of(right)
    tie(a[-1], b[-2])
    if len(a) == 3:
        tie(a[0], b[0])
    call.costs.append([*a, b[-1]])
    if call.is_data(call[left]) and call.is_data(call[right]):
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
    return [_broadcast([_matmul(call, "mat1", "mat2"), call.of("self")], call.shape)]


@rule("baddbmm")
def _baddbmm(call: Call) -> list[Axes]:
    return [_broadcast([_matmul(call, "batch1", "batch2"), call.of("self")], call.shape)]


@rule("mv", "dot")
def _mv(call: Call) -> list[Axes]:
    a = call.of("self")
    b = call.axes(call.tensors()[1])
    tie(a[-1], b[0])
    call.costs.append(a)
    return [a[:-1]]


@rule("linear")
def _linear(call: Call) -> list[Axes]:
    x, weight = call.of("input"), call.of("weight")
    tie(x[-1], weight[1])
    if isinstance(call["bias"], Tensor):
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
        source = inputs[1]
    else:
        tie(channels, source)
    if isinstance(call["bias"], Tensor):
        tie(result, call.of("bias")[0])
    space = _space(call, x[2:], call.shape[2:])
    call.costs.append([x[0], result, source, *(x[2:] if transposed else space), *weight[2:]])
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
    states = [[Axis(n, fixed=call.why) for n in out.shape[:-1]] for out in call.outputs[1:3]]
    kept = [[*x[:-1], hidden], *([*state, hidden] for state in states)]
    rest = [[Axis(n, fixed=call.why) for n in out.shape] for out in call.outputs[3:]]
    call.costs += [[*x, call.of("weight0")[0]], [*x[:-1], *call.of("weight1")]]
    return kept + rest


def _space(call: Call, axes: Axes, sizes: Sequence[int]) -> Axes:
    """Return the axes of positions in space after a sliding window went over them."""
    window = call["weight"]
    one_filter = isinstance(window, Tensor) and window.numel() == window.shape[-1]
    if one_filter and len(axes) == 1 and axes[0].size == sizes[0]:
        # over channels, as in efficient channel attention
        mix(axes[0], call.why)
        return axes
    for axis in axes:
        fix(axis, SPACE)
    return [Axis(n, fixed=SPACE) for n in sizes]


# --- space ----------------------------------------------------------------------------------------


def _spatial(dims: int) -> Rule:
    def apply(call: Call) -> list[Axes]:
        axes = call.of("self" if isinstance(call["self"], Tensor) else "input")
        space = _space(call, axes[-dims:], call.shape[-dims:])
        return [[*axes[:-dims], *space] for _ in call.outputs]

    return apply


for _names, _dims in (
    (("max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "upsample_linear1d"), 1),
    (("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d"), 2),
    (("max_pool2d", "adaptive_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d"), 2),
    (("upsample_bicubic2d", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa"), 2),
    (("reflection_pad2d", "replication_pad2d", "grid_sampler_2d", "_fft_r2c", "_fft_c2r"), 2),
    (("max_pool3d_with_indices", "avg_pool3d", "_adaptive_avg_pool3d", "upsample_nearest3d"), 3),
):
    rule(*_names)(_spatial(_dims))


@rule("constant_pad_nd")
def _pad(call: Call) -> list[Axes]:
    axes = list(call.of("self"))
    pads = call["pad"]
    for i in range(len(pads) // 2):
        if pads[2 * i] or pads[2 * i + 1]:
            place = len(axes) - 1 - i
            fix(axes[place], call.why)
            axes[place] = Axis(call.shape[place], fixed=call.why)
    return [axes]


@rule("pixel_shuffle", "pixel_unshuffle")
def _pixel_shuffle(call: Call) -> list[Axes]:
    axes = call.of("self")
    if call.name == "pixel_shuffle":
        square = call["upscale_factor"] ** 2
        parts = factor(axes[-3], [axes[-3].size // square, square])
        channels = axes[-3] if parts is None else parts[0]
        if parts is None:
            return unknown(call)
        fix(parts[1], call.why)
    else:
        channels = product([axes[-3], Axis(call["downscale_factor"] ** 2, fixed=call.why)])
    for axis in axes[-2:]:
        fix(axis, call.why)
    return [[*axes[:-3], channels, *(Axis(n, fixed=call.why) for n in call.shape[-2:])]]


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(call: Call) -> list[Axes]:
    axes = list(call.of("self"))
    parts = factor(axes[1], [call["groups"], axes[1].size // call["groups"]])
    if parts is None:
        return unknown(call)
    axes[1] = product([parts[1], parts[0]])
    return [axes]


@rule("im2col")
def _im2col(call: Call) -> list[Axes]:
    axes = call.of("self")
    window = math.prod(call["kernel_size"])
    for axis in axes[-2:]:
        fix(axis, call.why)
    channels = product([axes[-3], Axis(window, fixed=call.why)])
    return [[*axes[:-3], channels, Axis(call.shape[-1], fixed=call.why)]]


@rule("col2im")
def _col2im(call: Call) -> list[Axes]:
    axes = call.of("self")
    window = math.prod(call["kernel_size"])
    parts = factor(axes[-2], [axes[-2].size // window, window])
    if parts is None:
        return unknown(call)
    fix(parts[1], SPACE)
    fix(axes[-1], SPACE)
    return [[*axes[:-2], parts[0], *(Axis(n, fixed=SPACE) for n in call.shape[-2:])]]


@rule("unfold")
def _unfold(call: Call) -> list[Axes]:
    axes = list(call.of("self"))
    dim = call["dimension"]
    fix(axes[dim], call.why)
    axes[dim] = Axis(call.shape[dim], fixed=call.why)
    return [[*axes, Axis(call.shape[-1], fixed=call.why)]]
