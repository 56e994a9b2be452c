"""Exact diagonals from the asdl library, on the networks where it is right.

The distribution is ``asdfghjkl`` and its package ``asdl`` (Osawa et al. 2023, *ASDL: A Unified
Interface for Gradient Preconditioning in PyTorch*). Of version 0.1a5 this is known to be wrong:
inputs of linear layers with tokens (squared per token instead of per sample), convolutions with few
output pixels and many channels (squared per pixel), grouped convolutions, padding with anything but
zeros, normalisation layers, modules called twice and tied parameters. All of that is refused by
name, and one sample's squared gradient is the proof for the rest.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spamprune.bayes.curvature.base import Curvature, Labels
from spamprune.bayes.curvature.batches import accumulate, sum_over_processes
from spamprune.bayes.curvature.probe import jittered
from spamprune.bayes.likelihood import Classification
from spamprune.bayes.parameters import named_parameters
from spamprune.errors import PosteriorError
from spamprune.modules import check_python, full_precision

#: Where asdl leaves what it found on a module, and a flag on a parameter.
_FOUND, _FLAG = "_asdl_fisher", "_original_requires_grad"


def asdl_curvature(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    n_data: int,
    labels: Labels = "ef",
    samples: int | None = None,
) -> Curvature:
    """Compute the exact diagonal of a classifier's curvature with asdl.

    ``labels="ef"`` is its empirical Fisher; ``labels="ggn"`` its exact Fisher, the sum over all
    classes, at the price of one backward pass for each.

    Args:
        model: Built of plain linear layers on ``(B, features)``, plain 2-d convolutions and asdl's
            own ``Bias`` and ``Scale``, wherever parameters are trainable; it is left as it was.
        batches: Pairs of inputs and integer class labels ``(B,)``.
        n_data: Size of the data set that the curvature is summed over.
        labels: Whose labels the gradients use.
        samples: Use this many samples only, scaled to ``n_data``; all by default.

    Raises:
        PosteriorError: asdl is not installed, or is not right on this model; a parameter is named.
    """
    check_python(model, PosteriorError)
    library = _library()
    parameters = named_parameters(model)
    with _left_as_it_was(model):
        maker = _maker(library, model, labels)
        likelihood = Classification()
        checked: torch.Size | None = None

        def step(inputs: Tensor, targets: Tensor) -> Tensor:
            nonlocal checked
            if checked != inputs.shape[1:]:
                _check(library, model, inputs)
                if checked is None:
                    _prove(library, model, inputs[:1], targets[:1])
                checked = inputs.shape[1:]
            if labels == "ggn" and (targets == likelihood.ignore_index).any():
                raise PosteriorError(
                    "asdl's exact Fisher cannot ignore targets: leave those samples out, or use "
                    "estimator 'exact' or 'sketch'"
                )
            return likelihood.losses(_add(maker, inputs, targets), targets).sum()

        totals = accumulate(model, batches, step, likelihood=likelihood, samples=samples)
        found = _take(model)
    # a process whose shard is empty found nothing
    diag = {name: found.get(name, torch.zeros_like(p)) for name, p in parameters.items()}
    sum_over_processes(list(diag.values()))
    scale = n_data / totals.seen
    return Curvature(
        diag={name: h.mul_(scale) for name, h in diag.items()},
        loss=totals.loss * scale,
        n_data=n_data,
        labels=labels,
        estimator="asdl",
        how=dict.fromkeys(parameters, "asdl"),
    )


def _library() -> Any:
    """Import asdl; another distribution of that name lacks what is looked for here."""
    try:
        library = importlib.import_module("asdl")
    except ImportError as error:
        raise PosteriorError(
            "estimator 'asdl' needs the library asdl, whose distribution is asdfghjkl "
            f"({error}): pip install \"spamprune[asdl]\", or use estimator 'exact' or 'sketch'"
        ) from error
    if not hasattr(library, "get_fisher_maker"):
        raise PosteriorError(
            "the installed package 'asdl' is not the one that estimator 'asdl' needs: "
            'pip uninstall asdl, then pip install "spamprune[asdl]"'
        )
    return library


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Take away what asdl leaves on modules and parameters, also if it fails half-way."""
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with warnings.catch_warnings():  # of how asdl hooks the backward pass
            warnings.filterwarnings("ignore", "Using a non-full backward hook", FutureWarning)
            yield
    finally:
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)
            parameter.__dict__.pop(_FLAG, None)
        for module in model.modules():
            module.__dict__.pop(_FOUND, None)


def _maker(library: Any, model: nn.Module, labels: Labels) -> Any:
    """Return asdl's means to add up a diagonal Fisher over batches."""
    config = library.FisherConfig(
        fisher_type=library.FISHER_EMP if labels == "ef" else library.FISHER_EXACT,
        fisher_shapes=[library.SHAPE_DIAG],
        loss_type=library.LOSS_CROSS_ENTROPY,
        fisher_attr=_FOUND,
        data_size=1,  # a sum, no mean
    )
    return library.get_fisher_maker(model, config)


