"""Sizes that code computes with, such as a scale by the root of a width.

Where units are masked the number stays, where they are removed it changes: what it counts is mixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from spamprune.pruning.axes.axis import Axis, mix
from spamprune.pruning.axes.call import Axes
from spamprune.pruning.axes.sizes import Attribute, Expression, attributes_of, axes_of
from spamprune.pruning.slices import owner

#: Layers that keep sizes for display, made those of their tensors after pruning.
_DISPLAYING = (
    *(nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm),
    *(nn.Embedding, nn.MultiheadAttention, nn.RNNBase, nn.PReLU),
)


def mix_numbers(
    numbers: Iterable[Expression],
    bound: Mapping[Attribute, Axis],
    sizes: Sequence[tuple[Expression, Axis]],
    model: nn.Module,
    tensors: Mapping[str, Axes],
) -> None:
    """Mix the axes on which numbers depend, once it is known which attributes follow which axes.

    Args:
        numbers: What code computed with.
        bound: The axes of attributes.
        sizes: Sizes in the code and the axes that they must equal.
        model: The network.
        tensors: Axes of its parameters and buffers.
    """
    waiting, seen = list(numbers), set[Attribute]()
    while waiting:
        expression = waiting.pop()
        for axis in axes_of(expression):
            mix(axis, "its size is a number in a computation")
        for attribute in attributes_of(expression) - seen:
            seen.add(attribute)
            if attribute in bound:
                waiting.append(bound[attribute])
                continue
            equations = [pair for pair in sizes if attribute in attributes_of(pair[0])]
            waiting += [side for pair in equations for side in pair]
            if not equations:
                waiting += _displayed(attribute, model.get_submodule(attribute.path), tensors)


def _displayed(attribute: Attribute, layer: nn.Module, tensors: Mapping[str, Axes]) -> Axes:
    """Return the axes that a layer's size for display may tell of."""
    if not isinstance(layer, _DISPLAYING):
        return []
    own = [name for name in tensors if owner(name)[0] == attribute.path]
    value = getattr(layer, attribute.name)
    return [axis for name in own for axis in tensors[name] if axis.size == value]
