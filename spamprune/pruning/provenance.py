"""Where a network takes what its layers read, by autograd's record of a forward pass.

The backward function of an operation that only moves entries carries each of them to where it was
taken from, and does so with labels as well as with gradients.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: A function of autograd's graph. Its ``_input_metadata`` are of what the operation returned.
Function = Any

#: Operations that only move entries; to go backward they need no values.
_MOVES = {
    "Cat",
    "ChannelShuffle",
    "ConstantPadNd",
    "Flip",
    "IndexSelect",
    "Permute",
    "PixelShuffle",
    "PixelUnshuffle",
    "ReshapeAlias",
    "Roll",
    "Select",
    "Slice",
    "Split",
    "SplitWithSizes",
    "Squeeze",
    "Stack",
    "T",
    "Transpose",
    "Unbind",
    "UnsafeView",
    "Unsqueeze",
    "View",
}

#: Operations that sum over channels: which operand has them, along which dimension, and which
#: operand is the weight.
_SUMS = {"Convolution": (0, 1, 1), "Addmm": (1, -1, 2), "Mm": (0, -1, 1)}


@dataclass(frozen=True)
class Reading:
    """What an operation that sums over channels has read.

    Attributes:
        source: The function that it was read from.
        output: Which of the function's outputs.
        shape: The shape of what was read.
        dim: The dimension of the channels.
        weight: The trainable parameter that multiplies them, if it is one.
    """

    source: Function
    output: int
    shape: torch.Size
    dim: int
    weight: nn.Parameter | None


def reading(function: Function) -> Reading | None:
    """Return what ``function`` reads, or None: it sums over no channels, or reads the input."""
    if _operation(function) not in _SUMS:
        return None
    place, dim, weight = _SUMS[_operation(function)]
    source, output = function.next_functions[place]
    if source is None:
        return None
    owner = function.next_functions[weight][0]
    while owner is not None and owner.next_functions:  # it is transposed, or cast
        owner = owner.next_functions[0][0]
    shape = shape_of(source, output)
    return Reading(source, output, shape, dim, getattr(owner, "variable", None))


def sources(
    read: Reading, labels: Tensor, ends: Set[Function]
) -> Iterator[tuple[Function, Tensor]]:
    """Carry labels of channels back to everything that they come from.

    Args:
        read: Where the channels are read.
        labels: A positive number for each, shape ``(channels,)``.
        ends: Functions beyond which there is nothing to look for.

    Yields:
        A function, and labels of the shape of its first output; 0 where nothing is known. Again
        for each way that leads to it with other labels. Ways through operations that mix entries,
        or that are not known, are not followed.
    """
    view = [1] * len(read.shape)
    view[read.dim] = -1
    labels = labels.to(read.source._input_metadata[read.output].device)
    ways = [(read.source, read.output, labels.view(view).expand(read.shape))]
    known: dict[tuple[Function, int], list[Tensor]] = defaultdict(list)
    while ways:
        function, output, found = ways.pop()
        before = known[function, output]
        if any(found is other or torch.equal(found, other) for other in before):
            continue
        before.append(found)
        if output == 0:
            yield function, found
        if function not in ends and _operation(function) not in _SUMS:
            ways += _operands(function, output, found)


def shape_of(function: Function, output: int = 0) -> torch.Size:
    """Return the shape of an output of ``function``."""
    shape: torch.Size = function._input_metadata[output].shape
    return shape


def _operation(function: Function) -> str:
    name: str = function.name()
    return name.rstrip("0123456789").removesuffix("Backward")


def _operands(
    function: Function, output: int, labels: Tensor
) -> Iterator[tuple[Function, int, Tensor]]:
    """Carry labels of an output back to the operands for which that can be done."""
    operation = _operation(function)
    moved: Sequence[Tensor | None] | None = None
    if operation == "Index":
        moved = (_before_indexing(function, labels),)
    elif operation in _MOVES:
        outputs: list[Tensor | None] = [None] * len(function._input_metadata)
        outputs[output] = labels
        moved = function(*outputs)
        moved = moved if isinstance(moved, tuple) else (moved,)
    for place, (source, number) in enumerate(function.next_functions):
        if source is None:  # nothing there can be pruned
            continue
        shape = shape_of(source, number)
        if moved is not None:
            found = moved[place]
        elif operation == "Bmm":  # which sums over the columns of one and the rows of the other
            found = _as_operand(function, labels, _with_one(shape, -1 if place == 0 else -2))
            found = None if found is None else found.expand(shape)
        elif operation.startswith("ScaledDotProduct") and place != 2:
            continue  # only values are carried; queries and keys are multiplied
        else:
            found = _as_operand(function, labels, shape)
        if found is not None:
            yield source, number, found


def _before_indexing(function: Function, labels: Tensor) -> Tensor:
    """Do what the function itself does for numbers of the network's own type only."""
    where = [slice(None) if index is None else index for index in function._saved_indices]
    found = labels.new_zeros(function._saved_self_sym_sizes)
    found[tuple(where)] = labels
    return found


def _with_one(shape: torch.Size, dim: int) -> torch.Size:
    sizes = list(shape)
    sizes[dim] = 1
    return torch.Size(sizes)


def _as_operand(function: Function, labels: Tensor, shape: torch.Size) -> Tensor | None:
    """Return the labels of an operand that is broadcast, averaged, pooled or taken as it is.

    None where they differ along a dimension that the operand does not have, or has otherwise.
    """
    if labels.shape == shape:
        return labels
    if labels.ndim < len(shape):
        labels = _with_dims(labels, getattr(function, "_saved_dim", ()), len(shape))
    if labels.ndim < len(shape):
        return None
    padded = (1,) * (labels.ndim - len(shape)) + tuple(shape)
    for dim, size in enumerate(padded):
        if labels.shape[dim] != size:
            most = labels.amax(dim, keepdim=True)
            if ((labels != most) & (labels != 0)).any():
                return None
            labels = most
    return labels.expand(padded).reshape(shape)


def _with_dims(labels: Tensor, dims: int | Sequence[int] | None, ndim: int) -> Tensor:
    """Insert the dimensions over which an operation has averaged."""
    dims = (dims,) if isinstance(dims, int) else dims or ()
    signed = ((d + 2**63) % 2**64 - 2**63 for d in dims)  # autograd shows them without their sign
    for dim in sorted(d % ndim for d in signed):
        labels = labels.unsqueeze(dim)
    return labels
