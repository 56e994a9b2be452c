"""What timm says of a model: how it was made, and the inputs that it expects."""

from __future__ import annotations

from typing import Any

from torch import nn

from spamprune.errors import ModelError
from spamprune.models import Source, check_name, source_of
from spamprune.models.build import PLACEMENT


def origin(model: nn.Module) -> Source | None:
    """Return how ``spamprune.models.create`` or ``timm.create_model`` made a model.

    timm leaves the name in ``pretrained_cfg`` and, since 1.0.31, the arguments in ``_model_args``.
    """
    cfg = _timm_settings(model)
    if source_of(model) is not None or "architecture" not in cfg:
        return source_of(model)
    arguments = getattr(model, "_model_args", {})
    kwargs = {key: value for key, value in arguments.items() if key not in PLACEMENT}
    tag = f".{cfg['tag']}" if cfg.get("tag") else ""
    for name in (f"{cfg['architecture']}{tag}", cfg["architecture"]):
        try:
            check_name(name)
        except ModelError:
            continue
        return Source(name, kwargs)
    return None


def preprocessing(model: nn.Module, source: Source | None) -> dict[str, Any] | None:
    """Return timm's settings for a model's inputs; None where it has none that fit the model."""
    cfg = _timm_settings(model)
    if not cfg:
        return None
    from timm.data import resolve_model_data_config

    settings = dict(resolve_model_data_config(model))
    channels, *size = settings["input_size"]
    kwargs = source.kwargs if source else {}
    if getattr(model, "in_chans", kwargs.get("in_chans", channels)) != channels:
        return None  # the means are those of other channels
    asked = kwargs.get("img_size") or size
    settings["input_size"] = (channels, *((asked, asked) if isinstance(asked, int) else asked))
    return settings


def _timm_settings(model: nn.Module) -> dict[str, Any]:
    settings = getattr(model, "pretrained_cfg", None)
    return settings if isinstance(settings, dict) else {}
