"""One forward pass that finds the axes of a network."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from spamprune.errors import PruningError
from spamprune.modules import check_python, evaluation_mode, same_buffers
from spamprune.pruning.axes import bundles
from spamprune.pruning.axes.axis import Axis, count, fix, leaves
from spamprune.pruning.axes.call import Axes
from spamprune.pruning.axes.code import Code
from spamprune.pruning.axes.logits import Fold, fold
from spamprune.pruning.axes.numbers import mix_numbers
from spamprune.pruning.axes.recorder import Recorder
from spamprune.pruning.axes.sizes import (
    Attribute,
    Expression,
    attributes_of,
    axes_of,
    evaluate,
    solve,
    tracked,
)
from spamprune.pruning.axes.steps import Steps

#: What an output may hold beside tensors: nothing that tensors can hide in.
_PLAIN = (type(None), int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)


@dataclass
class Trace:
    """The axes of a network's parameters and buffers, and what depends on them.

    Attributes:
        tensors: Axes of every parameter and buffer, by name, tied ones once.
        costs: For each matrix product, axes whose sizes multiply to its multiply-accumulates.
        sizes: Sizes in the code and the axes that they must equal.
        folds: Attention whose logits change their scale with the depth of a head.
        outputs: Shapes of the network's outputs.
        bundles: Leaves that lose units in step, since code wants their counts to stay equal.
        unread: Names of the parameters and buffers that the forward pass did without.
        steps: Names of the functions that code called, None where its way depends on the data.
    """

    tensors: dict[str, Axes]
    outputs: list[torch.Size]
    costs: list[Axes] = field(default_factory=list)
    sizes: list[tuple[Expression, Axis]] = field(default_factory=list)
    folds: list[Fold] = field(default_factory=list)
    bundles: list[bundles.Bundle] = field(default_factory=list)
    unread: frozenset[str] = frozenset()
    steps: list[str] | None = None

    def macs(self, kept: Mapping[Axis, int]) -> int:
        """Return the multiply-accumulates where each leaf axis keeps ``kept`` positions."""
        return sum(math.prod(count(axis, kept) for axis in axes) for axes in self.costs)

    def numel(self, name: str, kept: Mapping[Axis, int]) -> int:
        """Return the entries of a parameter or buffer that remain."""
        return math.prod(count(axis, kept) for axis in self.tensors[name])

    def attributes(self, kept: Mapping[Axis, int]) -> dict[Attribute, int]:
        """Return the value that each attribute in a size must have.

        Raises:
            PruningError: Two sizes ask for different values, or one cannot be met.
        """
        values: dict[Attribute, int] = {}
        waiting = list(self.sizes)
        while waiting:
            unsolved = []
            for expression, axis in waiting:
                wanted = count(axis, kept)
                unknown = attributes_of(expression) - values.keys()
                if not unknown:
                    if evaluate(expression, values, kept) != wanted:
                        raise _ContradictionError(expression, axis)
                    continue
                value = solve(expression, wanted, values, kept) if len(unknown) == 1 else None
                if value is None:
                    unsolved.append((expression, axis))
                else:
                    values[unknown.pop()] = value
            if len(unsolved) == len(waiting):
                raise _ContradictionError(*unsolved[0])
            waiting = unsolved
        return values


class _ContradictionError(PruningError):
    """A size in the code that cannot follow its axis."""

    def __init__(self, expression: Expression, axis: Axis):
        super().__init__("a size in the code cannot follow the pruned channels")
        self.expression, self.axis = expression, axis


def trace(model: nn.Module, example: Tensor) -> Trace:
    """Run ``model`` once in evaluation mode and return its axes; the model stays as it is.

    Args:
        model: Any network.
        example: Inputs, ``(B, ...)``.

    Raises:
        PruningError: ``example`` is no tensor, or the network cannot be run on it, or not in the
            recorder's ``LIMIT`` of seconds.
    """
    if not isinstance(example, Tensor):
        raise PruningError(
            f"the example is a {type(example).__name__}: give the tensor that is the network's "
            "input, (B, ...)"
        )
    check_python(model, PruningError)
    _check_shapes(model)
    recorder = Recorder(model)
    with (
        evaluation_mode(model),
        torch.no_grad(),
        _plain_kernels(),
        same_buffers(model),
        recorder.modules(),
    ):
        try:
            with tracked(model) as numbers, recorder, Code(recorder), Steps() as steps:
                output = model(recorder.data(example))
        except PruningError:
            raise
        except Exception as error:
            raise PruningError(
                f"{type(model).__name__} cannot be followed on an input of shape "
                f"{tuple(example.shape)}: in {recorder.where or 'the model'}: "
                f"{type(error).__name__}: {error}"
            ) from error
    for shadow in map(recorder.shadow, _tensors(model, output)):
        shadow.asked()
        for axis in shadow.axes:
            fix(axis, "the model's output")
    unread = frozenset(name for name, shadow in recorder.named.items() if not shadow.readers)
    for name in unread:  # nothing tells what it goes with, such as a mask token
        for axis in recorder.named[name].axes:
            fix(axis, "the forward pass does not use it")
    result = Trace(
        {name: shadow.axes for name, shadow in recorder.named.items()},
        shapes_of(output),
        recorder.costs,
        recorder.sizes,
        [fold(logits) for logits in recorder.logits],
        unread=unread,
        steps=None if recorder.looked else steps.names,
    )
    mix_numbers(numbers, recorder.bound, result.sizes, model, result.tensors)
    _settle(result, recorder.bound)
    return result


def _check_shapes(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise PruningError(
                f"{name} has no shape yet: run the {type(model).__name__} once first, "
                "model(example)"
            )


def _tensors(model: nn.Module, output: object) -> list[Tensor]:
    """Return the tensors that a network gave, once it is sure that these are all."""
    given = tree_leaves(output)
    tensors = [leaf for leaf in given if isinstance(leaf, Tensor)]
    others = [leaf for leaf in given if not isinstance(leaf, (Tensor, *_PLAIN))]
    if others or not tensors:
        raise PruningError(
            f"{type(model).__name__} returns a {type((*others, output)[0]).__name__}, in which no "
            "tensor is found: let it return tensors, or tuples, lists or dictionaries of them"
        )
    return tensors


def shapes_of(output: object) -> list[torch.Size]:
    """Return the shapes of the tensors that a network gave."""
    return [t.shape for t in tree_leaves(output) if isinstance(t, Tensor)]


def _settle(result: Trace, bound: Mapping[Attribute, Axis]) -> None:
    """Bundle or fix the axes whose sizes in the code do not follow, tried with random counts."""
    chance = random.Random(0)
    named = (axis for axes in result.tensors.values() for axis in axes)
    free = list(dict.fromkeys(leaf for axis in named for leaf in leaves(axis)))
    tried: set[tuple[Expression, Axis]] = set()
    passed = 0
    while passed < 8:
        try:
            result.attributes(_random_counts(free, result.bundles, chance))
            passed += 1
        except _ContradictionError as conflict:
            expression, axis = pair = (conflict.expression, conflict.axis)
            if pair not in tried and bundles.add(result.bundles, expression, axis, bound):
                tried.add(pair)
                continue
            why = f"its size cannot follow {', '.join(_names(expression)) or 'the code'}"
            fix(axis, why)
            _fix_all(expression, result, why)
            result.sizes.remove(pair)
    bundles.settle(result.bundles)


def _random_counts(
    free: Sequence[Axis], known: list[bundles.Bundle], chance: random.Random
) -> dict[Axis, int]:
    """Return how many positions each leaf keeps, those of a bundle in step."""
    kept = {leaf: chance.randint(1, leaf.size) for leaf in free if not leaf.fixed}
    for bundle in known:
        steps = chance.randint(0, min(leaf.size // n for leaf, n in bundle.items()) - 1)
        if any(leaf.fixed for leaf in bundle):
            steps = 0
        kept |= {leaf: leaf.size - steps * n for leaf, n in bundle.items()}
    return kept


def _names(expression: Expression) -> list[str]:
    return sorted(map(str, attributes_of(expression)))


def _fix_all(expression: Expression, result: Trace, why: str) -> None:
    """Fix everything that an expression reads, attributes through the axes bound to them."""
    for axis in axes_of(expression):
        fix(axis, why)
    read = attributes_of(expression)
    for other, axis in result.sizes:
        if read & attributes_of(other):
            fix(axis, why)


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Keep attention, and on a GPU norms and recurrent layers, in operations that are followed."""
    fast, cudnn = torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.cudnn.enabled = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.backends.cudnn.enabled = cudnn
