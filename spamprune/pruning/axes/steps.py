"""The way that a forward pass takes through a network's code."""

from __future__ import annotations

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class Steps(TorchFunctionMode):
    """Notes the torch functions that code calls, of those that make or write tensors.

    Attributes:
        names: Of the functions, one after another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        makes = any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))
        if name == "__setitem__" or (makes and name != "__get__"):
            self.names.append(name)
        return result
