"""One forward pass that finds the axes of a network."""

from __future__ import annotations

import math
import random
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spamprune.errors import PruningError
from spamprune.modules import evaluation_mode
from spamprune.pruning.axes import bundles
from spamprune.pruning.axes.axis import Axis, count, fix, leaves, tie
from spamprune.pruning.axes.call import RULES, Axes, Call, Shadow, signature, unknown
from spamprune.pruning.axes.code import Code
from spamprune.pruning.axes.logits import Fold, Logits, fold
from spamprune.pruning.axes.numbers import mix_numbers
from spamprune.pruning.axes.rules.elementwise import pointwise
from spamprune.pruning.axes.sizes import (
    Attribute,
    Expression,
    attributes_of,
    axes_of,
    evaluate,
    solve,
    tracked,
)

#: A forward pass that takes longer is given up, seconds.
LIMIT = 600
_NOT_A_PARAMETER = "a tensor that is neither parameter nor buffer"
#: In-place operations after which a tensor has other axes.
_RELAID = frozenset({"t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_"})


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
    """

    tensors: dict[str, Axes]
    outputs: list[torch.Size]
    costs: list[Axes] = field(default_factory=list)
    sizes: list[tuple[Expression, Axis]] = field(default_factory=list)
    folds: list[Fold] = field(default_factory=list)
    bundles: list[bundles.Bundle] = field(default_factory=list)

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
        PruningError: ``example`` is no tensor, or the network cannot be run on it, or not in
            :data:`LIMIT` seconds.
    """
    if not isinstance(example, Tensor):
        raise PruningError(
            f"the example is a {type(example).__name__}: give the tensor that is the network's "
            "input, (B, ...)"
        )
    recorder = Recorder(model)
    with evaluation_mode(model), torch.no_grad(), _plain_kernels(), recorder.modules():
        try:
            with tracked(model) as numbers, recorder, Code(recorder):
                output = model(recorder.data(example))
        except PruningError:
            raise
        except Exception as error:
            raise PruningError(
                f"{type(model).__name__} cannot be followed on an input of shape "
                f"{tuple(example.shape)}: in {recorder.where or 'the model'}: "
                f"{type(error).__name__}: {error}"
            ) from error
    tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
    if not tensors:
        raise PruningError(
            f"{type(model).__name__} returns a {type(output).__name__}, in which no tensor is "
            "found: let it return tensors, or tuples, lists or dictionaries of them"
        )
    for tensor in tensors:
        for axis in recorder.axes(tensor):
            fix(axis, "the model's output")
    for shadow in recorder.named.values():
        if not shadow.readers:  # nothing tells what it goes with, such as a mask token
            for axis in shadow.axes:
                fix(axis, "the forward pass does not use it")
    result = Trace(
        {name: shadow.axes for name, shadow in recorder.named.items()},
        shapes_of(output),
        recorder.costs,
        recorder.sizes,
        [fold(logits) for logits in recorder.logits],
    )
    mix_numbers(numbers, recorder.bound, result.sizes, model, result.tensors)
    _settle(result, recorder.bound)
    return result


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


