"""A recipe's ways of training, each from a fresh network to a trained one and its posterior."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from torch import nn

from spamprune.bayes.posterior import Posterior, load_posterior
from spamprune.bayes.spam import SpaM
from spamprune.engine.bench import Bench
from spamprune.engine.fit import Job, fit
from spamprune.engine.gradual import fit_gradually
from spamprune.engine.methods import ByPrior, spam_of
from spamprune.engine.online import Cuts
from spamprune.engine.variational import train_field
from spamprune.pruning.masks import Masks
from spamprune.report.results import EpochRecord, GradualCut, Inference, OnlineCut


@dataclass(frozen=True)
class Trained:
    """What a training leaves.

    Attributes:
        model: The network, trained in place unless its training replaced it.
        posterior: Around its weights.
        history: One record per epoch.
        online: What masks that grew during training came to.
        gradual: What the removal of units during training came to.
        inference: What mean-field inference gives besides.
        masks: False where a weight was pruned for good, if any could be.
    """

    model: nn.Module
    posterior: Posterior
    history: list[EpochRecord]
    online: list[OnlineCut] = field(default_factory=list)
    gradual: list[GradualCut] = field(default_factory=list)
    inference: Inference | None = None
    masks: Masks | None = None


def train(bench: Bench, model: nn.Module) -> Trained:
    """Train ``model`` as its cell says, and fit its posterior; resumes in both."""
    config, job, note = bench.config, job_for(bench), recorder(bench)
    settings = config.inference()
    if settings is not None:
        posterior, history, inference, masks = train_field(bench, settings, model, job, note)
        return Trained(model, posterior, history, inference=inference, masks=masks)
    online: list[OnlineCut] = []
    gradual: list[GradualCut] = []
    if config.gradual is not None:
        prior_of = partial(spam_for, bench)
        shrunk = fit_gradually(bench, config.gradual, model, prior_of, job, note)
        model, spam, history, gradual = shrunk.model, shrunk.spam, shrunk.history, shrunk.cuts
    else:
        spam, cuts = spam_for(bench, model), None
        if config.online is not None:
            cuts = Cuts(bench, config.online, model, spam)
            job = replace(job, masks=cuts.masks, after_epoch=cuts.after_epoch)
        history = fit(model, ByPrior(spam), job, bench.accelerator, note)
        online = cuts.records() if cuts else []
    path = bench.folder / "posterior.safetensors"
    if not path.exists():
        spam.posterior(bench.data.train.loader(config.batch_size)).save(path)
    posterior = load_posterior(path).on(model)
    return Trained(model, posterior, history, online, gradual, masks=job.masks)


def spam_for(bench: Bench, model: nn.Module) -> SpaM:
    """Return the prior of a cell's network."""
    return spam_of(bench.config, model, len(bench.data.train), bench.seed)


def job_for(bench: Bench) -> Job:
    """Return what a cell's network is trained on."""
    return replace(
        bench.job(bench.config),
        validation=bench.data.validation,
        checkpoint=bench.folder / "checkpoint.safetensors",
    )


def recorder(bench: Bench) -> Callable[[EpochRecord], None]:
    """Return what keeps a cell's epochs in ``metrics.jsonl``, which starts anew."""
    lines = bench.folder / "metrics.jsonl"
    lines.unlink(missing_ok=True)  # a resumed run writes its past epochs again

    def note(record: EpochRecord) -> None:
        with lines.open("a", encoding="utf-8") as file:
            file.write(record.model_dump_json() + "\n")
        bench.on_epoch("train", record)

    return note
