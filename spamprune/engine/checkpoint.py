"""Everything that training needs to go on from an epoch, in one safetensors file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from spamprune.engine.methods import Method
from spamprune.errors import TrainingError
from spamprune.files import write_tensors
from spamprune.pruning.masks import Masks

_FORMAT = "spamprune-checkpoint-2"


@dataclass(frozen=True)
class Trainee:
    """What training changes; chance is a function of seed and epoch, and needs no keeping.

    Attributes:
        model: What is trained.
        optimizer: Of its parameters.
        method: The way of training.
        masks: Weights that are held at zero, changed in place by :func:`load`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    method: Method
    masks: Masks | None = None


def save(path: Path, trainee: Trainee, epoch: int, history: list[dict[str, Any]]) -> None:
    """Write the state after ``epoch`` to ``path``, atomically."""
    optimizer = trainee.optimizer.state_dict()
    tensors = {f"model/{k}": v for k, v in trainee.model.state_dict().items()}
    tensors |= {f"method/{k}": v for k, v in trainee.method.state_dict().items()}
    tensors |= {f"mask/{k}": v for k, v in (trainee.masks or {}).items()}
    numbers: dict[str, Any] = {}
    for index, state in optimizer["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                numbers[f"{index}/{key}"] = value
    about = {
        "epoch": epoch,
        "history": history,
        "groups": optimizer["param_groups"],
        "numbers": numbers,
    }
    write_tensors(path, tensors, {"format": _FORMAT, "about": json.dumps(about)})


def load(path: Path, trainee: Trainee) -> tuple[int, list[dict[str, Any]]]:
    """Restore ``trainee`` from ``path``.

    Returns:
        The epoch that the state is of, and the history up to it.

    Raises:
        TrainingError: The file is damaged or that of another run.
    """
    tensors, about = _read(path)
    try:
        state: dict[int, dict[str, Any]] = {}
        for key, value in _part(tensors, "optimizer/").items():
            index, name = key.split("/")
            state.setdefault(int(index), {})[name] = value
        for key, number in about["numbers"].items():
            index, name = key.split("/")
            state.setdefault(int(index), {})[name] = number
        trainee.model.load_state_dict(_part(tensors, "model/"))
        trainee.method.load_state_dict(_part(tensors, "method/"))
        if trainee.masks is not None:
            kept = _part(tensors, "mask/")
            trainee.masks.update({k: kept[k].to(m.device) for k, m in trainee.masks.items()})
        trainee.optimizer.load_state_dict({"state": state, "param_groups": about["groups"]})
    except (RuntimeError, KeyError, ValueError) as error:
        raise _unusable(path, error) from error
    return about["epoch"], about["history"]


def model_state(path: Path) -> dict[str, Tensor]:
    """Return the model's state dict from the checkpoint at ``path``."""
    return _part(_read(path)[0], "model/")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unusable(path, error) from error
    if metadata.get("format") != _FORMAT:
        raise TrainingError(f"{path} is no checkpoint of this version of spamprune")
    return tensors, json.loads(metadata["about"])


def _unusable(path: Path, error: Exception) -> TrainingError:
    reason = str(error).splitlines()[0]
    return TrainingError(f"cannot go on from {path}: {reason}; delete it to start anew")


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
