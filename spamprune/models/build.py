"""Building models by name, and remembering how they were built.

timm takes seconds to import, so it is imported by the functions that need it.
"""

from __future__ import annotations

import difflib
import importlib
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spamprune.errors import ModelError, nearest
from spamprune.modules import device_of, evaluation_mode

# arguments of timm.create_model that choose weights or their place, not the architecture
PLACEMENT = frozenset(
    {
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
        "cache_dir",
        "device",
        "dtype",
    }
)
_ATTRIBUTE = "spamprune_source"

# the modules of this package that register networks with timm
OURS = ("bmr", "cifar", "classic", "fixup", "patches")


@dataclass(frozen=True)
class Source:
    """How an architecture was made: all it takes to make it again, without its weights."""

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)


def create(name: str, /, **kwargs: Any) -> nn.Module:
    """Build a model of ours or of timm, and remember how (see ``source_of``).

    Fresh weights come from the global random state, so the caller seeds.

    Args:
        name: Any name that ``check_name`` accepts.
        **kwargs: Further arguments of ``timm.create_model``.

    Raises:
        ModelError: The name or an argument is unknown, or the model cannot be built from them.
    """
    check_name(name)
    import timm

    if "checkpoint_path" in kwargs:
        raise ModelError(
            f"model {name!r} cannot take checkpoint_path, since checkpoints may hold pickles: load "
            "the weights from safetensors into the built model"
        )
    if kwargs.get("pretrained") and not timm.is_model_pretrained(name):
        raise ModelError(f"model {name!r} has no pretrained weights: leave out pretrained")
    try:
        model: nn.Module = timm.create_model(name, **kwargs)
    except Exception as error:  # builders check little, so a wrong argument may raise anything
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown:
            raise ModelError(
                f"model {name!r} takes no argument {unknown[1]!r}: leave it out or respell it"
            ) from error
        raise ModelError(
            f"model {name!r} cannot be built from {kwargs}: {_first_line(error)}"
        ) from error
    architecture = {key: value for key, value in kwargs.items() if key not in PLACEMENT}
    setattr(model, _ATTRIBUTE, Source(name, architecture))
    return model


def source_of(model: nn.Module) -> Source | None:
    """Return how ``create`` made ``model``, or None for a model made elsewhere."""
    source = getattr(model, _ATTRIBUTE, None)
    return source if isinstance(source, Source) else None


def register_all() -> None:
    """Add our models to timm's registry, for ``timm.create_model`` and timm's own scripts.

    ``create`` and all commands do so by themselves; ``import spamprune`` does not, since timm takes
    seconds to import.
    """
    for module in OURS:
        importlib.import_module(f"spamprune.models.{module}")


def check_name(name: str) -> None:
    """Check that ``name`` is in timm's registry, ours included; tags such as ".a1_in1k" count.

    Raises:
        ModelError: It is not; the message suggests the nearest names.
    """
    import timm

    register_all()
    architecture, _, tag = name.partition(".")
    known = timm.is_model(architecture)
    if known and not tag:
        return
    choices = timm.list_models(f"{architecture}.*", include_tags=True) if known else []
    if name in choices:
        return
    choices = choices or timm.list_models()
    close = difflib.get_close_matches(name, choices, n=3)
    # over a thousand names are no help, so without a close one only ours are shown
    hint = nearest(name, close or timm.list_models(module=OURS))
    raise ModelError(f"unknown model {name!r}: {hint} timm.list_models() lists all")


def check_fits(model: nn.Module, shape: tuple[int, ...], classes: int) -> None:
    """Check in one forward pass that a model maps the data to one logit per class.

    The pass runs in evaluation mode on zeros, so neither modes, statistics nor the random state
    change.

    Args:
        model: The model.
        shape: Shape of one sample, such as ``(3, 32, 32)``.
        classes: Number of classes of the data.

    Raises:
        ModelError: The model cannot take such a sample, or its outputs are not ``(1, classes)``.
    """
    source = source_of(model)
    name = source.name if source else type(model).__name__
    data = f"samples of shape {tuple(shape)} and {classes} classes"
    example = torch.zeros(1, *shape, device=device_of(model))
    try:
        with evaluation_mode(model), torch.no_grad():
            outputs = model(example)
    except Exception as error:  # a forward pass may raise anything on a shape it was not made for
        raise ModelError(
            f"model {name!r} does not fit {data}: {_first_line(error)}; change its kwargs, such "
            "as in_chans or img_size, or the data"
        ) from error
    found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if found != (1, classes):
        raise ModelError(
            f"model {name!r} does not fit {data}: its outputs for one sample are {found}, not "
            f"{(1, classes)}; set num_classes={classes}"
        )


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