class Recorder(TorchDispatchMode):
    """Follows the axes through every operation; :class:`Code` adds what code says of sizes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.named: dict[str, Shadow] = {}
        self.costs: list[Axes] = []
        self.sizes: list[tuple[Expression, Axis]] = []
        self.logits: list[Logits] = []
        self.bound: dict[Attribute, Axis] = {}
        self.calls = 0
        self.stack: list[nn.Module] = []
        self._paths = {id(m): name for name, m in model.named_modules()}
        self._shadows: dict[int, tuple[weakref.ref[Tensor], Shadow]] = {}
        self._places: dict[tuple[Any, ...], Shadow] = {}
        self._deadline = time.monotonic() + LIMIT
        parameters = dict(model.named_parameters())
        for name, tensor in (*parameters.items(), *model.named_buffers()):
            shadow = Shadow(
                tensor,
                [Axis(n) for n in tensor.shape],
                parameter=name if name in parameters else "",
            )
            self.named[name] = self._places[_place(tensor)] = self._put(tensor, shadow)

    @property
    def where(self) -> str:
        """The path of the module that runs."""
        return self._paths.get(id(self.stack[-1]), "") if self.stack else ""

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Keep track of which module runs."""
        with ExitStack() as hooks:
            for handle in (
                register_module_forward_pre_hook(lambda m, _: self.stack.append(m)),
                register_module_forward_hook(lambda *_: self._leave()),
            ):
                hooks.callback(handle.remove)
            yield

    def _leave(self) -> None:
        self.stack.pop()

    def data(self, example: Tensor) -> Tensor:
        """Return the model's input, known as such."""
        axes = [Axis(n, fixed="the model's input") for n in example.shape]
        self._put(example, Shadow(example, axes, is_data=True))
        return example

    def _put(self, tensor: Tensor, shadow: Shadow) -> Shadow:
        self._shadows[id(tensor)] = (weakref.ref(tensor), shadow)
        return shadow

    def _known(self, tensor: Tensor) -> Shadow | None:
        reference, shadow = self._shadows.get(id(tensor), (None, None))
        if reference is None or reference() is not tensor:  # an id may be used again
            return None
        return shadow

    def shadow(self, tensor: Tensor) -> Shadow:
        """Return the shadow of a tensor; of one from elsewhere all axes are fixed."""
        shadow = self._known(tensor) or self._places.get(_place(tensor))
        if shadow is None:
            shadow = Shadow(tensor, [Axis(n, fixed=_NOT_A_PARAMETER) for n in tensor.shape])
        return self._put(tensor, shadow)

    def axes(self, tensor: Tensor) -> Axes:
        """Return the axes of a tensor, roots all."""
        return self.shadow(tensor).axes

    def knows(self, tensor: Tensor) -> bool:
        """Tell whether a tensor came from an operation that was followed."""
        return self._known(tensor) is not None

    def bind(self, size: Expression, axis: Axis) -> None:
        """Note that a size in the code is the number of positions of ``axis``."""
        settled = axis.size == 1 or all(leaf.fixed for leaf in leaves(axis))
        if settled and not isinstance(size, Attribute):
            return
        if isinstance(size, int):
            fix(axis, f"its size {size} is a plain number in the code of {self.where}")
            return
        if isinstance(size, Attribute):
            known = self.bound.setdefault(size, axis)
            if known.root() is not axis.root():
                tie(known, axis)
                return
        self.sizes.append((size, axis))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if time.monotonic() > self._deadline:
            raise PruningError(
                f"following the network took over {LIMIT} s, up to {self.where}: give a smaller "
                "example"
            )
        several = result if isinstance(result, (tuple, list)) else [result]
        outputs = [t for t in several if isinstance(t, Tensor)]
        if not outputs:
            return result
        name, positional, defaults = signature(func)
        values = defaults | dict(zip(positional, args, strict=False)) | (kwargs or {})
        values = {key: self._shadowed(value) for key, value in values.items()}
        shapes = [tuple(t.shape) for t in outputs]
        call = Call(name, values, shapes, self.where, self.costs, self.calls)
        self.calls += 1
        rule = RULES.get(name)
        if rule is None:
            rule = pointwise if torch.Tag.pointwise in func.tags else unknown
        found = rule(call)
        read = call.tensors()
        is_data = any(shadow.is_data for shadow in read)
        for tensor, axes in zip(outputs, found, strict=True):
            shadow = self._known(tensor)
            if shadow is not None and name not in _RELAID:  # written in place
                for old, new in zip(shadow.axes, axes, strict=True):
                    tie(old, new)
            else:
                shadow = self._put(tensor, Shadow(tensor, axes))
            shadow.is_data |= is_data
            shadow.makers.append(call)
            call.outputs.append(shadow)
        for shadow in read:
            shadow.readers.append(call)
        return result

    def _shadowed(self, value: Any) -> Any:
        """Return an argument with its tensors replaced by their shadows."""
        if isinstance(value, Tensor):
            return self.shadow(value)
        if isinstance(value, (list, tuple)):
            return [self._shadowed(item) for item in value]
        return value


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
