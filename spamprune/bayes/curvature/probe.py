"""A few samples sent through the model tell where samples lie in each operation's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from spamprune.bayes.curvature.layout import find_layout
from spamprune.bayes.curvature.operations import terms_of
from spamprune.bayes.curvature.passes import Plan, PlannedUse, origins_of
from spamprune.bayes.curvature.squares import sum_of_squares
from spamprune.bayes.curvature.trace import Recorder, Use
from spamprune.errors import PosteriorError

#: Samples of a probe: a size that no other axis of common networks has.
_SAMPLES = 5
_CHANGED = 2
#: Elements up to which a tensor may be a scale near zero, with one number for many weights.
_SMALL = 2**16


@contextmanager
def jittered(parameters: Mapping[str, Tensor], seed: int = 0) -> Iterator[None]:
    """Add noise to parameters and take it off again: zeros would hide what lies behind them.

    Large tensors without zeros hide nothing and stay as they are.
    """
    hiding = [p for p in parameters.values() if p.numel() <= _SMALL or not p.all()]
    kept = [p.detach().clone() for p in hiding]
    try:
        for i, p in enumerate(hiding):
            generator = torch.Generator(device=p.device).manual_seed(seed + i)
            noise = torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype)
            p.data.add_(noise, alpha=0.02)  # .data: graphs that hold p may still go backward
        yield
    finally:
        for p, before in zip(hiding, kept, strict=True):
            p.data.copy_(before)


def few(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the samples of a probe, repeating those of a small batch."""
    index = torch.arange(_SAMPLES, device=inputs.device) % len(inputs)
    return inputs[index], targets[index.to(targets.device)]


def probe(model: nn.Module, inputs: Tensor, parameters: Mapping[str, Tensor]) -> Plan:
    """Find where samples lie in every operation, by changing one of a few samples.

    Args:
        model: In evaluation mode.
        inputs: A few samples, from :func:`few`.
        parameters: By name.

    Raises:
        PosteriorError: The model's operations depend on the data.
    """
    before, repeats = _uses(model, inputs, parameters)
    after, _ = _uses(model, _with_one_changed(inputs), parameters)
    if [(u.name, origins_of(u)) for u in before] != [(u.name, origins_of(u)) for u in after]:
        raise PosteriorError(
            "the model calls other operations when its input changes: use estimator 'sketch', "
            "which does not follow operations"
        )
    planned, loops = [], set()
    for use, other in zip(before, after, strict=True):
        plan = _plan(use, other, len(inputs))
        planned.append(plan)
        if plan.output is None:
            loops |= {name for names in plan.origins for name in names}
    return Plan(tuple(planned), frozenset(loops), tuple(repeats))


def _uses(
    model: nn.Module, inputs: Tensor, parameters: Mapping[str, Tensor]
) -> tuple[list[Use], list[bool]]:
    uses: list[Use] = []
    with Recorder(parameters, inputs, uses.append) as recorder:
        model(inputs)
    return uses, recorder.repeats


def _with_one_changed(inputs: Tensor) -> Tensor:
    changed = inputs.clone()
    if inputs.is_floating_point():
        changed[_CHANGED] = inputs[_CHANGED].flip(-1) + inputs.std() + 1
    else:  # tokens must stay tokens
        others = [inputs[i] for i in range(len(inputs))] + [inputs[_CHANGED].flip(-1)]
        changed[_CHANGED] = next(
            (x for x in others if not torch.equal(x, inputs[_CHANGED])), inputs[_CHANGED]
        )
    return changed


def _plan(use: Use, other: Use, samples: int) -> PlannedUse:
    skipped = PlannedUse(use.name, origins_of(use))
    if not isinstance(use.output, Tensor) or len(use.data) != len(other.data):
        return skipped
    output = find_layout(use.output, other.output, samples, _CHANGED)
    data = [find_layout(a, b, samples, _CHANGED) for a, b in zip(use.data, other.data, strict=True)]
    found = tuple(layout for layout in data if layout is not None)
    if output is None or len(found) < len(data):
        return skipped
    try:
        terms = terms_of(use, samples, output, found)
        if terms is None:
            return skipped
        with torch.no_grad():
            like_gradient = output.split(use.output, samples)[:1]
            for term in terms:
                first = tuple(x[:1] for x in term.data)
                sum_of_squares(term.rule, like_gradient, first, term.target.numel())
    except torch.OutOfMemoryError:
        raise
    except Exception:  # called with arguments that its rule does not know, or needs a whole batch
        return skipped
    return replace(skipped, output=output, data=found)
