"""What a curvature pass will take, told before it starts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from spamprune.bayes.curvature.base import Structure
from spamprune.bayes.curvature.batches import DEFAULT_BUDGET, examine, pair, processes
from spamprune.bayes.curvature.method import CurvatureMethod
from spamprune.bayes.likelihood import CLASSIFICATION, Likelihood
from spamprune.bayes.parameters import named_parameters
from spamprune.errors import PosteriorError
from spamprune.modules import device_of, differentiable

#: Time of one backward pass of each kind over that of a plain one with all weight gradients;
#: round figures of what benchmarks/curvature.py measures.
_BACKWARD = {"sketch": 1.05, "exact": 1.7, "asdl": 2.5, "kron": 1.6}

_WITH_FACTORS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Preflight:
    """What a curvature pass will take, roughly; ``str()`` says it in a line.

    Attributes:
        what: Names the pass.
        samples: Samples that this process will see.
        seconds: About how long that takes.
        bytes: Of the result and the gradients or factors on the way to it, beside the model.
        activations: Bytes kept for the backward pass at a time.
    """

    what: str
    samples: int
    seconds: float
    bytes: int
    activations: int

    def __str__(self) -> str:
        """Return for example ``sketch of 60 000 samples: about 9 s, 1.2 MB beside …``."""
        return (
            f"{self.what} of {_grouped(self.samples)} samples: about {_duration(self.seconds)}, "
            f"{_size(self.bytes)} beside activations of {_size(self.activations)}"
        )


def preflight(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    n_data: int,
    curvature: CurvatureMethod = CurvatureMethod(),  # noqa: B008 - frozen
    likelihood: Likelihood = CLASSIFICATION,
) -> Preflight:
    """Estimate what a curvature pass will take, from one gradient pass over a part of a batch.

    Forward and backward are timed apart, after a warm-up, on as many samples as take about half a
    second. The backward passes are counted: one for each draw, and for an exact Gauss-Newton one
    for each output of a sample.

    Args:
        model: The network; its modes and gradients are left as they are.
        batches: Pairs of inputs and targets, of which the first is used.
        n_data: Size of the data set that the curvature is summed over.
        curvature: How it would be computed.
        likelihood: Of the targets.

    Raises:
        PosteriorError: There are no batches, or samples are not independent of each other.
    """
    inputs, targets = pair(next(iter(batches), (torch.empty(0), torch.empty(0))))
    if len(inputs) == 0:
        raise PosteriorError("a preflight needs data: the loader gave no batches")
    device = device_of(model)
    inputs, targets = inputs.to(device), targets.to(device)
    with differentiable(model):
        kept = max(examine(model, likelihood, inputs, targets), 1)
        piece = max(1, min(len(inputs), DEFAULT_BUDGET // kept))
        few = min(piece, 8)
        first = sum(_gradient_pass(model, likelihood, inputs[:few], targets[:few])[:2])
        timed = min(piece, max(few, int(few * 0.5 / first)))
        for _ in range(2):  # the first pass at a size is slow
            forward, backward, outputs = _gradient_pass(
                model, likelihood, inputs[:timed], targets[:timed]
            )
    kind = "kron" if curvature.structure == "kron" else curvature.chosen
    all_outputs = curvature.labels == "ggn" and curvature.chosen != "sketch"
    passes = curvature.draws or (outputs if all_outputs else 1)
    total = curvature.samples or math.ceil(n_data / processes())
    return Preflight(
        what="Kronecker factors" if kind == "kron" else kind,
        samples=total,
        seconds=(forward + passes * _BACKWARD[kind] * backward) / timed * total,
        bytes=_result_bytes(model, curvature.structure),
        activations=kept * piece,
    )


def _gradient_pass(
    model: nn.Module, likelihood: Likelihood, inputs: Tensor, targets: Tensor
) -> tuple[float, float, int]:
    """Return the seconds of a forward and of a backward pass, and the outputs of a sample."""
    weights = list(named_parameters(model).values())
    start = _now(inputs)
    outputs = model(inputs)
    loss = likelihood.losses(outputs, targets).sum()
    middle = _now(inputs)
    torch.autograd.grad(loss, weights, allow_unused=True)
    return middle - start, _now(inputs) - middle, outputs[0].numel()


def _now(tensor: Tensor) -> float:
    """Return the time in seconds once the device of ``tensor`` has nothing left to do."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return perf_counter()


def _result_bytes(model: nn.Module, structure: Structure) -> int:
    """Return the bytes of a diagonal, of a gradient, and of Kronecker factors if asked for."""
    total = 0
    for parameter in named_parameters(model).values():
        total += parameter.numel() * (max(parameter.itemsize, 4) + parameter.itemsize)
    if structure == "kron":
        for module in model.modules():
            if isinstance(module, _WITH_FACTORS) and module.weight.requires_grad:
                groups = getattr(module, "groups", 1)
                rows, columns = module.weight.shape[0] // groups, module.weight[0].numel()
                total += groups * (rows**2 + columns**2) * max(module.weight.itemsize, 4)
    return total


def _grouped(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _duration(seconds: float) -> str:
    """Return the time in its natural unit, to two digits."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{_two_digits(seconds / length)} {unit}"
    return f"{_two_digits(seconds)} s"


def _size(count: int) -> str:
    """Return bytes in decimal units, to two digits."""
    for unit, length in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= length:
            return f"{_two_digits(count / length)} {unit}"
    return f"{count} B"


def _two_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"
