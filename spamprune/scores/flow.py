"""Synaptic flow: scores from the architecture and the sizes of the weights, without data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spamprune.bayes.curvature.batches import pair
from spamprune.bayes.parameters import named_parameters
from spamprune.errors import PruningError
from spamprune.modules import call_with, check_python, device_of, differentiable
from spamprune.scores.registry import Batches, Scores, criterion


@criterion("synflow")
def synflow(model: nn.Module, data: Batches) -> Scores:
    """Synaptic flow ``|θ_p| ∂R/∂|θ_p|``, R the summed outputs for ones (Tanaka et al. 2020).

    All parameters are replaced by their absolute values and BatchNorm's means by zero, as in the
    fresh networks of the paper, and the network runs in float64: R grows beyond float32 with depth.
    Of the data only the shape of an input is used. In networks of linear layers, convolutions and
    ReLU without biases the scores of each layer sum to R; what subtracts a mean, such as LayerNorm,
    breaks that law.

    The paper prunes by a schedule of masks: :func:`spamprune.pruning.masks.iterative_masks`.

    Raises:
        PruningError: Inputs are not real numbers, the model is TorchScript, its outputs are no
            tensor, R is not finite, or it does not depend on any weight.
    """
    check_python(model, PruningError)
    ones = _ones_like_one_of(data, device_of(model))
    # duplicates of a tied parameter follow its first name
    sizes = {n: p.detach().double().abs() for n, p in model.named_parameters()}
    scored = {n: sizes[n].requires_grad_() for n in named_parameters(model)}
    with differentiable(model):
        outputs = call_with(model, sizes | _buffers(model), ones)
        if not isinstance(outputs, Tensor):
            raise PruningError(
                f"the model returns a {type(outputs).__name__}, and synflow needs one tensor: wrap "
                "the model in a module that returns only that"
            )
        flow = outputs.sum()
        found = (
            torch.autograd.grad(flow, list(scored.values()), allow_unused=True)
            if flow.requires_grad
            else [None] * len(scored)
        )
    scores = {
        name: torch.zeros_like(size) if slope is None else (size * slope).detach().abs()
        for (name, size), slope in zip(scored.items(), found, strict=True)
    }
    if not flow.isfinite() or not any(bool(s.any()) for s in scores.values()):
        raise PruningError(
            f"the synaptic flow of {type(model).__name__} is {flow.item():.3g} and tells weights "
            "nothing: a layer passes no signal on, or numbers overflow; use another criterion"
        )
    return {name: score.detach() for name, score in scores.items()}


def _ones_like_one_of(data: Batches, device: torch.device) -> Tensor:
    """Return ones shaped like a batch of one input."""
    for batch in data:
        inputs, _ = pair(batch)
        if not inputs.is_floating_point():
            raise PruningError(
                f"synflow sends ones through the network, and its inputs are {inputs.dtype}: use a "
                "criterion that sees data"
            )
        return torch.ones(1, *inputs.shape[1:], dtype=torch.float64, device=device)
    raise PruningError(
        "criterion 'synflow' needs the shape of an input: the loader gave no batches"
    )


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers in float64, running means at zero."""
    return {
        name: torch.zeros_like(b).double()
        if name.endswith("running_mean")
        else (b.double() if b.is_floating_point() else b)
        for name, b in model.named_buffers()
    }
