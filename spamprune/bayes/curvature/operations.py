"""Which rule each of torch's operations follows.

One function an operation, with the operation's own signature, yields ``(target, rule, data)`` for
each of its arguments that may be a parameter. To support another operation, add its function here;
operations that are not listed are differentiated one sample at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from spamprune.bayes.curvature.layout import Layout
from spamprune.bayes.curvature.rules import (
    AttentionBias,
    Convolution,
    Depthwise,
    Linear,
    Local,
    Lookup,
    Rule,
    Scale,
    Shift,
    Transposed,
    aligned,
)
from spamprune.bayes.curvature.trace import Use, in_place

Found = Iterator[tuple[Any, Rule, tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Term:
    """What one use says of one pure tensor.

    Attributes:
        target: The parameter, or the tensor made of parameters.
        origins: Names of the parameters that it is made of.
        rule: How its per-sample gradients are got.
        data: Tensors that the rule needs.
        operation: Name of the operation, for people.
    """

    target: Tensor
    origins: frozenset[str]
    rule: Rule
    data: tuple[Tensor, ...]
    operation: str


class _Output:
    """Shape of an operation's output and its batch axis, which the rules of affine maps need."""

    def __init__(self, use: Use, axis: int):
        self.shape, self.axis = use.output.shape, axis
        self._pure = {id(t) for t, _ in use.pure}

    def is_pure(self, tensor: Any) -> bool:
        return id(tensor) in self._pure

    def broadcast(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a target in front of which axes are missing; one for all samples."""
        full = aligned(tuple(shape), len(self.shape))
        if full[self.axis] != 1:
            raise NotImplementedError("a tensor without data that differs between samples")
        return full

    def shift(self, target: Tensor, shape: Sequence[int] | None = None, sign: float = 1) -> Shift:
        return Shift(self.axis, self.broadcast(shape or target.shape), sign)

    def scale(self, target: Tensor, factor: Callable[[Tensor], Tensor], shape: Any = None) -> Scale:
        return Scale(self.axis, self.broadcast(shape or target.shape), factor)

    def channels(self, vector: Tensor) -> list[int]:
        """Return the shape of a vector over channels, the axis after the batch's."""
        return [len(vector)] + [1] * (len(self.shape) - 2)


def _same(x: Tensor) -> Tensor:
    return x


def _linear(out: _Output, input: Any, weight: Any, bias: Any = None) -> Found:
    yield weight, Linear(), (input,)
    if bias is not None:
        yield bias, out.shift(bias), ()


def _per_axis(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims // len(value))


def _padding(
    padding: Any, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    if padding == "valid":
        padding = 0
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in _per_axis(padding, len(kernel)))


def _met(
    size: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int
) -> tuple[int, int]:
    """Return the first and last element of a kernel that ever meets the image, along one axis."""
    before, after = padding
    positions = (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
    met = [
        k
        for k in range(kernel)
        if any(0 <= t * stride + k * dilation - before < size for t in range(positions))
    ]
    return met[0], met[-1]


def _convolution(
    out: _Output,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Found:
    kernel, sizes = tuple(weight.shape[2:]), input.shape[-weight.dim() + 2 :]
    dims = len(kernel)
    stride, dilation = _per_axis(stride, dims), _per_axis(dilation, dims)
    axes = list(
        zip(sizes, kernel, stride, _padding(padding, kernel, dilation), dilation, strict=True)
    )
    met = [_met(*axis) for axis in axes]
    rule = (Depthwise if weight.shape[1] == 1 and groups > 1 else Convolution)(
        tuple(last - first + 1 for first, last in met),
        tuple((first, k - 1 - last) for (first, last), k in zip(met, kernel, strict=True)),
        stride,
        tuple(
            (before - first * d, after - (k - 1 - last) * d)
            for (first, last), (_, k, _, (before, after), d) in zip(met, axes, strict=True)
        ),
        dilation,
        groups,
    )
    yield weight, rule, (input,)
    if bias is not None:
        yield bias, out.shift(bias, out.channels(bias)), ()


def _transposed_convolution(
    out: _Output,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Found:
    kernel = tuple(weight.shape[2:])
    dims = len(kernel)
    dilation = _per_axis(dilation, dims)
    rule = Convolution(
        kernel,
        ((0, 0),) * dims,
        _per_axis(stride, dims),
        _padding(padding, kernel, dilation),
        dilation,
        groups,
    )
    yield weight, Transposed(rule), (input,)
    if bias is not None:
        yield bias, out.shift(bias, out.channels(bias)), ()


def _affine(
    out: _Output,
    input: Tensor,
    weight: Any,
    bias: Any,
    normalise: Callable[[Tensor], Tensor],
    shape: Sequence[int],
) -> Found:
    if weight is not None:
        yield weight, out.scale(weight, normalise, shape), (input,)
    if bias is not None:
        yield bias, out.shift(bias, shape), ()


def _batch_norm(
    out: _Output,
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Found:
    if training:
        raise NotImplementedError("batch statistics")
    shape = out.channels(running_mean)
    mean, factor = running_mean.view(shape), (running_var + eps).rsqrt().view(shape)
    return _affine(out, input, weight, bias, lambda x: (x - mean) * factor, shape)


def _layer_norm(
    out: _Output,
    input: Tensor,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> Found:
    normalise = partial(F.layer_norm, normalized_shape=normalized_shape, eps=eps)
    return _affine(out, input, weight, bias, normalise, normalized_shape)


def _rms_norm(
    out: _Output, input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None
) -> Found:
    normalise = partial(F.rms_norm, normalized_shape=normalized_shape, eps=eps)
    return _affine(out, input, weight, None, normalise, normalized_shape)


def _group_norm(
    out: _Output,
    input: Tensor,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> Found:
    def normalise(x: Tensor) -> Tensor:
        return F.group_norm(x.flatten(0, 1), num_groups, eps=eps).view_as(x)

    return _affine(out, input, weight, bias, normalise, out.channels(input[0]))


def _embedding(
    out: _Output,
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: Any = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Found:
    if max_norm is None and not scale_grad_by_freq:
        rows = len(weight)
        padding = None if padding_idx is None else padding_idx % rows  # counts from the end, too
        yield weight, Lookup(rows, padding), (input,)


def _add(out: _Output, input: Any, other: Any, *, alpha: float = 1, sign: float = 1) -> Found:
    for target, factor in ((input, 1.0), (other, sign * alpha)):
        if isinstance(target, Tensor) and out.is_pure(target):
            yield target, out.shift(target, sign=factor), ()


def _multiply(out: _Output, input: Any, other: Any) -> Found:
    for target, data in ((input, other), (other, input)):
        if isinstance(data, Tensor) and data.shape == out.shape and out.is_pure(target):
            yield target, out.scale(target, _same), (data,)


def _broadcast(out: _Output, input: Any, *_: Any, **__: Any) -> Found:
    rest = [n for i, n in enumerate(out.shape) if i != out.axis]
    if [n for i, n in enumerate(out.broadcast(input.shape)) if i != out.axis] == rest:
        yield input, out.shift(input), ()


def _attention(
    out: _Output,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Found:
    if not enable_gqa and isinstance(attn_mask, Tensor) and out.is_pure(attn_mask):
        out.broadcast(attn_mask.shape)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        yield attn_mask, AttentionBias(out.axis, attn_mask, scale), (query, key, value)


_OPERATIONS: dict[str, Callable[..., Found]] = {
    "linear": _linear,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "conv_transpose1d": _transposed_convolution,
    "conv_transpose2d": _transposed_convolution,
    "conv_transpose3d": _transposed_convolution,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "embedding": _embedding,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("add", "add_", "__add__", "__radd__", "__iadd__"), _add),
    **dict.fromkeys(("sub", "sub_", "__sub__", "__isub__"), partial(_add, sign=-1)),
    **dict.fromkeys(("mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply"), _multiply),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to", "repeat", "tile"), _broadcast),
}


def terms_of(
    use: Use, samples: int, output: Layout, data: Sequence[Layout]
) -> tuple[Term, ...] | None:
    """Return a term for each pure tensor of a use, or None if one of them cannot be handled.

    Args:
        use: The operation.
        samples: Size of the batch.
        output: Where samples lie in its output.
        data: Where they lie in each of ``use.data``.
    """
    split = {id(t): layout.split(t, samples) for t, layout in zip(use.data, data, strict=True)}
    found: dict[int, tuple[Rule, tuple[Tensor, ...]]] = {}
    try:
        if use.name in _OPERATIONS:
            where = _Output(use, output.axis)
            for target, rule, tensors in _OPERATIONS[use.name](where, *use.args, **use.kwargs):
                if all(id(t) in split for t in tensors):
                    found.setdefault(id(target), (rule, tuple(split[id(t)] for t in tensors)))
        terms = []
        for target, origins in use.pure:
            rule, tensors = found.get(id(target)) or (
                _local(use, target, output, data),
                tuple(split.values()),
            )
            terms.append(Term(target, origins, rule, tensors, use.name))
    except NotImplementedError:
        return None
    return tuple(terms)


def _local(use: Use, target: Tensor, output: Layout, data: Sequence[Layout]) -> Local:
    """Return the rule that repeats the operation on one sample at a time."""
    if in_place(use.name):
        raise NotImplementedError("an operation that changes its data")
    axes = {id(t): layout.axis for t, layout in zip(use.data, data, strict=True)}

    def call(value: Tensor, *inputs: Tensor) -> Tensor:
        given = {id(target): value}
        for (i, axis), tensor in zip(axes.items(), inputs, strict=True):
            given[i] = tensor.movedim(0, axis)

        def replaced(argument: Any) -> Any:
            if isinstance(argument, Tensor):
                return given.get(id(argument), argument)
            if isinstance(argument, (list, tuple)):
                return type(argument)(replaced(a) for a in argument)
            return argument

        kwargs = {name: replaced(value) for name, value in use.kwargs.items()}
        return use.function(*replaced(use.args), **kwargs).movedim(output.axis, 0)

    return Local(call, target)
