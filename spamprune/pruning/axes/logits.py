"""Where the scale of attention logits can be folded into parameters.

Fused attention divides by the root of the *present* depth of a head, eager code by a stored scale.
When d of a head's dimensions become d', queries are multiplied by √(d'/d), so that both give the
logits of the masked network. The factor goes into the last parameters that a query is linear in; or
a key, where queries are used for something else too, such as relative positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spamprune.pruning.axes.axis import Axis, fix, indices
from spamprune.pruning.axes.call import Call, Shadow
from spamprune.pruning.axes.rules.layout import position


@dataclass
class Logits:
    """One product of queries and keys.

    Attributes:
        query: The queries, ``(..., depth)``.
        key: The keys, with the same axis among theirs.
        depth: The queries' last axis.
        module: The module that ran.
        path: Its name.
        span: The numbers of the calls that the product is made of.
    """

    query: Shadow
    key: Shadow
    depth: Axis
    module: nn.Module | None
    path: str
    span: range


@dataclass
class Fold:
    """What must be done when heads lose depth.

    Attributes:
        depth: The axis of a head's dimensions.
        rows: For each parameter that takes the factor, the dimension and its positions.
        scale: The module whose attribute ``scale`` is the inverse root of the depth, if any.
    """

    depth: Axis
    rows: list[tuple[str, int, Tensor]] = field(default_factory=list)
    scale: str | None = None


_LAYOUT = frozenset(
    (
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t"),
        *("expand", "clone", "_to_copy", "alias", "detach", "unsqueeze", "squeeze", "contiguous"),
        *("neg", "slice", "select", "unbind", "split", "split_with_sizes", "repeat", "roll"),
        *("flip", "index", "constant_pad_nd", "index_select"),
    )
)
_Range = tuple[Axis, int, int]
#: Name and dimension of a parameter → which positions.
_Rows = dict[tuple[str, int], Tensor]


def fold(logits: Logits) -> Fold:
    """Find the parameters that a query is linear in; fix its depth where there are none."""
    result = Fold(logits.depth)
    stored = getattr(logits.module, "scale", None)
    if isinstance(stored, float) and math.isclose(stored, logits.depth.size**-0.5, rel_tol=1e-6):
        result.scale = logits.path
    queries, keys = (_scaled_by(t, logits) for t in (logits.query, logits.key))
    shared = any((queries[place] & keys[place]).any() for place in queries.keys() & keys.keys())
    found = {} if shared else queries or keys
    result.rows = [(name, dim, rows.nonzero()[:, 0]) for (name, dim), rows in found.items()]
    if not found:
        fix(logits.depth, f"the scale of the logits in {logits.path} cannot be folded")
    return result


def _scaled_by(tensor: Shadow, logits: Logits) -> _Rows:
    """Return the rows of parameters that scale queries or keys, none where that cannot be."""
    found: _Rows = {}
    try:
        _search(tensor, logits, found)
    except _NotLinearError:
        return {}
    return found


class _NotLinearError(Exception):
    """A query or key that no parameter scales, or not alone."""


def _search(tensor: Shadow, logits: Logits, found: _Rows) -> None:
    """Go back from queries or keys to the last parameters that scale them; note their rows.

    Selections on the way, such as the first third of a joint projection, narrow the rows down.
    """
    waiting: list[tuple[Shadow, tuple[_Range, ...]]] = [(tensor, ())]
    seen: set[tuple[int, tuple[_Range, ...]]] = set()
    alone: list[Shadow] = []  # what nothing but queries, or keys, is made of
    while waiting:
        tensor, ranges = waiting.pop()
        if (id(tensor), ranges) in seen:
            continue
        seen.add((id(tensor), ranges))
        if not ranges:
            alone.append(tensor)
        if tensor.parameter:
            _note(tensor, ranges, logits.depth, found)
            continue
        calls = tensor.makers
        if not calls and tensor.is_data:
            raise _NotLinearError
        # without calls it is a constant, such as the zeros that stand for the bias of keys
        for call in reversed(calls):
            operands = _operands(call, tensor, ranges)
            waiting += operands
            if all(t is not tensor for t, _ in operands):  # not one that changes it in place
                break
    ids = {number for number, _ in seen}
    if not found or any(_used_elsewhere(t, ids, logits.span) for t in alone):
        raise _NotLinearError


def _used_elsewhere(tensor: Shadow, ids: set[int], span: range) -> bool:
    """Tell whether data is read by a call that is neither the product nor on the way to it."""
    if not tensor.is_data:
        return False
    return any(
        call.number not in span and not any(id(out) in ids for out in call.outputs)
        for call in tensor.readers
    )


def _note(
    tensor: Shadow,
    ranges: tuple[_Range, ...],
    depth: Axis,
    found: _Rows,
) -> None:
    """Add the rows of a parameter that belong to queries."""
    for dim, axis in enumerate(tensor.axes):
        rows = indices(axis, depth) >= 0
        if not rows.any():
            continue
        for part, start, stop in ranges:
            rows &= _within(axis, part, start, stop)
        place = (tensor.parameter, dim)
        old = found.get(place)
        found[place] = rows if old is None else old | rows
        return
    raise _NotLinearError


def _within(axis: Axis, part: Axis, start: int, stop: int) -> Tensor:
    """Tell which positions are in a range of ``part``, or not in ``part`` at all."""
    place = indices(axis, part)
    return (place < 0) | ((place >= start) & (place < stop))


def _operands(
    call: Call, tensor: Shadow, ranges: tuple[_Range, ...]
) -> list[tuple[Shadow, tuple[_Range, ...]]]:
    """Return the operands that take a factor on the result of a call, all of them together."""
    if call.name in _LAYOUT:
        return [(call["self"], (*ranges, *_selection(call, tensor)))]
    tensors = call.tensors()
    data = [t for t in tensors if t.is_data]
    if call.name in ("add", "add_", "sub", "sub_"):
        return [(t, ranges) for t in tensors] if len(tensors) == 2 else _give_up()
    if call.name in ("mul", "mul_", "div", "div_"):
        weights = [t for t in tensors if not t.is_data and _made_of(t)]
        if call.name.startswith("mul") and weights:
            return [(weights[0], ranges)]
        return [(t, ranges) for t in data[:1]] if len(data) == 1 else _give_up()
    if call.name == "cat":
        return [(t, ranges) for t in _survivors(call, tensor, ranges)]
    if call.name in ("stack", "copy_"):
        return [(t, ranges) for t in (call["tensors"] or tensors)]
    if call.name in ("mm", "bmm", "addmm", "baddbmm", "convolution", "linear"):
        weights = [t for t in tensors if not t.is_data]
        return [(t, ranges) for t in weights] if weights else _give_up()
    if call.name in ("native_layer_norm", "native_batch_norm", "rms_norm", "_fused_rms_norm"):
        weights = [call[n] for n in ("weight", "bias") if isinstance(call[n], Shadow)]
        return [(t, ranges) for t in weights] if weights else _give_up()
    return _give_up()


def _give_up() -> list[tuple[Shadow, tuple[_Range, ...]]]:
    raise _NotLinearError


def _made_of(tensor: Shadow) -> bool:
    """Tell whether a tensor is a parameter or computed from one."""
    if tensor.parameter:
        return True
    calls = tensor.makers[:1]
    return any(_made_of(t) for call in calls for t in call.tensors())


def _selection(call: Call, tensor: Shadow) -> list[_Range]:
    """Return which part of its operand's axis a selecting call takes."""
    if call.name == "select":
        axis = call.of("self")[call["dim"]]
        start = call["index"] % axis.size
        return [(axis, start, start + 1)]
    if call.name == "slice" and call["step"] == 1:
        axis = call.of("self")[call["dim"]]
        start = position(call["start"], axis.size, 0)
        return [(axis, start, start + tensor.shape[call["dim"]])]
    if call.name in ("unbind", "split", "split_with_sizes"):
        axis = call.of("self")[call["dim"]]
        sizes = [1 if call.name == "unbind" else out.shape[call["dim"]] for out in call.outputs]
        place = next(i for i, out in enumerate(call.outputs) if out is tensor)
        return [(axis, sum(sizes[:place]), sum(sizes[: place + 1]))]
    return []


def _survivors(call: Call, tensor: Shadow, ranges: tuple[_Range, ...]) -> list[Shadow]:
    """Return the operands of a concatenation of which the ranges leave something."""
    dim = call["dim"] or 0
    axis = tensor.axes[dim]
    alive = torch.ones(axis.size, dtype=torch.bool)
    for part, start, stop in ranges:
        alive &= _within(axis, part, start, stop)
    operands = [t for t in call["tensors"] if t.dim() == tensor.dim()]
    kept = alive.split([t.shape[dim] for t in operands])
    return [t for t, left in zip(operands, kept, strict=True) if left.any()]
