"""What an artifact is: two files, the shape of ``config.json``, and the parts of a model it names.

Artifacts come from strangers, so everything read here is checked, and only these two names are
ever opened.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from torch import Tensor, nn

from spamprune.errors import ArtifactError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
FORMAT: Final = "spamprune-artifact"
VERSION: Final = 1

_MAX_CONFIG_BYTES = 16 * 2**20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_BASE_ATTRIBUTES = frozenset(vars(nn.Module()))


class Architecture(BaseModel):
    """The arguments of ``spamprune.models.create``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    kwargs: dict[str, Any]


class Config(BaseModel):
    """The content of ``config.json``: how to rebuild the model, and what its maker adds.

    Everything is relative to a freshly built model: names that are not mentioned are as built.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["spamprune-artifact"] = FORMAT
    version: Literal[1] = VERSION
    versions: dict[str, str]  # package → version that wrote the artifact
    architecture: Architecture | None  # None: a class of the user's, which load's factory builds
    class_name: str  # for messages only, never imported
    modules: dict[str, str]  # module → class, to check what a factory builds
    shapes: dict[str, list[NonNegativeInt] | None]  # parameter or buffer → shape; None: removed
    attributes: dict[str, dict[str, Any]]  # module → attribute → number, truth value or sequence
    shared: dict[str, str]  # parameter or buffer → the one it is tied to
    buffers: list[str]  # non-persistent buffers that are saved all the same
    extra: dict[str, Any]  # free-form: metrics, target …


@dataclass(frozen=True)
class Slot:
    """A place where a module keeps a parameter or buffer, empty ones included."""

    module: nn.Module
    key: str
    tensor: Tensor | None
    is_parameter: bool
    persistent: bool

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The tensor's shape; None for an empty place, such as the bias of a layer without."""
        return None if self.tensor is None else tuple(self.tensor.shape)


def slots(model: nn.Module) -> dict[str, Slot]:
    """Return every place for a tensor in ``model``, by the name it has in a state dict."""
    found = {}
    for prefix, module in model.named_modules():
        hidden = module._non_persistent_buffers_set
        for key, tensor in {**module._parameters, **module._buffers}.items():
            name = f"{prefix}.{key}" if prefix else key
            found[name] = Slot(module, key, tensor, key in module._parameters, key not in hidden)
    return found


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes less those that every ``nn.Module`` has."""
    return {key: value for key, value in vars(module).items() if key not in _BASE_ATTRIBUTES}


def kind(value: object) -> Literal["truth value", "number", "sequence"] | None:
    """Return the kind of an attribute that an artifact may set, None for any other.

    Text is left out on purpose: a file from elsewhere must not set paths or commands.
    """
    if isinstance(value, bool):
        return "truth value"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, (list, tuple)) and all(kind(item) for item in value):
        return "sequence"
    return None


def build(factory: Callable[[], nn.Module]) -> nn.Module:
    """Call ``factory`` on the CPU and leave the global random state as it was."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return factory()


def read_config(folder: str | Path) -> Config:
    """Read and check the ``config.json`` of an artifact; its ``extra`` is free-form.

    Raises:
        ArtifactError: It is missing, damaged, foreign or of a newer format.
    """
    path = regular_file(folder, CONFIG)
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ArtifactError(
                f"{path} is larger than {_MAX_CONFIG_BYTES // 2**20} MiB: it is no configuration "
                "that spamprune wrote"
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}): save the model anew") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError(f"{path} was not written by spamprune.save: its format is not {FORMAT}")
    version = content.get("version")
    if isinstance(version, int) and version > VERSION:
        raise ArtifactError(
            f"{path} has format version {version}, this spamprune reads up to {VERSION}: "
            "upgrade spamprune"
        )
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(
            f"{path} is damaged at {where!r} ({first['msg']}): save the model anew"
        ) from error


def artifact_bytes(folder: str | Path) -> int:
    """Return the size of an artifact's two files in bytes.

    Raises:
        ArtifactError: One of them is missing.
    """
    return sum(regular_file(folder, name).stat().st_size for name in (CONFIG, WEIGHTS))


def regular_file(folder: str | Path, name: str) -> Path:
    """Return the path of one of an artifact's files, which must be a file and not a link.

    Raises:
        ArtifactError: It is missing, a link or something else; a pickle in its stead is named.
    """
    folder = Path(folder)
    path = folder / name
    try:
        if path.is_symlink():
            raise ArtifactError(f"{path} is a link, which is not followed: copy the file itself")
        if path.is_file():
            return path
        siblings = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error}): check its permissions") from error
    pickles = [sibling for sibling in siblings if sibling.endswith(_PICKLES)]
    if pickles:
        raise ArtifactError(
            f"{folder} holds {pickles[0]!r} and no {name}: such files are pickles, which spamprune "
            "never opens; write an artifact with spamprune.save"
        )
    raise ArtifactError(
        f"{path} is missing: an artifact is a folder with {CONFIG} and {WEIGHTS}, written by "
        "spamprune.save"
    )
