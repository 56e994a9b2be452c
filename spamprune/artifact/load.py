"""Loading an artifact: build the model afresh, give it the recorded shapes, fill in the weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from spamprune.artifact import hub
from spamprune.artifact.facts import HOOKS, default, differing, is_torchs, tensors_in
from spamprune.artifact.format import (
    CONFIG,
    WEIGHTS,
    Config,
    Slot,
    build,
    kind,
    own_attributes,
    parse_config,
    regular_file,
    slots,
)
from spamprune.errors import ArtifactError, ModelError
from spamprune.models import create
from spamprune.models.build import PLACEMENT

Shape = tuple[int, ...]


def load(folder: str | Path, *, factory: Callable[[], nn.Module] | None = None) -> nn.Module:
    """Rebuild the model that ``save`` wrote, without tracing it and without running foreign code.

    Args:
        folder: An artifact, or ``"hf-hub:owner/name"`` for one on the Hugging Face hub, with
            ``@revision`` after it for a branch, tag or commit.
        factory: Builds the unpruned model, for models that spamprune cannot build by name.

    Returns:
        The model on the CPU in evaluation mode; its outputs equal the saved model's bit for bit.
        Its ``pretrained_cfg`` holds the preprocessing, where timm looks for it. The global random
        state is untouched.

    Raises:
        ArtifactError: The artifact is missing, damaged or foreign, or the model that ``factory``
            builds is another one.
    """
    if hub.is_address(folder):
        find = hub.Snapshot(str(folder)).file
    else:
        find = partial(regular_file, folder)
    where = find(CONFIG)
    config = parse_config(where)
    if factory is None:
        factory = _by_name(where, config)
        _check_memory(where, _unpruned_bytes(factory))
    model = build(factory).eval()  # as ``facts`` were taken
    _check_modules(where, config, model)
    _check_facts(where, config, model)
    places = slots(model)
    shapes = _expected_shapes(where, config, places)
    stored = {name: shape for name, shape in shapes.items() if name not in config.shared}
    weights = find(WEIGHTS)
    _check_memory(weights, weights.stat().st_size)
    tensors = _read_weights(weights, stored)
    _set_attributes(where, config, model)
    for name, shape in config.shapes.items():
        if shape is None:
            setattr(places[name].module, places[name].key, None)
    filled = {
        name: _filling(weights, name, places[name], tensor) for name, tensor in tensors.items()
    }
    for name in shapes:
        value = filled[config.shared.get(name, name)]
        setattr(places[name].module, places[name].key, value)
    _follow(model, places)
    if config.preprocessing is not None:
        known = getattr(model, "pretrained_cfg", None) or {}
        settings: Any = {**known, **config.preprocessing.model_dump()}
        model.pretrained_cfg = settings
    return model.eval()


def _by_name(where: Path, config: Config) -> Callable[[], nn.Module]:
    """Return a function that builds the unpruned model from its recorded name and arguments."""
    architecture = config.architecture
    if architecture is None:
        raise ArtifactError(
            f"{where} tells of a {config.class_name!r}, which only its own code can build: pass "
            "load(folder, factory=...) a function that returns a new one"
        )
    foreign = sorted(PLACEMENT & architecture.kwargs.keys())
    if foreign:
        raise ArtifactError(
            f"{where} asks for {foreign[0]!r}, but an artifact brings its own weights: save the "
            "model anew"
        )

    def factory() -> nn.Module:
        try:
            return create(architecture.name, **architecture.kwargs)
        except ModelError as error:
            raise ArtifactError(f"{where}: {error}") from error

    return factory


def _unpruned_bytes(factory: Callable[[], nn.Module]) -> int:
    """Return the size of what ``factory`` builds, found from an outline that allocates nothing."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            outline = factory()
    except ArtifactError:  # the real build says why; all of timm's models can be outlined
        return 0
    return sum(tensor.nbytes for tensor in (*outline.parameters(), *outline.buffers()))


def _check_memory(where: Path, size: int) -> None:
    """Raise where ``size`` bytes are more than the machine has, before they are asked for."""
    memory = psutil.virtual_memory().total
    if size > memory:
        raise ArtifactError(
            f"{where} needs {size / 2**30:.0f} GiB at once, pruned or not, and this machine has "
            f"{memory / 2**30:.0f} GiB of memory: use a larger one"
        )


def _check_modules(where: Path, config: Config, model: nn.Module) -> None:
    """Raise where the model lacks a module that the artifact knows, or has another class."""
    found = {name: type(module).__name__ for name, module in model.named_modules()}
    wanted = {**dict.fromkeys(config.attributes), **config.modules}
    for name, class_name in wanted.items():
        if name not in found:
            raise ArtifactError(
                f"{where} has module {name!r}, which the model built lacks: build it as it was "
                "saved"
            )
        if class_name is not None and found[name] != class_name:
            raise ArtifactError(
                f"{where} has a {class_name} as {name or 'the model'!r}, the model built has a "
                f"{found[name]}: build it as it was saved"
            )


