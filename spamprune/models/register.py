"""Registering networks of our own with timm."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from timm.models import register_model
from torch import nn

from spamprune.errors import ModelError

Network = TypeVar("Network", bound=nn.Module)

# what timm.create_model passes to every builder, for weights that ours do not have
_TIMM_KEYS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def register(build: Callable[..., Network]) -> Callable[..., Network]:
    """Register a function that builds a network with timm, under the function's name.

    The function gets the keyword arguments of ``timm.create_model`` that concern the architecture.
    Its module is listed in ``spamprune/models/build.py``.

    Args:
        build: The function.

    Returns:
        The function, which now takes ``pretrained`` and refuses it when true.
    """

    @functools.wraps(build)
    def entry(pretrained: bool = False, **kwargs: Any) -> Network:
        if pretrained:
            raise ModelError(
                f"model {build.__name__!r} has no pretrained weights: leave out pretrained"
            )
        return build(**{key: value for key, value in kwargs.items() if key not in _TIMM_KEYS})

    register_model(entry)
    return entry
