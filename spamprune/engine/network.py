"""Trained networks: those that a command names, and those that a recipe starts from.

Weights come from an artifact, a safetensors file or what timm publishes; nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from spamprune import models
from spamprune.artifact import hub, load, origin
from spamprune.artifact.format import CONFIG, Config, parse_config
from spamprune.data import DataSet
from spamprune.data.folder import prepared
from spamprune.errors import ModelError
from spamprune.models.classifier import classifier_name

#: In a recipe: the weights that timm publishes.
PRETRAINED = "pretrained"
_WEIGHTS = "model.safetensors"  # what timm calls them on the hub


@dataclass(frozen=True)
class Network:
    """A network, and what an artifact of it should tell.

    Attributes:
        model: The network, on the CPU.
        base_model: Where its weights are published, if they are.
        licence: Their licence, if it is known.
    """

    model: nn.Module
    base_model: str | None = None
    licence: str | None = None


def find(
    name: str,
    data: DataSet,
    *,
    weights: Path | None = None,
    random: bool = False,
    seed: int = 0,
) -> Network:
    """Return the network called ``name``, once it is known to be one for ``data``.

    Args:
        name: A name that timm knows, an artifact's folder, or ``hf-hub:owner/name``.
        data: What it classifies.
        weights: A safetensors file with weights for a model that timm knows; by default they are
            the ones that timm publishes.
        random: Leave such a model untrained instead.
        seed: Of its initial weights.

    Raises:
        ModelError: The name is unknown, or weights cannot be had or do not fit.
        ArtifactError: The artifact cannot be loaded.
    """
    if hub.is_address(name) or Path(name).exists() or "/" in name:
        if weights is not None or random:
            raise ModelError(f"{name} is an artifact, with weights of its own: name no others")
        network = _artifact(name)
    else:
        models.check_name(name)
        if random and weights is not None:
            raise ModelError(f"model {name!r} is to be random and to have {weights}: choose one")
        if random or weights is not None:
            network = Network(_built(name, data, seed))
            if weights is not None:
                _fill(network.model, name, weights, _read(weights))
        else:
            way_out = "give --weights FILE.safetensors, or --random for an untrained network"
            network = _pretrained(name, {}, way_out)
    classes = getattr(network.model, "num_classes", data.classes)
    if classes != data.classes:
        raise ModelError(
            f"{name!r} tells {classes} classes apart, and {data.name} has {data.classes}: train it "
            "on these data first, then give the artifact, or its weights with --weights"
        )
    return network


def start(name: str, kwargs: Mapping[str, Any], weights: str) -> nn.Module:
    """Return a new network with trained weights, on the CPU.

    A classifier for another number of classes than theirs keeps its fresh weights, which come from
    the global random state: the caller seeds.

    Args:
        name: A name that timm knows.
        kwargs: Further arguments of ``timm.create_model``.
        weights: ``"pretrained"`` for those that timm publishes, a safetensors file, an artifact's
            folder, or ``hf-hub:owner/name``.

    Raises:
        ModelError: The network cannot be built, or the weights cannot be had or do not fit.
        ArtifactError: The artifact cannot be loaded.
    """
    if weights == PRETRAINED:
        way_out = "give model.weights a safetensors file, or leave it out"
        return _pretrained(name, kwargs, way_out).model
    model = models.create(name, **kwargs)
    if hub.is_address(weights) or Path(weights).is_dir():
        found = load(weights).state_dict()
    else:
        found = _read(Path(weights))
    own = model.state_dict()
    head = classifier_name(model) + "."
    for key in [key for key in own if key.startswith(head)]:
        if key in found and found[key].shape[:1] != own[key].shape[:1]:  # other classes
            found[key] = own[key]
    _fill(model, name, weights, found)
    return model


def prepare(data: DataSet, name: str) -> DataSet:
    """Return an image folder with images as timm prepares them for its weights, in their own size.

    Args:
        data: What :func:`spamprune.data.folder.image_folder` made.
        name: A name that timm knows.
    """
    from timm.data import resolve_data_config
    from timm.models import get_pretrained_cfg

    published = get_pretrained_cfg(name)
    if published is None:  # which ``start`` tells of
        return data
    settings = resolve_data_config(pretrained_cfg=published.to_dict())
    return prepared(data, {**settings, "input_size": data.shape})


def fit_data(network: Network, data: DataSet) -> DataSet:
    """Return ``data`` with inputs as the network expects them.

    Images in a folder are prepared as timm says of the network; other data sets are tensors, which
    must fit as they are.

    Raises:
        ModelError: They do not fit.
        DataError: They are colour images and the network is for others.
    """
    model = network.model
    settings = origin.preprocessing(model, models.source_of(model))
    if data.name == "image_folder" and settings is not None:
        data = prepared(data, settings)
    models.check_fits(model, data.shape, data.classes)
    return data


def _artifact(name: str) -> Network:
    model = load(name)
    config = _config(name)
    base = name.removeprefix(hub.PREFIX) if hub.is_address(name) else config.base_model
    return Network(model, base, config.licence)


def _config(name: str) -> Config:
    if hub.is_address(name):
        return parse_config(hub.Snapshot(name).file(CONFIG))
    return parse_config(Path(name) / CONFIG)


def _built(name: str, data: DataSet, seed: int) -> nn.Module:
    """Return a new network for the classes, channels and size of ``data``."""
    from timm.models import get_pretrained_cfg

    settings = get_pretrained_cfg(name)
    kwargs: dict[str, Any] = {"num_classes": data.classes}
    if settings is not None and len(data.shape) == 3 and data.name != "image_folder":
        channels, *size = data.shape
        if channels != settings.input_size[0]:
            kwargs["in_chans"] = channels
        if settings.fixed_input_size and tuple(size) != tuple(settings.input_size[1:]):
            kwargs["img_size"] = tuple(size)
    torch.manual_seed(seed)
    return models.create(name, **kwargs)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read ({error}): give a safetensors file") from error
    return found


def _fill(model: nn.Module, name: str, where: Path | str, found: Mapping[str, Tensor]) -> None:
    """Load weights, found at ``where``, that must be exactly the network's."""
    shapes = {key: tuple(tensor.shape) for key, tensor in found.items()}
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    wrong = [key for key in {**wanted, **shapes} if shapes.get(key) != wanted.get(key)]
    if wrong:
        key, more = wrong[0], f", and {len(wrong) - 1} more differ" if wrong[1:] else ""
        raise ModelError(
            f"{where} does not fit model {name!r}: {key!r} is {shapes.get(key, 'missing')} there, "
            f"{wanted.get(key, 'missing')} in the network{more}"
        )
    model.load_state_dict(found)


def _pretrained(name: str, kwargs: Mapping[str, Any], way_out: str) -> Network:
    """Return a model with the weights that timm publishes, always from safetensors."""
    from huggingface_hub import hf_hub_download
    from timm.models import get_pretrained_cfg

    settings = get_pretrained_cfg(name)
    if settings is None or not settings.hf_hub_id:
        raise ModelError(f"timm has no pretrained weights of {name!r} on the hub: {way_out}")
    file = settings.hf_hub_filename or _WEIGHTS
    if not file.endswith(".safetensors"):
        raise ModelError(
            f"the pretrained weights of {name!r} are published as {file}, which may hold pickles: "
            f"{way_out}"
        )
    try:
        path = hf_hub_download(settings.hf_hub_id, file)
    except Exception as error:  # of the hub's client, or of whichever HTTP library it uses
        raise ModelError(
            f"the pretrained weights of {name!r} cannot be downloaded ({hub.first_line(error)}): "
            f"{way_out}"
        ) from error
    # a file of timm's own names, not of the authors' that custom_load would translate
    overlay = {"file": path, "custom_load": False}
    model = models.create(name, **kwargs, pretrained=True, pretrained_cfg_overlay=overlay)
    return Network(model, settings.hf_hub_id, settings.license)
