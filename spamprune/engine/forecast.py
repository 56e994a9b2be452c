"""How long a run will take, told before it starts."""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from spamprune.bayes.curvature import CurvatureMethod
from spamprune.bayes.curvature.preflight import preflight
from spamprune.bayes.variational import MeanField
from spamprune.data import DataSet
from spamprune.engine.bench import create_model
from spamprune.engine.cell import accelerator
from spamprune.pruning.evidence import EVIDENCE_SAMPLES, STEPS
from spamprune.recipe.schema import (
    Recipe,
    SemiStructured,
    Structured,
    Training,
    Unstructured,
    Variational,
)

_TIMED = 3
#: Steps over the training data that a criterion takes; the others take a few at most.
_SCORING = {"snip": 1, "taylor": 1, "fisher": 1, "grasp": 3}

Experiment = Unstructured | SemiStructured | Structured


def forecast(recipe: Recipe, data: DataSet, jobs: int = 1) -> float:
    """Return about how many seconds a recipe takes here, by timing a few training steps.

    Fine-tuning counts as if networks were whole, so that recipes that prune far end sooner.

    Args:
        recipe: What will be run.
        data: Its data.
        jobs: Processes that work side by side.
    """
    here = accelerator(recipe.arithmetic)
    model = create_model(recipe, recipe.seeds[0]).to(here.device).train()
    if recipe.arithmetic.channels_last:
        model.to(memory_format=torch.channels_last)
    before = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        step = {
            size: _step_seconds(model, size, data, here)
            for size in {training.batch_size for training in recipe.train.values()}
        }
        inferred = {
            name: _inference(settings, model, training.batch_size, training.epochs, data, here)
            for name, training in recipe.train.items()
            if (settings := training.inference()) is not None
        }
    finally:
        torch.set_num_threads(before)
    total = sum(
        _training(recipe, name, data, step[training.batch_size], inferred.get(name))
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


def _inference(
    settings: Variational,
    model: nn.Module,
    size: int,
    epochs: int,
    data: DataSet,
    here: Accelerator,
) -> float:
    """Return the seconds that a variational training takes, with its Bayesian predictions."""
    field = MeanField(model, len(data.train), prior=settings.prior).train()
    step = _step_seconds(field, size, data, here)
    predictions = settings.draws * len(data.test) / 3  # a forward pass is a third of a step
    return step * (epochs * math.ceil(len(data.train) / size) + predictions / size)


def _training(
    recipe: Recipe, name: str, data: DataSet, step: float, inferred: float | None = None
) -> float:
    """Return the seconds that one seed of a training takes, with what is pruned of it."""
    config, samples = recipe.train[name], len(data.train)
    seconds = inferred or config.epochs * step * math.ceil(samples / config.batch_size)
    seconds += step * _evidence_batches(config, samples, config.batch_size)
    if (schedule := config.online or config.gradual) is not None:  # each cut fits a posterior
        cuts = len(schedule.shares(config.epochs))
        seconds += cuts * step * math.ceil(samples / config.batch_size)
    concerned = [experiment for experiment in recipe.prune if experiment.concerns(name)]
    seconds += (
        step * sum(_measuring(e, data, config.batch_size) for e in concerned) / config.batch_size
    )
    for experiment in concerned:
        tune = experiment.finetune
        if tune is None:
            continue
        networks = _networks(experiment)
        taught = 4 / 3 if tune.distil is not None else 1  # a teacher's forward pass
        epochs = networks * tune.epochs * taught
        if experiment.iterative:  # a pass for each posterior that a next step is scored by
            epochs += networks - 1
        if isinstance(experiment, Structured):
            tunings = [i if experiment.iterative else 1 for i in range(1, networks + 1)]
            epochs += sum(experiment.scratch_epochs(config, n) for n in tunings)
        batches = math.ceil(samples / tune.batch_size) * tune.batch_size / config.batch_size
        batches = epochs * batches
        batches += networks * _evidence_batches(tune, samples, config.batch_size)
        seconds += len(experiment.criteria) * batches * step
    return seconds


def _networks(experiment: Experiment) -> int:
    """Return how many networks an experiment makes by each criterion."""
    if isinstance(experiment, Structured):
        return len(experiment.targets)
    if isinstance(experiment, SemiStructured):
        return 1
    return len(experiment.sparsities) + (experiment.target is not None)


def _measuring(experiment: Experiment, data: DataSet, size: int) -> float:
    """Return for how many samples' steps an experiment scores, and measures what it pruned.

    Args:
        experiment: Which.
        data: The data.
        size: Samples in a batch that criteria see.
    """
    tests = len(data.test) / 3  # a forward pass is a third of a step
    found = len(experiment.criteria) * _networks(experiment) * tests
    times = _networks(experiment) if experiment.iterative else 1
    if isinstance(experiment, Unstructured) and experiment.rounds > 1:  # on the way to each
        times = experiment.rounds * len(experiment.sparsities)
    passes = sum(_SCORING.get(criterion, 0) for criterion in experiment.criteria)
    seen = len(data.train) if experiment.batches is None else experiment.batches * size
    found += times * passes * min(seen, len(data.train))
    if isinstance(experiment, Structured):
        evidence = sum(target.evidence is not None for target in experiment.targets)
    else:
        evidence = isinstance(experiment, Unstructured) and experiment.target is not None
    measured = min(EVIDENCE_SAMPLES, len(data.train))
    return found + len(experiment.criteria) * evidence * STEPS * measured / 3


def _evidence_batches(settings: Training, samples: int, size: int) -> float:
    """Return how many batches of ``size`` the evidence updates of a training see."""
    if settings.method != "spam":
        return 0
    seen = min(settings.curvature.samples or samples, samples)
    return settings.epochs / settings.evidence.every * math.ceil(seen / size)


def _step_seconds(model: nn.Module, size: int, data: DataSet, here: Accelerator) -> float:
    """Return the seconds of one forward and backward pass on a batch."""
    inputs, targets = next(iter(data.train.loader(size, seed=0)))
    inputs, targets = inputs.to(here.device), targets.to(here.device)
    started = 0.0
    for i in range(1 + _TIMED):
        if i == 1:  # the first pass sets things up
            started = time.perf_counter()
        with here.autocast():
            loss = F.cross_entropy(model(inputs), targets)
        if isinstance(model, MeanField):
            loss = loss + model.penalty()
        loss.backward()
        if here.device.type == "cuda":
            torch.cuda.synchronize(here.device)
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
