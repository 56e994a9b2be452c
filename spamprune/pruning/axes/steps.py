"""The way that a forward pass takes through a network's code."""

from __future__ import annotations

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class Steps(TorchFunctionMode):
    """Notes the torch functions that code calls, but those that only ask something of a tensor.

    Attributes:
        names: Of the functions, one after another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        makes = result is None or any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))
        if makes and name != "__get__":
            self.names.append(name)
        return result
