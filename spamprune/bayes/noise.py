"""A batch under drawn weights, each sample under its own where that is possible.

With one draw for a whole batch all its gradients share one noise. Two remedies leave every sample
weights that are drawn from the posterior:

- Where a sample meets a weight once, its products are independent normals, and are drawn themselves
  (local reparameterisation, Kingma et al. 2015). That is so in linear layers on one vector for each
  sample; not in convolutions, nor on tokens, where a weight is the same at all positions.
- There every sample flips the signs of the deviations by those of its inputs and outputs, drawn at
  random (flipout, Wen et al. 2018): deviations are symmetric.

All other operations have the weights as drawn for the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from spamprune.bayes.parameters import named_parameters
from spamprune.bayes.reparameterised import Weight, linear
from spamprune.modules import evaluation_mode

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


@dataclass(frozen=True)
class Uses:
    """How a network uses its parameters, by name.

    Attributes:
        once: Met once, in a linear layer on one vector for each sample.
        shared: Registered with several modules, which may be met by operations of which only some
            are products.
    """

    once: frozenset[str]
    shared: frozenset[str]


@torch.no_grad()
def uses(network: nn.Module, inputs: Tensor) -> Uses:
    """Return how a network uses its parameters, as an evaluation pass shows."""
    parameters = named_parameters(network)
    everywhere = Counter(id(p) for _, p in network.named_parameters(remove_duplicate=False))
    with evaluation_mode(network), _Met(len(inputs)) as met:
        network(inputs)
    trained = {id(p) for p in parameters.values()}
    once = {
        tensor
        for weight, bias in met.products
        if weight in trained
        and met.counts[weight] == 1
        and (bias not in trained or met.counts[bias] == 1)
        for tensor in (weight, bias)
    }
    return Uses(
        frozenset(name for name, p in parameters.items() if id(p) in once),
        frozenset(name for name, p in parameters.items() if everywhere[id(p)] > 1),
    )


class _Met(TorchFunctionMode):
    """Counts how often tensors are met, and notes the linear layers on one vector per sample."""

    def __init__(self, batch: int):
        super().__init__()
        self._batch = batch
        self.counts: Counter[int] = Counter()
        self.products: list[tuple[int, int]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.counts.update(id(leaf) for leaf in tree_leaves((args, kwargs)))
        if func is F.linear:
            data, weight, bias, _, _ = _arguments(args, kwargs)
            if _one_vector_each(data, self._batch):
                self.products.append((id(weight), id(bias)))
        return func(*args, **kwargs)


class PerSample(TorchFunctionMode):
    """Products of a batch with drawn weights see deviations of their own for every sample.

    Operations whose input does not have the samples in its first dimension use the weights as drawn
    for the whole batch, as do all that are no products.

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
            if name not in uses.shared:
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
        if own is not None and _one_vector_each(data, self._batch) and not mixed:
            undrawn = self._undrawn.get(id(bias))
            output = linear(data, own, undrawn)
            return output if bias is None or undrawn is not None else output + bias
        parts = self._drawn(weight)
        if parts is None:
            return func(*args, **kwargs)
        mean, deviation = parts
        of_bias = self._drawn(bias)
        fits = data.dim() == weight.dim() or (func is F.linear and data.dim() > 1)
        if len(data) != self._batch or not fits:
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


def _one_vector_each(data: Tensor, batch: int) -> bool:
    return data.dim() == 2 and len(data) == batch


def _signs(tensor: Tensor, axis: int) -> Tensor:
    """Return random signs for each sample and channel."""
    size = (len(tensor), tensor.shape[axis])
    # on a CPU many times as fast as a Bernoulli draw
    return torch.rand(size, dtype=tensor.dtype, device=tensor.device).round_().mul_(2).sub_(1)
