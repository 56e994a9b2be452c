"""Passes over a batch that hand each use's gradient to whoever needs it.

The forward pass is recorded, the backward pass goes from the loss to the outputs of the recorded
operations and no further: no ordinary weight gradient is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from spamprune.bayes.curvature.batches import doubled
from spamprune.bayes.curvature.layout import Layout
from spamprune.bayes.curvature.operations import Term, terms_of
from spamprune.bayes.curvature.trace import Recorder, Use
from spamprune.errors import PosteriorError


@dataclass(frozen=True)
class PlannedUse:
    """Where samples lie in the tensors of one recorded operation.

    Attributes:
        name: Of the operation.
        origins: Names of the parameters that each of its pure tensors is made of.
        output: Layout of its output.
        data: Layouts of its data; with ``output`` None the operation is passed over.
    """

    name: str
    origins: tuple[frozenset[str], ...]
    output: Layout | None = None
    data: tuple[Layout, ...] = ()

    def calls(self, use: Use) -> bool:
        """Return whether a recorded operation is this one."""
        return use.name == self.name and origins_of(use) == self.origins


def origins_of(use: Use) -> tuple[frozenset[str], ...]:
    """Return the names of the parameters that each pure tensor of an operation is made of."""
    return tuple(names for _, names in use.pure)


@dataclass(frozen=True)
class Plan:
    """How the gradients of a model's parameters are followed.

    Attributes:
        uses: The operations that a forward pass records, in order.
        loops: Names of the parameters that no rule covers: one sample at a time.
        repeats: Which broadcasts repeat a tensor for each sample, see
            :class:`spamprune.bayes.curvature.trace.Recorder`.
    """

    uses: tuple[PlannedUse, ...] = ()
    loops: frozenset[str] = frozenset()
    repeats: tuple[bool, ...] = ()

    def without(self, loops: frozenset[str]) -> Plan:
        """Return a plan that leaves further parameters to the loop, and all that is for them only.

        Args:
            loops: Names of all parameters that are left to the loop.
        """
        uses = (
            PlannedUse(use.name, use.origins) if loops.issuperset(chain(*use.origins)) else use
            for use in self.uses
        )
        return Plan(tuple(uses), loops, self.repeats)


#: Receives the term and the gradient at its operation's output, split into samples.
Receiver = Callable[[Term, Tensor], None]


class Pass:
    """The forward pass of one batch, ready for one or more backward passes.

    Attributes:
        outputs: Of the model.

    Args:
        model: In evaluation mode.
        inputs: A batch.
        parameters: Whose gradients are asked for, by name.
        plan: What the recorded operations will be, in order.
        receive: Called during each backward pass, for each term.
        announce: Called during the forward pass, for each term that ``receive`` will get.

    Raises:
        PosteriorError: The model did not call the planned operations.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        parameters: Mapping[str, Tensor],
        plan: Plan,
        receive: Receiver,
        announce: Callable[[Term], None] = lambda term: None,
    ):
        self._plan, self._receive, self._announce = plan, receive, announce
        asked, inputs = len(inputs), doubled(inputs)
        self._asked, self._samples = asked, len(inputs)
        self._ends: list[Any] = []
        self._followed: set[str] = set()
        self._count = 0
        self._last = False
        self._hooks: list[RemovableHandle] = []
        with Recorder(parameters, inputs, self._on_use, plan.repeats):
            self.outputs = model(inputs)[:asked]
        # what nothing was recorded of may be all that lies behind an operation: go there too
        self._ends += [p for name, p in parameters.items() if name not in self._followed]
        self._ends = self._ends or list(parameters.values())
        if self._count != len(plan.uses):
            raise _differs("fewer operations")

    def _on_use(self, use: Use) -> None:
        uses = self._plan.uses
        if self._count == len(uses) or not uses[self._count].calls(use):
            names = ", ".join(sorted(chain(*origins_of(use))))
            raise _differs(f"{use.name!r} with {names} as operation {self._count}")
        planned = uses[self._count]
        self._count += 1
        if not any(t.requires_grad for t in use.data):
            self._ends.extend(get_gradient_edge(t) for t in _outputs(use))
        if planned.output is None:
            return
        terms = terms_of(use, self._samples, planned.output, planned.data)
        if terms is None:
            raise _differs(f"{use.name!r} in a way")
        held = [
            replace(term, data=tuple(x[: self._asked] for x in term.data))
            for term in terms
            if not term.origins & self._plan.loops
        ]
        for term in held:
            self._followed |= term.origins
            self._announce(term)
        layout = planned.output

        def on_gradient(gradient: Tensor) -> None:
            split = layout.split(gradient.detach(), self._samples)[: self._asked]
            for term in held:
                self._receive(term, split)
            if self._last:
                held.clear()  # so that activations go as the backward pass goes

        self._hooks.append(use.output.register_hook(on_gradient))

    def backward(self, objective: Tensor, gradient: Tensor | None = None, *, last: bool) -> None:
        """Send the gradient of ``objective`` back; ``last`` frees the graph on the way."""
        self._last = last
        torch.autograd.grad(
            objective, self._ends, gradient, retain_graph=not last, allow_unused=True
        )

    def close(self) -> None:
        """Let go of the graph: hooks that refer to this pass would keep each other alive."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._ends.clear()


@contextmanager
def streamed(
    parameters: Sequence[Tensor], consume: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Within, hand over each parameter's gradient as soon as it is there, and keep none of them.

    Args:
        parameters: Leaves that backward passes are for.
        consume: Takes the index of one and its gradient, dense.
    """
    nothing = [p.detach().new_zeros(()).expand_as(p) for p in parameters]

    def take(index: int, gradient: Tensor) -> Tensor:
        if gradient.is_sparse:  # an embedding's may be
            consume(index, gradient.to_dense())
            return torch.zeros_like(gradient)
        consume(index, gradient)
        return nothing[index]

    hooks = [p.register_hook(partial(take, index)) for index, p in enumerate(parameters)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _outputs(use: Use) -> list[Tensor]:
    outputs = use.output if isinstance(use.output, (list, tuple)) else [use.output]
    return [t for t in outputs if isinstance(t, Tensor) and t.requires_grad]


def _differs(what: str) -> PosteriorError:
    return PosteriorError(
        f"the model called {what} where another batch did not: its path depends on the data; use "
        "estimator 'sketch', which does not follow operations"
    )
