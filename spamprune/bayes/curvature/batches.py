"""The one loop over the data that every curvature estimator runs in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.instancenorm import _InstanceNorm

from spamprune.bayes.likelihood import Likelihood
from spamprune.errors import PosteriorError
from spamprune.modules import device_of, differentiable

#: Bytes that a piece of a batch may keep for its backward pass.
DEFAULT_BUDGET = 4 * 2**30


@dataclass(frozen=True)
class Totals:
    """What a pass over the data saw, in all processes together.

    Attributes:
        loss: Summed over the samples, in nats.
        seen: Number of samples.
    """

    loss: float
    seen: int


def accumulate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    step: Callable[[Tensor, Tensor], Tensor],
    *,
    likelihood: Likelihood,
    samples: int | None = None,
    piece: int | None = None,
    budget: int = DEFAULT_BUDGET,
) -> Totals:
    """Call ``step`` on every piece of every batch, in evaluation mode and on the model's device.

    A batch is split so that what its forward pass keeps for the backward pass fits ``budget``,
    which a few samples of the first batch tell. In several processes each passes its own shard;
    ``samples`` counts the samples of one process, the result those of all.

    Args:
        model: The network; each module's own mode is restored.
        batches: Pairs of inputs and targets.
        step: Takes the inputs and targets of a piece, returns their summed loss, a detached scalar.
        likelihood: Of the targets.
        samples: Stop after exactly this many samples; all by default.
        piece: No piece is larger than this.
        budget: Bytes that a piece may keep for its backward pass.

    Raises:
        PosteriorError: There are no trainable parameters or no batches, samples are not
            independent of each other, the likelihood does not fit, or the loss is not finite.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise PosteriorError(
            "the model has no trainable parameters, so there is no curvature: set requires_grad "
            "on those that it is for"
        )
    if torch.is_inference_mode_enabled():
        raise PosteriorError("curvature needs gradients: take it outside torch.inference_mode()")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_complex():
            raise PosteriorError(
                f"{name} is complex, and a posterior is over real numbers: make its real and "
                "imaginary parts a parameter (torch.view_as_complex), or freeze it"
            )
    for what, number in (("samples", samples), ("the size of a piece", piece)):
        if number is not None and number < 1:
            raise PosteriorError(f"{what} must be at least 1, not {number}")
    device = device_of(model)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    seen = size = 0
    with differentiable(model):
        for batch in batches:
            inputs, targets = pair(batch)
            if samples is not None:
                inputs, targets = inputs[: samples - seen], targets[: samples - seen]
            if len(inputs) == 0:
                continue
            inputs, targets = inputs.detach().to(device), targets.detach().to(device)
            if seen == 0:
                fitting = budget // max(examine(model, likelihood, inputs, targets), 1)
                size = max(1, fitting if piece is None else min(piece, fitting))
            for x, y in zip(inputs.split(size), targets.split(size), strict=True):
                loss += step(x, y)
            seen += len(inputs)
            if seen == samples:
                break
    count = torch.full_like(loss, seen)
    sum_over_processes([loss, count])
    if count == 0:
        raise PosteriorError("curvature needs data: the loader gave no batches")
    if not torch.isfinite(loss):
        raise PosteriorError(f"the loss is {loss.item()} where the curvature is taken")
    return Totals(loss.item(), int(count))


def pair(batch: object) -> tuple[Tensor, Tensor]:
    """Return the inputs and targets of a batch.

    Raises:
        PosteriorError: It is no pair of tensors.
    """
    if isinstance(batch, (list, tuple)) and [isinstance(x, Tensor) for x in batch] == [True, True]:
        return batch[0], batch[1]
    kinds = ", ".join(type(x).__name__ for x in batch) if isinstance(batch, (list, tuple)) else ""
    raise PosteriorError(
        f"a batch must be a pair of tensors, inputs and targets, not a {type(batch).__name__}"
        f"{f' of {kinds}' if kinds else ''}: give a loader that yields such pairs"
    )


def doubled(inputs: Tensor) -> Tensor:
    """Return a batch of one twice over, any other as it is.

    At batch size one torch's BatchNorm on a CPU takes wrong gradients from tokens made of its
    output (``flatten(2).transpose(1, 2)``): it misreads the strides.
    """
    return inputs.repeat(2, *[1] * (inputs.dim() - 1)) if len(inputs) == 1 else inputs


def examine(model: nn.Module, likelihood: Likelihood, inputs: Tensor, targets: Tensor) -> int:
    """Check on up to three samples that each one's loss is its own, and measure their forward pass.

    The model must be in evaluation mode already. One sample is replaced by another: the losses of
    the rest must not move beyond rounding. A single sample is taken twice over.

    Returns:
        Bytes that the forward pass keeps for the backward pass, per sample. Parameters, buffers and
        the batch do not count, and what two operations keep counts once.

    Raises:
        PosteriorError: Samples are not independent, or the likelihood does not give one loss each.
    """
    inputs, targets = doubled(inputs[:3]), doubled(targets[:3])
    given = (*model.parameters(), *model.buffers(), inputs, targets)
    there_anyway = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there_anyway:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(inputs)
        if not isinstance(outputs, Tensor):
            raise PosteriorError(
                f"the model returns a {type(outputs).__name__}, and curvature needs one tensor: "
                "wrap the model in a module that returns only what the loss is of"
            )
        losses = likelihood.losses(outputs, targets)
    if losses.shape != targets.shape[:1]:
        raise PosteriorError(
            f"the likelihood gave losses {tuple(losses.shape)} for {len(targets)} samples: it must "
            "give one for each, summed over the sample's outputs and not over the samples"
        )
    replaced = torch.arange(len(inputs), device=inputs.device)
    replaced[1] = 0
    # with gradients: a model may take some itself, as those of an energy do
    again = likelihood.losses(model(inputs[replaced]), targets[replaced]).detach()
    others = replaced == torch.arange(len(inputs), device=inputs.device)
    if not _agree(losses.detach()[others], again[others]):
        raise PosteriorError(_coupling(model))
    return sum(kept.values()) // len(inputs)


def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, where there are several."""
    if processes() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def processes() -> int:
    """Return how many processes share the work: 1 unless torch.distributed is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _agree(a: Tensor, b: Tensor) -> bool:
    """Return whether losses of equal samples agree; the same kernels ran, so all but exactly."""
    rounding = torch.finfo(a.dtype).eps
    return torch.allclose(a, b, rtol=rounding**0.5, atol=32 * rounding, equal_nan=True)


def _coupling(model: nn.Module) -> str:
    """Return what couples the samples of ``model``, as far as that can be told."""
    what = "the loss of a sample depends on the other samples of its batch, so curvature as a sum "
    for name, module in model.named_modules():
        normalises_alone = isinstance(module, _InstanceNorm)
        if getattr(module, "track_running_stats", True) is False and not normalises_alone:
            return (
                f"{what}over samples is not defined: {name!r} ({type(module).__name__}) normalises "
                "by the batch; give it track_running_stats=True and fill its running statistics"
            )
    return (
        f"{what}over samples is not defined: use a loss of each sample by itself, not a "
        "contrastive one, and a model that in evaluation mode neither mixes samples nor draws "
        "random numbers"
    )
