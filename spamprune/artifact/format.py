"""What an artifact is: its files, the shape of ``config.json``, and the parts of a model it names.

Artifacts come from strangers, so everything read here is checked, and only the configuration and
the weights are ever opened.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)
from torch import Tensor, nn

from spamprune.errors import ArtifactError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"  # for people, never read
FORMAT: Final = "spamprune-artifact"
VERSION: Final = 3

_MAX_CONFIG_BYTES = 16 * 2**20
_MAX_NESTING = 4  # of sequences in an attribute
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_BASE_ATTRIBUTES = frozenset(vars(nn.Module()))

Number = int | FiniteFloat


class Architecture(BaseModel):
    """The arguments of ``spamprune.models.create``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    kwargs: dict[str, Any]


class Preprocessing(BaseModel):
    """How an image becomes an input, in the terms of ``timm.data.create_transform``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input_size: Annotated[list[PositiveInt], Field(min_length=3, max_length=3)]  # C, H, W
    interpolation: Literal[
        "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"
    ] = "bicubic"
    mean: list[FiniteFloat]  # of each channel, for inputs between 0 and 1
    std: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    crop_pct: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    crop_mode: Literal["center", "squash", "border"] = "center"

    @model_validator(mode="after")
    def _channels_agree(self) -> Preprocessing:
        channels = self.input_size[0]
        if not len(self.mean) == len(self.std) == channels:
            raise ValueError(f"mean and std need {channels} values, as input_size has channels")
        return self


class Config(BaseModel):
    """The content of ``config.json``: how to rebuild the model, and what its maker adds.

    Everything is relative to a freshly built model: names that are not mentioned are as built.
    Fields with a default came with version 2, ``facts`` with version 3.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["spamprune-artifact"] = FORMAT
    version: Literal[1, 2, 3] = VERSION
    library_name: Literal["spamprune"] = "spamprune"  # what the hub calls the library
    base_model: str | None = None  # the trained network that was pruned, such as a hub repository
    licence: str | None = None  # the hub's identifier of it, such as "apache-2.0"
    num_classes: NonNegativeInt | None = None
    preprocessing: Preprocessing | None = None
    metrics: dict[str, Number | dict[str, Number]] = Field(default_factory=dict)
    versions: dict[str, str]  # package → version that wrote the artifact
    architecture: Architecture | None  # None: a class of the user's, which load's factory builds
    class_name: str  # for messages only, never imported
    modules: dict[str, str]  # module → class, to check what a factory builds
    facts: dict[str, dict[str, str]] | None = None  # module → attribute → words, to check likewise
    shapes: dict[str, list[NonNegativeInt] | None]  # parameter or buffer → shape; None: removed
    attributes: dict[str, dict[str, Any]]  # module → attribute → number, truth value or sequence
    shared: dict[str, str]  # parameter or buffer → the one it is tied to
    buffers: list[str]  # non-persistent buffers that are saved all the same
    extra: dict[str, Any]  # free-form: plan, criterion …


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


def kind(
    value: object, nesting: int = _MAX_NESTING
) -> Literal["truth value", "number", "sequence"] | None:
    """Return the kind of an attribute that an artifact may set, None for any other.

    Text is left out on purpose: a file from elsewhere must not set paths or commands. So are
    numbers that are not finite or fit no 64 bits, and sequences nested more than ``nesting`` deep.
    """
    if isinstance(value, bool):
        return "truth value"
    if isinstance(value, int):
        return "number" if abs(value) < 2**63 else None
    if isinstance(value, float):
        return "number" if math.isfinite(value) else None
    if isinstance(value, (list, tuple)) and nesting:
        return "sequence" if all(kind(item, nesting - 1) for item in value) else None
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
    return parse_config(regular_file(folder, CONFIG))


def parse_config(path: Path) -> Config:
    """Read and check one ``config.json``.

    Raises:
        ArtifactError: It is damaged, foreign or of a newer format.
    """
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ArtifactError(
                f"{path} is larger than {_MAX_CONFIG_BYTES // 2**20} MiB: it is no configuration "
                "that spamprune wrote"
            )
        content = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
        )
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
        raise ArtifactError(
            f"{path} is damaged at {first_problem(error)}: save the model anew"
        ) from error


def first_problem(error: ValidationError) -> str:
    """Return the place and the words of the first of pydantic's complaints, on one line."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))!r} ({first['msg']})"


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object that ``pairs`` spell: readers would differ on a name given twice."""
    content = dict(pairs)
    if len(content) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r:.80} is there twice")
    return content


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number that JSON knows")


def artifact_bytes(folder: str | Path) -> int:
    """Return the size in bytes of what loading an artifact needs: all but the card.

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