def _add(maker: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    """Add a batch to what is found so far; return its logits."""
    outputs = maker.setup_model_call(maker.model, inputs)
    maker.setup_loss_call(F.cross_entropy, outputs, targets)  # asdl has it sum over samples
    logits: Tensor = maker.forward_and_backward(accumulate=True)[0]
    return logits.detach()


def _take(model: nn.Module) -> dict[str, Tensor]:
    """Remove what was found from the modules and return it by parameter name."""
    diag: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        found = module.__dict__.pop(_FOUND, None)
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if found is not None and parameter.requires_grad:
                values = getattr(found.diag, name.rpartition(".")[2])
                diag[name] = values.reshape(parameter.shape)
    return diag


class _Call(NamedTuple):
    """One call of a module: the shapes of its input and its output."""

    inputs: torch.Size
    outputs: torch.Size


def _check(library: Any, model: nn.Module, inputs: Tensor) -> None:
    """Raise unless each trainable parameter lies where asdl is known to be right."""
    calls: dict[nn.Module, list[_Call]] = {}

    def note(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        calls.setdefault(module, []).append(_Call(arguments[0].shape, output.shape))

    owners = {
        name: model.get_submodule(name.rpartition(".")[0]) for name in named_parameters(model)
    }
    handles = [module.register_forward_hook(note) for module in set(owners.values())]
    try:
        with torch.no_grad():
            outputs = model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if outputs.dim() != 2:
        raise PosteriorError(
            f"estimator 'asdl' needs logits (B, classes), the model gives {tuple(outputs.shape)}: "
            "use estimator 'exact' or 'sketch'"
        )
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for name, parameter in named_parameters(model).items():
        owner = owners[name]
        if len(names[parameter]) > 1:
            reason = f"is tied to {names[parameter][1]!r}"
        elif parameter.dtype not in (torch.float32, torch.float64):
            reason = f"is of {parameter.dtype}, in which asdl would add up"
        elif name.rpartition(".")[2] not in ("weight", "bias"):
            reason = "is neither the weight nor the bias of a layer"
        else:
            reason = _objection(library, owner, calls.get(owner, []), len(inputs))
        if reason:
            raise PosteriorError(
                f"estimator 'asdl' is not right for parameter {name!r}: it {reason}; "
                "use estimator 'exact' or 'sketch'"
            )


def _objection(library: Any, module: nn.Module, calls: list[_Call], samples: int) -> str:
    """Return why asdl is not right for a module's parameters; empty if it is."""
    kind = type(module)
    if kind not in (nn.Linear, nn.Conv2d, library.Bias, library.Scale):
        return f"belongs to a {kind.__name__}, not to a plain Linear or Conv2d"
    if len(calls) != 1:
        return f"belongs to a {kind.__name__} that is called {len(calls)} times, not once"
    inputs, outputs = calls[0]
    if inputs[0] != samples:
        return f"meets {inputs[0]} rows where there are {samples} samples"
    if isinstance(module, nn.Linear) and len(inputs) != 2:
        return f"meets inputs {tuple(inputs)}, and asdl squares per row, not per sample"
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            return f"belongs to a convolution with groups={module.groups}"
        if module.dilation != (1, 1):
            return f"belongs to a convolution with dilation={module.dilation}"
        if module.padding_mode != "zeros" or module.padding == "same":
            return f"belongs to a convolution with {module.padding_mode} padding={module.padding}"
        # where it takes fewer bytes, asdl squares before it sums over output pixels
        pixels, weight = outputs[2:].numel(), module.weight
        if pixels > 1 and pixels * (len(weight) + weight[0].numel()) < weight.numel():
            return f"meets only {pixels} output pixels, and asdl then squares per pixel"
    return ""


def _prove(library: Any, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """Raise unless asdl's empirical Fisher of one sample is its squared gradient."""
    parameters = named_parameters(model)
    with jittered(parameters), full_precision():
        loss = F.cross_entropy(model(inputs), targets, reduction="sum")
        gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        try:
            _add(_maker(library, model, "ef"), inputs, targets)
        except RuntimeError as error:
            raise PosteriorError(
                f"asdl fails on this model ({error}): use estimator 'exact' or 'sketch'"
            ) from error
        diag = _take(model)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        square = gradient.square()
        tolerance = 1e3 * torch.finfo(parameter.dtype).eps * square.max()
        found = diag.get(name, torch.zeros_like(square))
        if not (found - square).abs().max() <= tolerance:
            raise PosteriorError(
                f"estimator 'asdl' is not right for parameter {name!r}: one sample's diagonal is "
                "not its squared gradient; use estimator 'exact' or 'sketch'"
            )
