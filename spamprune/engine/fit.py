"""The training loop: one for training, fine-tuning and training from scratch."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from spamprune.data import Split
from spamprune.data.base import Augment, mixed_seed
from spamprune.engine import checkpoint
from spamprune.engine.methods import Method
from spamprune.engine.objective import CROSS_ENTROPY, Objective
from spamprune.errors import TrainingError
from spamprune.modules import batch_norms, device_of
from spamprune.pruning.masks import Masks, held
from spamprune.recipe.schema import Optimiser
from spamprune.report import measure
from spamprune.report.results import EpochRecord

VALIDATION_BATCH = 1000
#: A checkpoint is written after an epoch when the last one is this old, and after the last epoch.
CHECKPOINT_SECONDS = 2.0


@dataclass(frozen=True)
class Job:
    """What to train on and for how long.

    Attributes:
        train: The training data.
        epochs: Passes over it.
        batch_size: Samples in a step.
        optimiser: How weights move.
        seed: Of the order of the data and its augmentation.
        augment: Augmentation of the training data.
        objective: What a step minimises, before the prior.
        norms: Whether BatchNorm normalises by the batch, or by its statistics, which then stay.
        channels_last: Keep the weights of 2D convolutions in that memory layout.
        validation: Data whose accuracy is recorded after each epoch.
        masks: Weights that stay at zero. ``after_epoch`` may change them in place, and then applies
            them.
        checkpoint: Where the state is kept after each epoch, to resume from.
        after_epoch: Called after each epoch and its evidence step, before the state is kept.
        span: The first and the last epoch to train, where that is a part of ``epochs``; rates
            follow the schedule of the whole.
    """

    train: Split
    epochs: int
    batch_size: int
    optimiser: Optimiser
    seed: int
    augment: Augment = "none"
    objective: Objective = CROSS_ENTROPY
    norms: Literal["train", "frozen"] = "train"
    channels_last: bool = False
    validation: Split | None = None
    masks: Masks | None = None
    checkpoint: Path | None = None
    after_epoch: Callable[[int], None] = lambda epoch: None
    span: tuple[int, int] | None = None


def fit(
    model: nn.Module,
    method: Method,
    job: Job,
    accelerator: Accelerator,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
) -> list[EpochRecord]:
    """Train ``model`` in place.

    A checkpoint that is there already is resumed from; the result is bit-identical to an
    uninterrupted run on the same machine.

    Args:
        model: The network, on the accelerator's device.
        method: What happens besides gradient steps, such as :class:`~.methods.ByPrior`.
        job: What to train on.
        accelerator: Device and precision.
        on_epoch: Called after each epoch, also for those that a checkpoint already holds.

    Returns:
        One record per epoch.

    Raises:
        TrainingError: The loss is no longer finite; the last good checkpoint is kept.
    """
    if job.channels_last:
        model.to(memory_format=torch.channels_last)
    name = job.optimiser.name.replace("sgd", "momentum")  # timm's "sgd" is Nesterov's
    optimizer = create_optimizer_v2(
        _parameter_groups(model, job.optimiser),
        opt=name,
        lr=job.optimiser.lr,
        weight_decay=0.0,
        momentum=job.optimiser.momentum,
    )
    loader = job.train.loader(job.batch_size, seed=job.seed, augment=job.augment)
    # evidence is of the data itself, so its pass sees no augmentation
    plain = job.train.loader(job.batch_size, seed=job.seed + 1)
    steps = len(loader)
    schedule = None
    if job.optimiser.schedule == "cosine":
        schedule = CosineLRScheduler(
            optimizer,
            t_initial=job.epochs * steps,
            lr_min=job.optimiser.min_lr,
            warmup_t=job.optimiser.warmup * steps,
            warmup_lr_init=job.optimiser.min_lr,
            t_in_epochs=False,
        )
    trainee = checkpoint.Trainee(model, optimizer, method, job.masks)
    first, last = job.span or (1, job.epochs)
    done, history = first - 1, []
    if job.checkpoint is not None and job.checkpoint.exists():
        done, lines = checkpoint.load(job.checkpoint, trainee)
        history = [EpochRecord(**line) for line in lines]
        for record in history:
            on_epoch(record)
    saved, kept = -math.inf, done
    with nullcontext() if job.masks is None else held(model, job.masks, optimizer):
        for epoch in range(done + 1, last + 1):
            started = time.perf_counter()
            loader.set_epoch(epoch)
            plain.set_epoch(epoch)
            # dropout and mixup too are functions of (seed, epoch): a resumed run repeats them
            torch.manual_seed(mixed_seed(job.seed, epoch))
            np.random.seed(mixed_seed(job.seed, epoch) % 2**32)
            model.train()
            if job.norms == "frozen":
                for layer in batch_norms(model):
                    layer.eval()
            total = torch.zeros((), device=accelerator.device)
            for step, (inputs, targets) in enumerate(loader, start=(epoch - 1) * steps):
                if schedule is not None:
                    schedule.step_update(step)
                inputs, targets = inputs.to(accelerator.device), targets.to(accelerator.device)
                with accelerator.autocast():
                    loss = job.objective(model, inputs, targets)
                optimizer.zero_grad()
                accelerator.backward(loss + method.penalty())
                optimizer.step()
                method.after_step(optimizer)
                total += loss.detach() * len(targets)
            mean = total.item() / len(job.train)
            if not math.isfinite(mean) or not _finite(model):
                there = f"{job.checkpoint} holds epoch {kept}" if kept else "no epoch was kept"
                half = accelerator.mixed_precision != "no"
                raise TrainingError(
                    f"the loss is {mean} in epoch {epoch} and weights are lost; {there}: lower "
                    f"the learning rate (optimiser.lr is {job.optimiser.lr})"
                    + (", or train with arithmetic.precision fp32" if half else "")
                )
            step_taken = method.after_epoch(epoch, plain)
            job.after_epoch(epoch)
            record = EpochRecord(
                epoch=epoch,
                loss=mean,
                lr=optimizer.param_groups[0]["lr"],
                seconds=time.perf_counter() - started,
                validation_accuracy=_accuracy(model, job.validation) if job.validation else None,
                log_evidence=step_taken.log_evidence if step_taken else None,
                log_precision=step_taken.log_precision if step_taken else None,
                reduced=step_taken.reduced if step_taken else None,
            )
            history.append(record)
            stale = time.monotonic() - saved >= CHECKPOINT_SECONDS or epoch == last
            if job.checkpoint is not None and stale:
                lines = [line.model_dump() for line in history]
                checkpoint.save(job.checkpoint, trainee, epoch, lines)
                saved, kept = time.monotonic(), epoch
            on_epoch(record)
    return history


def check_batches(model: nn.Module, train: Split, batch_size: int, setting: str) -> None:
    """Raise if BatchNorm is to normalise by a last batch of one sample, and cannot.

    Args:
        model: The network.
        train: What it is trained on.
        batch_size: Samples in a step.
        setting: What the user calls that.

    Raises:
        TrainingError: It cannot.
    """
    n = len(train)
    if (n % batch_size or batch_size) > 1:
        return
    inputs, _ = next(iter(train.loader(1)))
    trained = copy.deepcopy(model).train()  # whose running statistics change
    try:
        with torch.no_grad():
            trained(inputs.to(device_of(model)))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise TrainingError(
            f"{setting}: batches of {batch_size} of {n} training samples end with one of a single "
            f"sample, which BatchNorm in {type(model).__name__} cannot normalise: choose another"
        ) from error


def _parameter_groups(model: nn.Module, optimiser: Optimiser) -> list[dict[str, Any]]:
    """Give single numbers (fixup's biases and multipliers) a tenth of SGD's learning rate.

    So do Zhang et al. 2019 and the SpaM paper: one such number moves a whole layer. The bias of a
    layer with one unit is none of them, nor is what a mean-field posterior adds.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    scalars = {
        id(p): p  # one that modules share counts once
        for module in model.modules()
        if not type(module).__module__.startswith(("torch.nn", "spamprune.bayes"))
        for p in module.parameters(recurse=False)
        if p.numel() == 1 and p.requires_grad
    }
    if optimiser.name != "sgd" or not scalars:
        return [{"params": trainable}]
    tensors = [p for p in trainable if id(p) not in scalars]
    return [{"params": tensors}, {"params": list(scalars.values()), "lr": optimiser.lr / 10}]


def _finite(model: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())


def _accuracy(model: nn.Module, split: Split) -> float:
    return measure.quality(model, split.loader(VALIDATION_BATCH)).accuracy