def _check_facts(where: Path, config: Config, model: nn.Module) -> None:
    """Raise or warn where the model has other text, functions, hooks and the like.

    Hooks, replaced methods and what torch's own modules have count in what they compute; of the
    rest nobody can tell.
    """
    if config.facts is None:  # by name, or of a version that recorded none
        return
    modules = dict(model.named_modules())
    for name, key, saved, found in differing(config.facts, model):
        told = "".join(filter(str.isprintable, saved))  # it comes from the file
        said = (
            f"{where} has {key} = {told:.200} in {name or 'the model'!r}, the model built has "
            f"{found}"
        )
        method = callable(getattr(type(modules[name]), key, None))
        if key in HOOKS or method or is_torchs(modules[name]):
            raise ArtifactError(f"{said}: build it as it was saved")
        warnings.warn(f"{said}: if it computes with that, build it as it was saved", stacklevel=3)


def _expected_shapes(where: Path, config: Config, places: dict[str, Slot]) -> dict[str, Shape]:
    """Return the shape of every parameter and buffer that the artifact must fill."""
    for name in (*config.shapes, *config.buffers, *config.shared, *config.shared.values()):
        if name not in places:
            raise ArtifactError(
                f"{where} has tensor {name!r}, for which the model built has no place: build it as "
                "it was saved"
            )
    expected = {}
    for name, place in places.items():
        shape = config.shapes.get(name, place.shape)
        if shape is not None and (place.persistent or name in config.buffers):
            expected[name] = tuple(shape)
    for name, kept in config.shared.items():
        alike = (
            name in expected
            and expected[name] == expected.get(kept)
            and places[name].is_parameter == places[kept].is_parameter
        )
        if not alike or kept in config.shared:
            raise ArtifactError(
                f"{where} ties {name!r} to {kept!r}, which differs from it: save the model anew"
            )
    return expected


def _read_weights(path: Path, expected: dict[str, Shape]) -> dict[str, Tensor]:
    """Read the tensors, once their names and shapes are known to be the expected ones.

    safetensors itself refuses headers that are too long, overlap or leave the file.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = file.keys()
            found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            _compare(path, expected, found)
            # copies: a mapped file can change under the model, and is aligned otherwise than
            # torch's own memory, which may change the last bits of the outputs
            return {name: file.get_tensor(name).clone() for name in found}
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): save the model anew") from error


def _compare(path: Path, expected: dict[str, Shape], found: dict[str, Shape]) -> None:
    """Raise for the first tensor that is missing, unexpected or of another shape."""
    for name, shape in expected.items():
        if name not in found:
            raise ArtifactError(
                f"{path} lacks tensor {name!r} of shape {shape}: save the model anew"
            )
        if found[name] != shape:
            raise ArtifactError(
                f"{path} has tensor {name!r} of shape {found[name]}, {CONFIG} and the model say "
                f"{shape}: save the model anew"
            )
    for name, shape in found.items():
        if name not in expected:
            raise ArtifactError(
                f"{path} has tensor {name!r} of shape {shape}, for which the model has no place: "
                "save the model anew"
            )


def _set_attributes(where: Path, config: Config, model: nn.Module) -> None:
    """Give modules their recorded attributes, if they have such an attribute or have it as None.

    They may have it by their class, but not by torch's own for all modules.
    """
    modules = dict(model.named_modules())
    for name, attributes in config.attributes.items():
        present = own_attributes(modules[name])
        for key, value in attributes.items():
            by_class = ... if hasattr(nn.Module, key) else default(modules[name], key)
            old = present.get(key, by_class)
            if kind(value) is None or (old is not None and kind(old) != kind(value)):
                raise ArtifactError(
                    f"{where} sets {key!r} of {name or 'the model'!r} to {value!r:.80}, but the "
                    "model built has no such attribute of that kind: build it as it was saved"
                )
            setattr(modules[name], key, _typed_like(old, value))


def _follow(model: nn.Module, places: dict[str, Slot]) -> None:
    """Let attributes that hold parameters or buffers, as lists of them, hold the new ones."""
    filled = {
        id(place.tensor): getattr(place.module, place.key)
        for place in places.values()
        if place.tensor is not None
    }
    for module in model.modules():
        for key, value in own_attributes(module).items():
            if any(id(tensor) in filled for tensor in tensors_in(value)):
                vars(module)[key] = _exchanged(value, filled)


def _exchanged(value: Any, filled: dict[int, Tensor]) -> Any:
    """Return ``value`` with tensors exchanged wherever they are within lists, tuples or dicts."""
    if type(value) in (list, tuple):
        return type(value)(_exchanged(item, filled) for item in value)
    if isinstance(value, dict):
        return {key: _exchanged(item, filled) for key, item in value.items()}
    return filled.get(id(value), value)


def _typed_like(old: Any, value: Any) -> Any:
    """Return ``value`` with tuples wherever ``old`` has them, which JSON turned into lists."""
    if not isinstance(value, list):
        return value
    olds = list(old) if isinstance(old, (list, tuple)) else []
    olds += olds[-1:] * (len(value) - len(olds)) or [None] * len(value)
    items = [_typed_like(*pair) for pair in zip(olds, value, strict=False)]
    return tuple(items) if isinstance(old, tuple) else items


def _filling(path: Path, name: str, place: Slot, tensor: Tensor) -> Tensor:
    """Return ``tensor`` as the parameter or buffer that takes its place."""
    old = place.tensor
    if old is not None and old.is_floating_point() != tensor.is_floating_point():
        raise ArtifactError(
            f"{path} has tensor {name!r} as {tensor.dtype}, the model has {old.dtype}: "
            "save the model anew"
        )
    if not place.is_parameter:
        return tensor
    trainable = tensor.is_floating_point() if old is None else old.requires_grad
    return nn.Parameter(tensor, requires_grad=trainable)
