"""What code says of sizes: which attribute, number or other size it gives to an operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from spamprune.bayes.curvature.trace import COMPOSITES
from spamprune.pruning.axes.axis import Axis, concat, cut, factor, fix, leaves, mix, product
from spamprune.pruning.axes.logits import Logits
from spamprune.pruning.axes.rules.layout import keep_equal
from spamprune.pruning.axes.sizes import Size, expression_of

if TYPE_CHECKING:
    from spamprune.pruning.axes.recorder import Recorder

_Sites = dict[str, Callable[["Code", tuple[Any, ...], dict[str, Any], Any], None]]


class Code(TorchFunctionMode):
    """Sees every torch function as it is called and tells the recorder of sizes and attention."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder
        self.span = range(0)  # of the operations that the present call is made of

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func in COMPOSITES:
            with self:
                return COMPOSITES[func](*args, **kwargs)
        if func in (_SHAPE, torch.Tensor.size):
            return self._shape(func(*args, **kwargs), args[0], *args[1:], **kwargs)
        if func in (torch.numel, torch.Tensor.numel, torch.Tensor.nelement):
            return self._number_of_elements(*args, **kwargs)
        start = self.recorder.calls
        result = func(*args, **kwargs)
        self.span = range(start, self.recorder.calls)
        site = _SITES.get(getattr(func, "__name__", ""))
        if site is not None:
            site(self, args, kwargs, result)
        return result

    def _shape(self, shape: Any, tensor: Tensor, dim: int | None = None) -> Any:
        """Return a shape, or one size of it, that remembers its axes."""
        if not self.recorder.knows(tensor):
            return shape
        axes = self.recorder.axes(tensor)
        if dim is not None:
            return Size(shape, axes[dim])
        return torch.Size([Size(n, a) for n, a in zip(shape, axes, strict=True)])

    def _number_of_elements(self, input: Tensor) -> int:
        """Return a number of elements that remembers its axes."""
        known = self.recorder.knows(input)
        return Size(input.numel(), product(self.recorder.axes(input))) if known else input.numel()

    def bind(self, sizes: Sequence[Any], axes: Sequence[Axis]) -> None:
        """Note which axis each size must equal; -1 is left to torch."""
        for size, axis in zip(sizes, axes, strict=False):
            if isinstance(size, int) and size >= 0:
                self.recorder.bind(expression_of(size), axis)


_SHAPE = vars(torch.Tensor.__base__)["shape"].__get__


def _flat(sizes: Sequence[Any]) -> Sequence[Any]:
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        return sizes[0]
    return sizes


