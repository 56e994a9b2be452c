"""A few samples sent through the model tell where samples lie in each operation's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spamprune.bayes.curvature.layout import find_layout
from spamprune.bayes.curvature.operations import terms_of
from spamprune.bayes.curvature.passes import Plan, PlannedUse
from spamprune.bayes.curvature.rules import Local
from spamprune.bayes.curvature.trace import Recorder, Use
from spamprune.errors import PosteriorError

#: Samples of a probe: a size that no other axis of common networks has.
_SAMPLES = 5
_CHANGED = 2


@contextmanager
def jittered(parameters: Mapping[str, Tensor], seed: int = 0) -> Iterator[None]:
    """Add noise to parameters and take it off again: zeros would hide what lies behind them."""
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for i, p in enumerate(parameters.values()):
                generator = torch.Generator(device=p.device).manual_seed(seed + i)
                noise = torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype)
                p.add_(noise, alpha=0.02)
        yield
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(kept[name])


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
    before = _uses(model, inputs, parameters)
    after = _uses(model, _with_one_changed(inputs), parameters)
    if [use.name for use in before] != [use.name for use in after]:
        raise PosteriorError(
            "the model calls other operations when its input changes: use estimator 'sketch', "
            "which does not follow operations"
        )
    planned, loops = [], set()
    for use, other in zip(before, after, strict=True):
        plan = _plan(use, other, len(inputs))
        planned.append(plan)
        if plan.output is None:
            loops |= {name for _, names in use.pure for name in names}
    return Plan(tuple(planned), frozenset(loops))


def _uses(model: nn.Module, inputs: Tensor, parameters: Mapping[str, Tensor]) -> list[Use]:
    uses: list[Use] = []
    with Recorder(parameters, inputs, uses.append):
        model(inputs)
    return uses


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
    skipped = PlannedUse(use.name, None, ())
    if not isinstance(use.output, Tensor) or len(use.data) != len(other.data):
        return skipped
    output = find_layout(use.output, other.output, samples, _CHANGED)
    data = [find_layout(a, b, samples, _CHANGED) for a, b in zip(use.data, other.data, strict=True)]
    found = tuple(layout for layout in data if layout is not None)
    if output is None or len(found) < len(data):
        return skipped
    terms = terms_of(use, samples, output, found)
    if terms is None:
        return skipped
    for term in terms:
        if isinstance(term.rule, Local):
            try:
                term.rule.per_sample(output.split(use.output.detach(), samples), *term.data)
            except RuntimeError:  # the operation needs the whole batch
                return skipped
    return PlannedUse(use.name, output, found)
