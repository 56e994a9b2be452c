"""How long a run will take, told before it starts."""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F
from torch import nn

from spamprune.bayes.curvature import CurvatureMethod
from spamprune.bayes.curvature.preflight import preflight
from spamprune.data import DataSet
from spamprune.engine.bench import create_model
from spamprune.engine.cell import accelerator
from spamprune.recipe.schema import Recipe, Structured

_TIMED = 3


def forecast(recipe: Recipe, data: DataSet, jobs: int = 1) -> float:
    """Return about how many seconds a recipe takes here, by timing a few training steps.

    Fine-tuning counts as if networks were whole, so that recipes that prune far end sooner.

    Args:
        recipe: What will be run.
        data: Its data.
        jobs: Processes that work side by side.
    """
    device = accelerator().device
    model = create_model(recipe, recipe.seeds[0]).to(device).train()
    before = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        step = {
            size: _step_seconds(model, size, data, device)
            for size in {training.batch_size for training in recipe.train.values()}
        }
    finally:
        torch.set_num_threads(before)
    total = sum(
        _training(recipe, name, len(data.train), step[training.batch_size])
        for name, training in recipe.train.items()
    )
    cells = len(recipe.train) * len(recipe.seeds)
    return total * len(recipe.seeds) / min(jobs, cells)


def posteriors(recipe: Recipe, data: DataSet) -> list[str]:
    """Return a line for each kind of posterior that a recipe fits: its time and its memory."""
    model = create_model(recipe, recipe.seeds[0]).to(accelerator().device)
    wanted: dict[str, list[str]] = {}
    for name, config in recipe.train.items():
        if config.method in ("map", "spam"):
            wanted.setdefault(config.curvature.model_dump_json(), []).append(name)
    lines = []
    for names in wanted.values():
        config = recipe.train[names[0]]
        method = CurvatureMethod(**config.curvature.model_dump() | {"samples": None})
        batches = data.train.loader(config.batch_size, seed=0)
        found = preflight(model, batches, n_data=len(data.train), curvature=method)
        lines.append(f"posterior of {', '.join(names)}: {found}")
    return lines


def _training(recipe: Recipe, name: str, samples: int, step: float) -> float:
    """Return the seconds that one seed of a training takes, with what is pruned of it."""
    config = recipe.train[name]
    seconds = config.epochs * step * math.ceil(samples / config.batch_size)
    if config.method == "spam":
        seen = min(config.curvature.samples or samples, samples)
        updates = config.epochs / config.evidence.every
        seconds += updates * step * math.ceil(seen / config.batch_size)
    for experiment in recipe.prune:
        tune = experiment.finetune
        if tune is None:
            continue
        if isinstance(experiment, Structured):
            skipped = experiment.trainings is not None and name not in experiment.trainings
            networks = 0 if skipped else len(experiment.targets)
            networks *= 2 if experiment.scratch is not None else 1
        else:
            networks = len(experiment.sparsities)
        batches = math.ceil(samples / tune.batch_size) * tune.batch_size / config.batch_size
        seconds += len(experiment.criteria) * networks * tune.epochs * batches * step
    return seconds


def _step_seconds(model: nn.Module, size: int, data: DataSet, device: torch.device) -> float:
    """Return the seconds of one forward and backward pass on a batch."""
    inputs, targets = next(iter(data.train.loader(size, seed=0)))
    inputs, targets = inputs.to(device), targets.to(device)
    started = 0.0
    for i in range(1 + _TIMED):
        if i == 1:  # the first pass sets things up
            started = time.perf_counter()
        F.cross_entropy(model(inputs), targets).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / _TIMED


def in_words(seconds: float) -> str:
    """Return a duration as people say it, such as ``"1 h 20 min"``."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute"
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours / 24:.0f} days"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
