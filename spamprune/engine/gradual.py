"""Gradual structured pruning: units go for real, a few at a time, while a network is trained.

A training falls into segments, each followed by a cut and a smaller network. Learning rates follow
the schedule of the whole. The prior's precisions are cut along with the weights; the optimiser
starts each segment without momentum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from spamprune.bayes.spam import SpaM
from spamprune.engine.bench import Bench
from spamprune.engine.fit import Job, fit
from spamprune.engine.methods import ByPrior
from spamprune.engine.structured import VERIFY_BATCH
from spamprune.engine.subject import Subject
from spamprune.files import write_text
from spamprune.pruning import compaction, plan
from spamprune.recipe.schema import Gradual
from spamprune.report.results import EpochRecord, GradualCut, Quality


@dataclass(frozen=True)
class Shrunk:
    """What gradual pruning leaves.

    Attributes:
        model: The small network.
        spam: Its prior.
        history: One record per epoch.
        cuts: What each cut came to.
    """

    model: nn.Module
    spam: SpaM
    history: list[EpochRecord]
    cuts: list[GradualCut]


def fit_gradually(
    bench: Bench,
    config: Gradual,
    model: nn.Module,
    prior_of: Callable[[nn.Module], SpaM],
    job: Job,
    on_epoch: Callable[[EpochRecord], None],
) -> Shrunk:
    """Train ``model`` and make it smaller on the way; resumes within any segment.

    Args:
        bench: The training's cell, in whose folder each segment keeps a checkpoint and each cut its
            plan.
        config: When units go, and how many.
        model: The dense network, trained in place in the first segment.
        prior_of: Makes a network's prior as it is before training.
        job: What to train on; its checkpoint is the last segment's.
        on_epoch: Called after each epoch.
    """
    spam = prior_of(model)
    left, begun = 1.0, 1  # of the dense network's cost; the first epoch of the segment
    history: list[EpochRecord] = []
    cuts: list[GradualCut] = []

    def train(until: int, checkpoint: Path | None) -> None:
        segment = replace(job, span=(begun, until), checkpoint=checkpoint)
        history.extend(fit(model, ByPrior(spam), segment, bench.accelerator, on_epoch))
        if cuts:
            name = f"gradual{cuts[-1].epoch}-trained"
            measure = partial(bench.quality, model, bench.data.test)
            cuts[-1] = cuts[-1].model_copy(update={"trained": bench.once(name, Quality, measure)})

    for epoch, budget in config.budgets(job.epochs).items():
        if budget >= left:  # units are coarse: the cut before went as far
            continue
        train(epoch, bench.folder / f"gradual{epoch}.checkpoint.safetensors")
        begun = epoch + 1
        chosen = _plan(bench, config, model, spam, budget / left, epoch)
        small = compaction.apply(model, chosen)
        (key,) = chosen.target
        left *= chosen.achieved[key]
        record = partial(_record, bench, config, epoch, model, small, chosen, {key: budget}, left)
        cut = bench.once(f"gradual{epoch}", GradualCut, record)
        # a plan tells nothing of layers that cannot be cut further
        before = cuts[-1].widths if cuts else {}
        cuts.append(cut.model_copy(update={"widths": before | cut.widths}))
        inherited = prior_of(small)
        inherited.inherit(spam, partial(compaction.cut_tensor, chosen))
        model, spam = small, inherited
    train(job.epochs, job.checkpoint)
    return Shrunk(model, spam, history, cuts)


def _plan(
    bench: Bench, config: Gradual, model: nn.Module, spam: SpaM, remaining: float, epoch: int
) -> compaction.Plan:
    """Return the plan of the cut after ``epoch``, made only once."""
    path = bench.folder / f"gradual{epoch}.plan.json"
    if not path.exists():
        posterior = spam.posterior(bench.data.train.loader(bench.config.batch_size))
        scores = Subject(bench, model, posterior).scores(config.criterion)
        (key,) = config.target.model_dump(exclude_none=True)
        wanted: dict[str, Any] = {key: remaining}
        target = plan.Target(**wanted)
        chosen = plan.plan(model, bench.example(), scores, target, **config.choices())
        write_text(path, chosen.to_json())
    return compaction.Plan.from_json(path.read_text(encoding="utf-8"))


def _record(
    bench: Bench,
    config: Gradual,
    epoch: int,
    model: nn.Module,
    small: nn.Module,
    chosen: compaction.Plan,
    target: dict[str, float],
    left: float,
) -> GradualCut:
    """Check and measure the network that a cut left."""
    return GradualCut(
        epoch=epoch,
        criterion=config.criterion,
        ranking=config.ranking,
        target=target,
        achieved=dict.fromkeys(target, left),
        notes=list(chosen.notes),
        widths=chosen.widths(),
        residual=compaction.verify(model, small, chosen, bench.example(VERIFY_BATCH)),
        size=bench.size(small),
        pruned=bench.quality(small, bench.data.test),
    )
