"""Saving a model as an artifact: its weights, and how it differs from a freshly built one."""

from __future__ import annotations

import json
import shutil
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from spamprune.artifact.format import (
    CONFIG,
    WEIGHTS,
    Architecture,
    Config,
    Slot,
    build,
    kind,
    own_attributes,
    read_config,
    slots,
)
from spamprune.errors import ArtifactError, OutputError
from spamprune.models import Source, create, source_of

Attributes = dict[str, dict[str, Any]]  # module → attribute → value


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    source: Source | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write ``model`` into ``folder`` as an artifact that ``load`` rebuilds without tracing.

    The folder appears whole or not at all. A model that ``spamprune.models.create`` made, or whose
    ``source`` is given, is rebuilt by name; a model of any other class is rebuilt by the
    ``factory`` passed to ``load``.

    Args:
        model: The model, pruned or not, on any device.
        folder: Where to write; an artifact that is already there is replaced.
        source: How the unpruned model was made, where spamprune did not make it.
        extra: Anything that JSON can hold, kept as is in ``config.json``.

    Returns:
        The folder.

    Raises:
        ArtifactError: The model cannot be rebuilt from what an artifact may hold, such as one
            with exchanged layers or methods.
        OutputError: The folder holds something else, or cannot be written.
        ModelError: ``source`` cannot be built.
    """
    target = Path(folder).resolve()
    _check_replaceable(target)
    source = source or source_of(model)
    architecture = None
    if source is not None:
        kwargs = _as_json(source.kwargs, f"the kwargs of model {source.name!r}")
        architecture = Architecture(name=source.name, kwargs=kwargs)
    config, tensors = _describe(model, architecture, _as_json(extra or {}, "extra"))
    _write(target, config, tensors)
    return Path(folder)


def _describe(
    model: nn.Module, architecture: Architecture | None, extra: dict[str, Any]
) -> tuple[Config, dict[str, Tensor]]:
    """Return all that the artifact of ``model`` says."""
    places = slots(model)
    if architecture is None:  # nothing to compare with, so everything is recorded
        fresh: dict[str, Slot] = {}
        modules = {name: type(module).__name__ for name, module in model.named_modules()}
        attributes = _plain_attributes(model)
    else:
        built = build(partial(create, architecture.name, **architecture.kwargs))
        fresh = slots(built)
        modules = {}
        _check_rebuildable(model, built)
        attributes = _changed_attributes(model, built)
    shapes = {
        name: None if place.shape is None else list(place.shape)
        for name, place in places.items()
        if name not in fresh or place.shape != fresh[name].shape
    }
    buffers = [
        name
        for name, place in places.items()
        if not place.persistent
        and place.tensor is not None
        and (name not in fresh or not _same(place.tensor, fresh[name].tensor))
    ]
    stored = {
        name: place.tensor
        for name, place in places.items()
        if place.tensor is not None and (place.persistent or name in buffers)
    }
    first: dict[int, str] = {}
    shared = {}
    for name, tensor in stored.items():
        kept = first.setdefault(id(tensor), name)
        if kept != name:
            shared[name] = kept
    config = Config(
        versions={package: version(package) for package in ("spamprune", "torch", "timm")},
        architecture=architecture,
        class_name=f"{type(model).__module__}.{type(model).__qualname__}",
        modules=modules,
        shapes=shapes,
        attributes=attributes,
        shared=shared,
        buffers=buffers,
        extra=extra,
    )
    # safetensors takes neither views nor tensors that share memory
    contiguous = torch.contiguous_format
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=contiguous)
        for name, tensor in stored.items()
        if name not in shared
    }
    return config, tensors


def _check_rebuildable(model: nn.Module, built: nn.Module) -> None:
    """Raise unless both models have the same modules and places for tensors."""
    modules, expected = dict(model.named_modules()), dict(built.named_modules())
    for name in {**modules, **expected}:
        found, wanted = type(modules.get(name)), type(expected.get(name))
        if found is not wanted:
            raise _not_rebuildable(name, f"is {found.__name__}, not {wanted.__name__} as built")
    places, wanted_places = slots(model), slots(built)
    for name in places.keys() ^ wanted_places.keys():
        state = "is not there" if name in wanted_places else "was added"
        raise _not_rebuildable(name, state)


def _plain_attributes(model: nn.Module) -> Attributes:
    """Return every attribute that an artifact may set."""
    return {
        name: {key: value for key, value in own_attributes(module).items() if kind(value)}
        for name, module in model.named_modules()
    }


def _changed_attributes(model: nn.Module, built: nn.Module) -> Attributes:
    """Return the attributes that differ, and raise for a difference that cannot be saved."""
    changed: Attributes = {}
    expected = dict(built.named_modules())
    for name, module in model.named_modules():
        before, after = own_attributes(expected[name]), own_attributes(module)
        for key, new in after.items():
            if key not in before:
                if callable(new) and hasattr(type(module), key):
                    raise _not_rebuildable(name, f"has its own {key!r}, which is code")
                continue
            old = before[key]
            if kind(old) and kind(old) == kind(new):
                if _as_lists(old) != _as_lists(new):
                    changed.setdefault(name, {})[key] = new
            elif kind(old) or kind(new) or _opaque_change(old, new):
                raise _not_rebuildable(name, f"has {key} = {new!r:.80}, built with {old!r:.80}")
    return changed


def _opaque_change(old: object, new: object) -> bool:
    """Tell whether an attribute that cannot be saved has visibly changed."""
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return old.shape != new.shape
    return isinstance(old, str) and old != new


def _not_rebuildable(name: str, what: str) -> ArtifactError:
    return ArtifactError(
        f"{name or 'the model'!r} {what}, which an artifact cannot record: make the change inside "
        "a function, save the model that it returns without a source, and pass it to "
        "spamprune.load as the factory"
    )


def _same(first: Tensor, second: Tensor | None) -> bool:
    return (
        second is not None
        and first.dtype == second.dtype
        and torch.equal(first.cpu(), second.cpu())
    )


def _as_lists(value: Any) -> Any:
    """Return ``value`` with its tuples turned into lists, as JSON would."""
    return [_as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def _as_json(value: dict[str, Any], what: str) -> dict[str, Any]:
    """Return ``value`` as it will be read back, so that a model is compared with what load builds.

    Raises:
        ArtifactError: JSON cannot hold it.
    """
    try:
        result: dict[str, Any] = json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"{what} cannot be saved as JSON ({error}): use numbers, text, lists and dicts"
        ) from error
    return result


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
    foreign = sorted(names - {CONFIG, WEIGHTS})
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


def _write(folder: Path, config: Config, tensors: dict[str, Tensor]) -> None:
    """Write both files next to ``folder`` and move them there at once.

    Raises:
        OutputError: The disk does not take them; ``folder`` is as it was.
    """
    mark = uuid4().hex
    draft, old = (folder.with_name(f".{folder.name}.{mark}.{end}") for end in ("new", "old"))
    try:
        draft.mkdir(parents=True)
        text = json.dumps(config.model_dump(), indent=2)
        (draft / CONFIG).write_text(text + "\n", encoding="utf-8")
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
