"""Tensors that stay aligned with a model's parameters while torch-pruning cuts them.

torch-pruning replaces a parameter by a smaller one and tells nobody which entries went; its
pruning history omits some cuts and lists others that never were. So the groups of a followed graph
report what they remove, at the moment when they do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch_pruning as tp
from torch import Tensor, nn

from spamprune.errors import PosteriorError, nearest
from spamprune.pruning.coupling import Remainder, remainders


class Aligned:
    """Tensors shaped like the parameters of one model, cut whenever these are.

    Args:
        tensors: A tensor for every trainable parameter, by name.
        model: Their model.
        what: What the tensors are called in messages.

    Raises:
        PosteriorError: The tensors are not those of the model's parameters.
    """

    def __init__(self, tensors: Mapping[str, Tensor], model: nn.Module, what: str):
        self._what = what
        self._tensors: dict[str, Tensor] = {}
        first = {p: name for name, p in model.named_parameters()}
        paths = dict(model.named_parameters(remove_duplicate=False))
        for path, parameter in paths.items():
            name = first[parameter]  # tied parameters share a tensor until they are pruned
            if name in tensors:
                self._tensors[path] = tensors[name]
                self._fitting(path, parameter)
            elif parameter.requires_grad:
                raise PosteriorError(
                    f"parameter {name!r} is not in {what}: make {what} anew on this model"
                )
        for name in tensors:
            if name not in paths:
                raise PosteriorError(
                    f"parameter {name!r} of {what} is not in the model: {nearest(name, paths)}"
                )

    def get(self, name: str, parameter: nn.Parameter) -> Tensor | None:
        """Return the tensor of a parameter, or None if it had none because it was frozen.

        Raises:
            PosteriorError: The parameter has changed its shape in a way that nobody reported.
        """
        return self._fitting(name, parameter) if name in self._tensors else None

    def cut(self, removed: Iterable[Remainder]) -> None:
        """Keep what a pruned group has kept."""
        for cut in removed:
            tensor = self._tensors.get(cut.name)
            if tensor is not None and tensor.shape[cut.dim] == cut.size:
                kept = cut.kept.to(tensor.device)
                self._tensors[cut.name] = tensor.index_select(cut.dim, kept)

    def _fitting(self, name: str, parameter: nn.Parameter) -> Tensor:
        tensor = self._tensors[name]
        if tensor.shape != parameter.shape:
            raise PosteriorError(
                f"parameter {name!r} has shape {tuple(tensor.shape)} in {self._what}, "
                f"{tuple(parameter.shape)} in the model: that is another one, or was pruned where "
                f"this importance could not see it; make {self._what} anew on the model as it is"
            )
        return tensor.to(parameter.device)


#: Who wants to know what the groups of a graph remove.
_followers: WeakKeyDictionary[tp.DependencyGraph, WeakSet[Aligned]] = WeakKeyDictionary()


def follow(group: tp.dependency.Group, aligned: Aligned) -> None:
    """Keep ``aligned`` up to date with whatever the graph of ``group`` prunes from now on."""
    graph = group._DG
    if graph not in _followers:
        _followers[graph] = WeakSet()
        get_pruning_group = graph.get_pruning_group

        def get_reporting_group(*args: Any, **kwargs: Any) -> tp.dependency.Group:
            return _reporting(get_pruning_group(*args, **kwargs))

        graph.get_pruning_group = get_reporting_group
    _followers[graph].add(aligned)
    _reporting(group)


class _ReportingGroup(tp.dependency.Group):
    """A group that tells the followers of its graph what it removes."""

    def prune(self, idxs: Sequence[int] | None = None, record_history: bool = True) -> None:
        if idxs is not None:  # torch-pruning asks the graph for a group of these, and prunes that
            super().prune(idxs, record_history)
            return
        removed = remainders(self)
        super().prune(record_history=record_history)
        for aligned in _followers[self._DG]:
            aligned.cut(removed)


def _reporting(group: tp.dependency.Group) -> tp.dependency.Group:
    group.__class__ = _ReportingGroup
    return group