def _layout(code: Code, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    sizes = _flat(args[1:]) or kwargs.get("shape") or kwargs.get("size") or ()
    if isinstance(result, Tensor) and all(isinstance(s, int) for s in sizes):
        code.bind(sizes, code.recorder.axes(result)[-len(sizes) :] if sizes else [])


def _creation(code: Code, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    _layout(code, (None, *args), kwargs, result)


def _unflatten(code: Code, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    dim = args[1] if len(args) > 1 else kwargs["dim"]
    sizes = args[2] if len(args) > 2 else kwargs["sizes"]
    dim %= args[0].dim()
    code.bind(sizes, code.recorder.axes(result)[dim : dim + len(sizes)])


def _split(code: Code, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    names = ("split_size", "split_size_or_sections", "split_sizes")
    sizes = args[1] if len(args) > 1 else next(kwargs[n] for n in names if n in kwargs)
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    axes = [code.recorder.axes(part)[dim] for part in result]
    if isinstance(sizes, int):
        axes = [axis for axis in axes if axis.size == sizes]
        sizes = [sizes] * len(axes)
    code.bind(sizes, axes)


def _narrow(code: Code, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    given = dict(zip(("input", "dim", "start", "length"), args, strict=False)) | kwargs
    _interval(
        code,
        code.recorder.axes(args[0])[given["dim"]],
        given["start"],
        given["start"] + given["length"],
    )


def _item(code: Code, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    tensor, key = args[0], args[1]
    keys = list(key) if isinstance(key, tuple) else [key]
    if any(isinstance(k, Tensor) for k in keys):
        return
    taken = sum(k is not None and k is not Ellipsis for k in keys)
    axes = iter(code.recorder.axes(tensor))
    for k in keys:
        if k is None:
            continue
        if k is Ellipsis:
            for _ in range(tensor.dim() - taken):
                next(axes)
            continue
        axis = next(axes)
        if isinstance(k, slice) and k.step in (None, 1):
            _interval(code, axis, k.start, k.stop)


def _assignment(code: Code, *call: Any) -> None:
    _number(code, *call)
    _item(code, *call)


def _boundaries(
    code: Code, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, dim: int = 0
) -> None:
    """Note where a list of indices, or a number of parts, cuts an axis."""
    given = dict(zip(("input", "where", "dim"), args, strict=False)) | kwargs
    dim = given.get("dim", dim)
    names = ("where", "indices_or_sections", "tensor_indices_or_sections", "indices", "sections")
    where = next(given[n] for n in names if n in given)
    axis = code.recorder.axes(args[0])[dim]
    why = f"tensor_split in {code.recorder.where or 'the model'} needs all of its positions"
    if isinstance(where, Tensor):
        fix(axis, why)
    elif isinstance(where, int):
        keep_equal(axis, [code.recorder.axes(part)[dim] for part in result], why)
    else:
        for index in where:
            _interval(code, axis, 0, index)


def _columns(code: Code, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    _boundaries(code, args, kwargs, result, dim=min(args[0].dim() - 1, 1))


def _interval(code: Code, axis: Axis, start: Any, stop: Any) -> None:
    """Note where code cuts an axis."""
    if all(leaf.fixed for leaf in leaves(axis)) or (start in (None, 0) and stop is None):
        return
    n = axis.size
    low = 0 if start is None else min(start + n if start < 0 else int(start), n)
    high = n if stop is None else min(stop + n if stop < 0 else int(stop), n)
    parts = cut(axis, [low, max(high - low, 0), n - max(high, low)])
    if parts is None:
        return
    for bound, place, before, after in (
        (start, low, parts[0], concat(parts[1:])),
        (stop, high, concat(parts[:2]), parts[2]),
    ):
        if bound is not None and 0 < place < n:  # negative bounds count from the end
            size, axis = (bound, before) if bound >= 0 else (-bound, after)
            code.recorder.bind(expression_of(size), axis)


def _convolution(code: Code, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
    if groups > 1:
        first = code.recorder.axes(args[1] if len(args) > 1 else kwargs["weight"])[0]
        rows = factor(first, [int(groups), first.size // groups])
        if rows is not None:
            code.bind([groups], rows[:1])


def _channel_groups(code: Code, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    names = ("num_groups", "groups")
    groups = args[1] if len(args) > 1 else next(kwargs[n] for n in names if n in kwargs)
    channels = code.recorder.axes(args[0])[1]
    parts = factor(channels, [int(groups), channels.size // groups])
    if parts is not None:
        code.bind([groups], parts[:1])


def _layer_norm(code: Code, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    code.bind(shape, code.recorder.axes(args[0])[-len(shape) :])


def _instance_norm(code: Code, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """Note the number of channels that the module compares with those of its input."""
    module = code.recorder.stack[-1] if code.recorder.stack else None
    if isinstance(module, _InstanceNorm):
        code.bind([module.num_features], [code.recorder.axes(args[0])[1]])


def _number(code: Code, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """Note the sizes that code computes with; those in a shape are none of these."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Size):
            value.as_number()


def _values(code: Code, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    _number(code, tuple(tree_leaves((args, kwargs))), {}, result)


def _length(code: Code, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """Mix what is counted: Python makes a length a plain integer, so nobody sees what it is for."""
    mix(code.recorder.axes(args[0])[0], "its length is taken")


def _listed(code: Code, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    code.recorder.shadow(args[0]).asked()
    code.recorder.looked = True


def _attention(code: Code, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    _number(code, args, kwargs, result)
    given = dict(zip(("query", "key"), args, strict=False)) | kwargs
    if kwargs.get("scale") is None:
        _logits(code, given["query"], given["key"])


def _product(code: Code, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """Note the eager form of an attention that has a fused one too, with another scale."""
    recorder = code.recorder
    module = recorder.stack[-1] if recorder.stack else None
    if not isinstance(getattr(module, "scale", None), float) or not hasattr(module, "fused_attn"):
        return
    if all(logits.module is not module for logits in recorder.logits):
        _logits(code, args[0], args[1])


def _logits(code: Code, query: Tensor, key: Tensor) -> None:
    recorder = code.recorder
    module = recorder.stack[-1] if recorder.stack else None
    queries, keys = recorder.shadow(query), recorder.shadow(key)
    depth = queries.axes[-1]
    recorder.logits.append(Logits(queries, keys, depth, module, recorder.where, code.span))


#: Arithmetic, in which a size is a number; in place too.
_ARITHMETIC = (
    *("add", "sub", "rsub", "mul", "div", "floor_divide", "remainder", "fmod", "pow"),
    *("subtract", "multiply", "divide", "true_divide", "float_power", "lerp", "clamp", "clip"),
    *("__floordiv__", "__rsub__", "__rdiv__", "__rfloordiv__", "__rmod__", "__rpow__"),
    *("addcmul", "addcdiv", "addmm", "baddbmm", "gt", "ge", "lt", "le", "eq", "ne", "__eq__"),
    *("__ne__", "where", "masked_fill", "fill", "full", "full_like", "new_full"),
)
_SITES: _Sites = {
    **{name + ending: _number for name in _ARITHMETIC for ending in ("", "_")},
    **dict.fromkeys(("tensor", "as_tensor", "new_tensor"), _values),
    "__len__": _length,
    **dict.fromkeys(("tolist", "numpy"), _listed),
    **dict.fromkeys(("view", "reshape", "expand", "new_zeros", "new_ones", "new_empty"), _layout),
    **dict.fromkeys(("zeros", "ones", "empty"), _creation),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split"), _split),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    "instance_norm": _instance_norm,
    **dict.fromkeys(("matmul", "__matmul__", "bmm"), _product),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("group_norm", "channel_shuffle", "native_channel_shuffle"), _channel_groups),
    "unflatten": _unflatten,
    "narrow": _narrow,
    "__getitem__": _item,
    "__setitem__": _assignment,
    **dict.fromkeys(("tensor_split", "vsplit"), _boundaries),
    "hsplit": _columns,
    "dsplit": partial(_boundaries, dim=2),
}
