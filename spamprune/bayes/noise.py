"""A batch under drawn weights, each sample under its own where that is possible.

With one draw for a whole batch all its gradients share one noise. Two remedies leave every sample
weights that are drawn from the posterior:

- Where a sample meets a weight once, its products are independent normals, and are drawn themselves
  (local reparameterisation, Kingma et al. 2015). That is so in linear layers on one vector for each
  sample; not in convolutions, nor on tokens, where a weight is the same at all positions.
- There every sample flips the signs of the deviations by those of its inputs and outputs, drawn at
  random (flipout, Wen et al. 2018): deviations are symmetric. A weight that is met in several ways
  would not be one weight then.

All else has the weights as drawn for the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from spamprune.bayes.reparameterised import Weight, linear
from spamprune.errors import PosteriorError
from spamprune.modules import same_buffers

#: Products of data with a weight, as ``(input, weight, bias, …)``, and the axis of channels.
_PRODUCTS = {
    F.linear: -1,
    F.conv1d: 1,
    F.conv2d: 1,
    F.conv3d: 1,
    F.conv_transpose1d: 1,
    F.conv_transpose2d: 1,
    F.conv_transpose3d: 1,
}

#: What timm's and Hugging Face's modules call it.
_CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing")
_RECOMPUTED = (
    "the network computes activations again in the backward pass, where its weights are others "
    "than were drawn: turn activation checkpointing off, and other hooks on saved tensors"
)


@dataclass(frozen=True)
class Uses:
    """How a network uses its parameters, by name.

    Attributes:
        once: Met once, in a linear layer on one vector for each sample.
        flipped: The other ones that are met by products of one kind only, always with the samples
            along the first dimension of the data.
    """

    once: frozenset[str]
    flipped: frozenset[str]


def uses(network: nn.Module, parameters: Mapping[str, Tensor], inputs: Tensor) -> Uses:
    """Return how a network, in the mode that it is in, uses its parameters.

    Args:
        network: Its buffers and the random numbers are left as they were.
        parameters: Those of the network that are asked about, by name.
        inputs: A batch. A dimension is that of the samples if it doubles with them: some networks
            take pairs, which one sample more would not be.

    Raises:
        PosteriorError: The network computes activations again in the backward pass.
    """
    names = {id(p): name for name, p in parameters.items()}
    with torch.random.fork_rng(), _kept_activations():
        with same_buffers(network), torch.enable_grad(), _Met(len(inputs)) as met:
            outputs = network(inputs)
        with same_buffers(network), torch.no_grad(), _Met(2 * len(inputs)) as more:
            network(torch.cat([inputs, inputs]))
    flags = [getattr(m, flag, False) for m in network.modules() for flag in _CHECKPOINTING]
    if any(flags) or "CheckpointFunctionBackward" in _operations(outputs):
        raise PosteriorError(_RECOMPUTED)
    pairs = list(zip(met.products, more.products, strict=False))
    once: set[str] = set()
    flipped: set[str] = set()
    for weight, name in names.items():
        own = [(use, other) for use, other in pairs if use.weight == weight]
        same = len({(use.function, use.bias) for use, _ in own}) == 1
        if not same or len(own) < met.counts[weight] or not all(a.fits and b.fits for a, b in own):
            continue
        use = own[0][0]
        found = once if use.one_vector and len(own) == 1 else flipped
        found.add(name)
        if use.bias in names and met.counts[use.bias] == len(own):
            found.add(names[use.bias])
    return Uses(frozenset(once), frozenset(flipped))


@contextmanager
def _kept_activations() -> Iterator[None]:
    """Refuse hooks on saved tensors, by which a checkpoint that is not reentrant works."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(_RECOMPUTED):
            yield
    except RuntimeError as error:
        if str(error) != _RECOMPUTED:
            raise
        raise PosteriorError(_RECOMPUTED) from error


