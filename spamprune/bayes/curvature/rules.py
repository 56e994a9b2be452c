"""Per-sample gradients of the operations in which parameters meet data.

A *term* is the part of one use that concerns one pure tensor, its target: from the gradient at the
operation's output it gives the target's gradient for each sample. Data and gradients come *split*:
views of shape (samples, folded, *rest), see :mod:`spamprune.bayes.curvature.layout`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

#: Output pixels above which a depthwise weight gradient is quicker sample by sample, on a CPU.
_LARGE = 128


class Rule(Protocol):
    """How per-sample gradients follow from data and the gradient at the output."""

    def per_sample(self, gradient: Tensor, *data: Tensor) -> Tensor:
        """Return the target's gradients, shape (samples, elements of the target)."""
        ...


@runtime_checkable
class MatrixRule(Rule, Protocol):
    """A rule whose per-sample gradient is a sum over positions of outer products.

    Attributes:
        copies: How many times the columns hold each number of the data.
    """

    @property
    def copies(self) -> int: ...  # noqa: D102

    def matrices(self, gradient: Tensor, *data: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows (samples, groups, out, T) and columns (samples, groups, in, T)."""
        ...

    def restore(self, found: Tensor) -> Tensor:
        """Fill in the inputs (last dimension) that the columns leave out as always zero."""
        ...


def _reduced(values: Tensor, axis: int, shape: tuple[int, ...]) -> Tensor:
    """Sum split values over everything along which a target was broadcast.

    Args:
        values: Shape (samples, folded, *output shape without the batch axis).
        axis: The batch axis in the operation's output.
        shape: Of the target, padded with ones in front to the output's rank.
    """
    rest = shape[:axis] + shape[axis + 1 :]
    summed = [1] + [i + 2 for i, n in enumerate(rest) if n == 1]
    return values.sum(summed).reshape(len(values), -1)


@dataclass(frozen=True)
class Shift:
    """``output = … + sign · target``, the target broadcast."""

    axis: int
    shape: tuple[int, ...]
    sign: float = 1.0

    def per_sample(self, gradient: Tensor, *data: Tensor) -> Tensor:
        """Sum the gradient over the positions that share the target."""
        return self.sign * _reduced(gradient, self.axis, self.shape)


@dataclass(frozen=True)
class Scale:
    """``output = factor(data) · target``, the target broadcast."""

    axis: int
    shape: tuple[int, ...]
    factor: Callable[[Tensor], Tensor] = lambda x: x

    def per_sample(self, gradient: Tensor, *data: Tensor) -> Tensor:
        """Sum gradient times factor over the positions that share the target."""
        return _reduced(gradient * self.factor(data[0]), self.axis, self.shape)


@dataclass(frozen=True)
class Linear:
    """``output = data @ targetᵀ`` on inputs of any rank."""

    copies = 1

    def matrices(self, gradient: Tensor, *data: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs' gradients and inputs, tokens as positions."""
        rows, columns = (x.reshape(len(x), 1, -1, x.shape[-1]) for x in (gradient, data[0]))
        return rows.mT, columns.mT

    def columns(self, data: Tensor) -> Tensor:
        """Return the inputs of all samples side by side: (1, in, samples · tokens)."""
        return data.reshape(1, -1, data.shape[-1]).mT

    def restore(self, found: Tensor) -> Tensor:
        """Return what is given: no input is left out."""
        return found

    def per_sample(self, gradient: Tensor, *data: Tensor) -> Tensor:
        """Sum outer products over tokens."""
        rows, columns = self.matrices(gradient, *data)
        return (rows @ columns.mT).flatten(1)


@dataclass(frozen=True)
class Convolution:
    """A convolution of any dimension, its target of shape (out, in/groups, *kernel).

    Attributes:
        kernel: Size of the part of the kernel that ever meets the image.
        margins: How many of the kernel's elements before and after that part, on each axis, only
            ever meet padding; they get no gradient.
        stride: Of the windows.
        padding: Zeros before and after each axis of the image; negative ones cut it.
        dilation: Of the kernel.
        groups: Of channels.
    """

    kernel: tuple[int, ...]
    margins: tuple[tuple[int, int], ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def copies(self) -> int:
        """Return the size of the kernel's window."""
        return math.prod(self.kernel)

    def restore(self, found: Tensor) -> Tensor:
        """Give the kernel's elements that only meet padding their zeros."""
        if not any(map(any, self.margins)):
            return found
        return pad(found.unflatten(-1, (-1, *self.kernel)), self.margins).flatten(found.dim() - 1)

    def windows(self, images: Tensor) -> Tensor:
        """Return what the kernel sees at each position: (n, in, *kernel, *positions)."""
        dims = len(self.kernel)
        images = pad(images, self.padding)
        for axis in range(dims):
            span = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            images = images.unfold(2 + axis, span, self.stride[axis])
        index: list[Any] = [..., *(slice(None, None, d) for d in self.dilation)]
        images = images[tuple(index)]
        return images.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))

    def columns(self, data: Tensor) -> Tensor:
        """Return unfolded inputs of all samples side by side: (groups, in, samples · pixels)."""
        # images next to positions: one copy, in its final order
        windows = self.windows(data.flatten(0, 1)).movedim(0, -len(self.kernel) - 1)
        return windows.reshape(self.groups, len(windows) * self.copies // self.groups, -1)

    def matrices(self, gradient: Tensor, *data: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs' gradients and unfolded inputs, output pixels as positions."""
        samples, folded, _, *positions = gradient.shape
        rows, windows = gradient.flatten(0, 1), self.windows(data[0].flatten(0, 1))
        # a transposed convolution's output padding may leave more windows than positions
        index: list[Any] = [..., *(slice(n) for n in positions)]
        windows = windows[tuple(index)]
        pixels = math.prod(positions)
        rows = rows.reshape(samples, folded, self.groups, -1, pixels)
        columns = windows.reshape(samples, folded, self.groups, -1, pixels)
        return _positions_last(rows), _positions_last(columns)

    def per_sample(self, gradient: Tensor, *data: Tensor) -> Tensor:
        """Sum outer products over output pixels."""
        rows, columns = self.matrices(gradient, *data)
        return self.restore(rows @ columns.mT).flatten(1)


@dataclass(frozen=True)
class Depthwise(Convolution):
    """A convolution with one input channel to a group, for which matrices are slow."""

    def per_sample(self, gradient: Tensor, *data: Tensor) -> Tensor:
        """Call torch's weight gradient, for small images with samples taken for channels."""
        images = pad(data[0].flatten(0, 1), self.padding)
        samples, folded = gradient.shape[:2]
        gradient = gradient.flatten(0, 1)
        if gradient.dim() == 4 and gradient[0, 0].numel() > _LARGE:
            images = images.contiguous(memory_format=torch.channels_last)
            gradient = gradient.contiguous(memory_format=torch.channels_last)
            pairs = zip(gradient.split(1), images.split(1), strict=True)
            found = torch.cat([self._weight_gradient(*pair, self.groups) for pair in pairs])
        else:
            found = self._weight_gradient(
                gradient.reshape(1, -1, *gradient.shape[2:]),
                images.reshape(1, -1, *images.shape[2:]),
                len(images) * self.groups,
            )
        return self.restore(found.view(samples, folded, -1, self.copies)).sum(1).flatten(1)

    def _weight_gradient(self, gradient: Tensor, images: Tensor, groups: int) -> Tensor:
        nothing = [0] * len(self.kernel)
        weight = gradient.new_empty(()).expand(gradient.shape[1], 1, *self.kernel)
        sizes = (self.stride, nothing, self.dilation, False, nothing, groups)
        backward = torch.ops.aten.convolution_backward
        return backward(gradient, images, weight, None, *sizes, [False, True, False])[1]


def _positions_last(values: Tensor) -> Tensor:
    """Turn (samples, folded, groups, features, positions) into (…, features, folded·positions)."""
    if values.shape[1] == 1:
        return values.squeeze(1)
    return values.movedim(1, 3).flatten(3)


@dataclass(frozen=True)
class Transposed:
    """A transposed convolution: a convolution with the roles of data and gradient exchanged."""

    convolution: Convolution

    @property
    def copies(self) -> int:
        """Return the size of the kernel's window."""
        return self.convolution.copies

    def matrices(self, gradient: Tensor, *data: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and unfolded outputs' gradients, input pixels as positions."""
        return self.convolution.matrices(data[0], gradient)

    def restore(self, found: Tensor) -> Tensor:
        """Return what is given: no element is left out."""
        return found

    def per_sample(self, gradient: Tensor, *data: Tensor) -> Tensor:
        """Sum outer products over input pixels."""
        return self.convolution.per_sample(data[0], gradient)


@dataclass(frozen=True)
class Lookup:
    """``output = target[indices]``, in a table of ``rows`` rows."""

    rows: int
    padding: int | None

    def per_sample(self, gradient: Tensor, *data: Tensor) -> Tensor:
        """Sum the gradient over the tokens of a sample that share a row."""
        samples, width = len(gradient), gradient.shape[-1]
        indices = data[0].reshape(samples, -1)
        gradient = gradient.reshape(samples, -1, width)
        if self.padding is not None:
            gradient = gradient * (indices != self.padding)[..., None]
        result = gradient.new_zeros(samples, self.rows, width)
        result.scatter_add_(1, indices[..., None].expand_as(gradient), gradient)
        return result.flatten(1)


@dataclass(frozen=True)
class AttentionBias:
    """The additive mask of scaled dot-product attention."""

    axis: int
    mask: Tensor
    scale: float

    def per_sample(self, gradient: Tensor, *data: Tensor) -> Tensor:
        """Backpropagate through the softmax to its logits."""
        query, key, value = data
        weights = (query @ key.mT * self.scale + self.mask).softmax(-1)
        moved = gradient @ value.mT
        logits = weights * (moved - (weights * moved).sum(-1, keepdim=True))
        return _reduced(logits, self.axis, aligned(self.mask.shape, logits.dim() - 1))


@dataclass(frozen=True)
class Local:
    """Any other operation, repeated and differentiated one sample at a time."""

    call: Callable[..., Tensor]
    target: Tensor

    def per_sample(self, gradient: Tensor, *data: Tensor) -> Tensor:
        """Backpropagate each sample's share of the gradient through the operation."""
        rows = []
        for share, *inputs in zip(gradient, *data, strict=True):
            with torch.enable_grad():
                target = self.target.detach().requires_grad_()
                output = self.call(target, *inputs)
            rows.append(torch.autograd.grad(output, target, share)[0].flatten())
        return torch.stack(rows)


def pad(tensor: Tensor, padding: tuple[tuple[int, int], ...]) -> Tensor:
    """Pad the last axes with zeros, before and after; cut where negative."""
    if not any(map(any, padding)):
        return tensor
    return F.pad(tensor, [n for pair in reversed(padding) for n in pair])


def aligned(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Pad a shape with ones in front, as broadcasting does."""
    return (1,) * (rank - len(shape)) + tuple(shape)
