"""Saving a model as an artifact: its weights, and how it differs from a freshly built one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from spamprune.artifact.card import card
from spamprune.artifact.compare import (
    changed_attributes,
    check_rebuildable,
    check_self_contained,
    plain_attributes,
    same,
)
from spamprune.artifact.facts import facts
from spamprune.artifact.format import (
    CARD,
    CONFIG,
    WEIGHTS,
    Architecture,
    Config,
    Slot,
    build,
    first_problem,
    read_config,
    slots,
)
from spamprune.artifact.origin import origin
from spamprune.artifact.origin import preprocessing as timm_preprocessing
from spamprune.errors import ArtifactError, OutputError
from spamprune.models import Source, create


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    source: Source | None = None,
    factory: Callable[[], nn.Module] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    licence: str | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write ``model`` into ``folder`` as an artifact that ``load`` rebuilds without tracing.

    The folder appears whole or not at all, with a model card for people beside what ``load``
    needs. A model that ``spamprune.models.create`` or timm made, or whose ``source`` is given, is
    rebuilt by name; a model of any other class is rebuilt by the ``factory`` passed to ``load``.

    Args:
        model: The model, pruned or not, on any device.
        folder: Where to write; an artifact that is already there is replaced.
        source: How the unpruned model was made, where neither spamprune nor timm made it.
        factory: In place of a name: builds the unpruned model, here to compare with, and again
            when ``load`` is given it.
        preprocessing: How inputs are made, in timm's terms (``input_size``, ``mean``, ``std``,
            ``interpolation``, ``crop_pct``, ``crop_mode``); by default what timm says of the model.
        metrics: Numbers by name, or for each name numbers by stage, such as
            ``{"accuracy": {"dense": 93.1, "pruned": 92.8}}``; the card shows them.
        base_model: The trained network that was pruned, such as ``"timm/resnet18.a1_in1k"``.
        licence: The hub's identifier of the weights' licence, such as ``"apache-2.0"``.
        extra: Anything else that JSON can hold, kept as is in ``config.json``.

    Returns:
        The folder.

    Raises:
        ArtifactError: The model cannot be rebuilt from what an artifact may hold, such as one
            with exchanged layers or methods, or what is said of it is not of the form above.
        OutputError: The folder holds something else, or cannot be written.
        ModelError: ``source`` cannot be built.
    """
    target = Path(folder).resolve()
    _check_replaceable(target)
    if source is not None and factory is not None:
        raise ArtifactError("save was given a source and a factory: one of them builds the model")
    built = None
    if factory is not None:
        built = build(factory)
    else:
        source = source or origin(model)
    architecture = None
    if source is not None:
        kwargs = _as_json(source.kwargs, f"the kwargs of model {source.name!r}")
        architecture = Architecture(name=source.name, kwargs=kwargs)
        built = build(partial(create, architecture.name, **architecture.kwargs))
    classes = getattr(model, "num_classes", None)
    config = _checked(
        versions={package: version(package) for package in ("spamprune", "torch", "timm")},
        architecture=architecture,
        class_name=f"{type(model).__module__}.{type(model).__qualname__}",
        num_classes=classes if isinstance(classes, int) else None,
        base_model=base_model,
        licence=licence,
        preprocessing=_as_json(preprocessing or timm_preprocessing(model, source), "preprocessing"),
        metrics=_as_json(metrics or {}, "metrics"),
        extra=_as_json(extra or {}, "extra"),
        modules={name: type(module).__name__ for name, module in model.named_modules()}
        if architecture is None
        else {},
        facts=facts(model) if architecture is None else None,
        **_differences(model, built),
    )
    _write(target, config, _tensors(model, config), card(config, model, built))
    return Path(folder)


def _differences(model: nn.Module, built: nn.Module | None) -> dict[str, Any]:
    """Return the fields of ``Config`` that tell ``model`` from ``built``; all of it for None."""
    places = slots(model)
    if built is None:
        fresh: dict[str, Slot] = {}
        check_self_contained(model)
        attributes = plain_attributes(model)
    else:
        fresh = slots(built)
        check_rebuildable(model, built)
        attributes = changed_attributes(model, built)
    buffers = [
        name
        for name, place in places.items()
        if not place.persistent
        and place.tensor is not None
        and (name not in fresh or not same(place.tensor, fresh[name].tensor))
    ]
    first: dict[int, str] = {}
    shared = {}
    for name, place in places.items():
        if place.tensor is not None and (place.persistent or name in buffers):
            kept = first.setdefault(id(place.tensor), name)
            if kept != name:
                shared[name] = kept
    return {
        "shapes": {
            name: None if place.shape is None else list(place.shape)
            for name, place in places.items()
            if name not in fresh or place.shape != fresh[name].shape
        },
        "attributes": attributes,
        "buffers": buffers,
        "shared": shared,
    }


def _tensors(model: nn.Module, config: Config) -> dict[str, Tensor]:
    """Return copies of what is stored: safetensors takes neither views nor shared memory."""
    return {
        name: place.tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, place in slots(model).items()
        if place.tensor is not None
        and (place.persistent or name in config.buffers)
        and name not in config.shared
    }


def _checked(**fields: Any) -> Config:
    """Return a ``Config``, or raise for what its maker said and it does not take."""
    try:
        return Config(**fields)
    except ValidationError as error:
        raise ArtifactError(
            f"{first_problem(error)}: see the arguments of spamprune.save"
        ) from error


def _as_json(value: Any, what: str) -> Any:
    """Return ``value`` as it will be read back, so that a model is compared with what load builds.

    Raises:
        ArtifactError: JSON cannot hold it.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"{what} cannot be saved as JSON ({error}): use finite numbers, text, lists and dicts"
        ) from error


def _check_replaceable(folder: Path) -> None:
    """Raise unless ``folder`` is free or holds an artifact and nothing else."""
    try:
        if not folder.exists():
            return
        if not folder.is_dir():
            raise OutputError(f"{folder} is a file: choose another folder for the artifact")
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise OutputError(f"{folder} cannot be read ({error}): choose another folder") from error
    foreign = sorted(names - {CONFIG, WEIGHTS, CARD})
    if foreign:
        raise OutputError(
            f"{folder} holds {foreign[0]!r}, which is no part of an artifact: choose another folder"
        )
    if names:
        try:
            read_config(folder)
        except ArtifactError as error:
            raise OutputError(
                f"{folder} holds files that are no artifact ({error}): choose another folder"
            ) from error


def _write(folder: Path, config: Config, tensors: dict[str, Tensor], text: str) -> None:
    """Write the files next to ``folder`` and move them there at once.

    Raises:
        OutputError: The disk does not take them; ``folder`` is as it was.
    """
    mark = uuid4().hex
    draft, old = (folder.with_name(f".{folder.name}.{mark}.{end}") for end in ("new", "old"))
    try:
        draft.mkdir(parents=True)
        (draft / CONFIG).write_text(_as_text(config), encoding="utf-8")
        (draft / CARD).write_text(text, encoding="utf-8")
        save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(draft / CONFIG, draft / WEIGHTS)  # safetensors writes for the owner only
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{folder} cannot be written ({error}): choose another folder") from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _as_text(config: Config) -> str:
    """Return ``config`` as JSON for people, with lists of numbers on one line."""
    text = json.dumps(config.model_dump(), indent=2, allow_nan=False)
    return re.sub(r"\[\n([-+.\deE,\s]+)\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n"