def _operations(outputs: Any) -> set[str]:
    """Return the names of the operations that autograd goes back through."""
    ahead = [leaf.grad_fn for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    seen = set()
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [before for before, _ in node.next_functions]
    return {node.name() for node in seen}


class _Product(NamedTuple):
    """A product that was met: tensors by id, and the form of its data.

    Attributes:
        function: Which.
        weight: Of which weight.
        bias: And which bias.
        fits: Whether the samples are along the first dimension of the data.
        one_vector: Whether they are one vector each.
    """

    function: Callable[..., Tensor]
    weight: int
    bias: int
    fits: bool
    one_vector: bool


class _Met(TorchFunctionMode):
    """Counts how often tensors are met, and notes the products among those times."""

    def __init__(self, batch: int):
        super().__init__()
        self._batch = batch
        self.counts: Counter[int] = Counter()
        self.products: list[_Product] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.counts.update(id(leaf) for leaf in tree_leaves((args, kwargs)))
        if func in _PRODUCTS:
            data, weight, bias, _, _ = _arguments(args, kwargs)
            fits = _per_sample(func, data, weight, self._batch)
            vector = func is F.linear and data.dim() == 2
            self.products.append(_Product(func, id(weight), id(bias), fits, vector))
        return func(*args, **kwargs)


class PerSample(TorchFunctionMode):
    """Products of a batch with drawn weights see deviations of their own for every sample.

    Args:
        weights: The distributions of the weights, by name.
        uses: How the network uses them.
        batch: The number of samples.

    Attributes:
        tensors: What to call the network with, by name: weights as drawn, or what stands for them.
    """

    def __init__(self, weights: Mapping[str, Weight], uses: Uses, batch: int):
        super().__init__()
        self._batch = batch
        self._parts: dict[int, tuple[Tensor, Tensor]] = {}
        self._undrawn: dict[int, Weight] = {}
        self._signs: dict[int, tuple[Tensor, Tensor]] = {}
        self.tensors: dict[str, Tensor] = {}
        for name, weight in weights.items():
            if name in uses.once:  # its mean stands for it, and is never looked into
                self.tensors[name] = weight.mean
                self._undrawn[id(weight.mean)] = weight
                continue
            centre, deviation = weight.draw()
            self.tensors[name] = centre + deviation
            if name in uses.flipped:
                self._parts[id(self.tensors[name])] = centre, deviation

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS:
            return func(*args, **kwargs)
        data, weight, bias, rest, named = _arguments(args, kwargs)
        own = self._undrawn.get(id(weight))
        mixed = torch.is_autocast_enabled(data.device.type)  # the square root wants full precision
        per_sample = _per_sample(func, data, weight, self._batch)
        if own is not None and per_sample and data.dim() == 2 and not mixed:
            undrawn = self._undrawn.get(id(bias))
            output = linear(data, own, undrawn)
            return output if bias is None or undrawn is not None else output + bias
        parts = self._drawn(weight)
        if parts is None:
            return func(*args, **kwargs)
        mean, deviation = parts
        of_bias = self._drawn(bias)
        if not per_sample:
            whole = torch.add(*of_bias) if of_bias else bias
            return func(data, mean + deviation, whole, *rest, **named)
        centre, shift = of_bias or (bias, None)
        axis = _PRODUCTS[func] % data.dim()
        output = func(data, mean, centre, *rest, **named)
        if id(weight) not in self._signs:  # a weight that is met again is the same
            self._signs[id(weight)] = (_signs(data, axis), _signs(output, axis))
        before, after = self._signs[id(weight)]
        shape = [-1 if d in (0, axis) else 1 for d in range(data.dim())]
        shape[0] = self._batch
        flipped = func(data * before.view(shape), deviation, shift, *rest, **named)
        return torch.addcmul(output, after.view(shape), flipped)

    def _drawn(self, tensor: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Return the parts of a weight, drawn now if they were not; nothing for other tensors."""
        if id(tensor) in self._undrawn and id(tensor) not in self._parts:
            self._parts[id(tensor)] = self._undrawn[id(tensor)].draw()
        return self._parts.get(id(tensor))


def _arguments(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Any, ...], dict[str, Any]]:
    """Return input, weight, bias, and further arguments of a product."""
    named = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs)
    return named.pop("input"), named.pop("weight"), named.pop("bias", None), args[3:], named


def _per_sample(function: Any, data: Tensor, weight: Tensor, batch: int) -> bool:
    """Return whether the samples are along the first dimension of a product's data."""
    whole = data.dim() == weight.dim() or (function is F.linear and data.dim() > 1)
    return whole and len(data) == batch


def _signs(tensor: Tensor, axis: int) -> Tensor:
    """Return random signs for each sample and channel."""
    size = (len(tensor), tensor.shape[axis])
    # on a CPU many times as fast as a Bernoulli draw
    return torch.rand(size, dtype=tensor.dtype, device=tensor.device).round_().mul_(2).sub_(1)
