"""A recipe's ways of training, each from a fresh network to a trained one and its posterior."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from spamprune.bayes.curvature import CurvatureMethod
from spamprune.bayes.posterior import Posterior, load_posterior
from spamprune.bayes.spam import SpaM
from spamprune.engine.bench import Bench
from spamprune.engine.fit import Job, fit
from spamprune.engine.methods import ByPrior
from spamprune.report.results import EpochRecord


@dataclass(frozen=True)
class Trained:
    """What a training leaves.

    Attributes:
        model: The network, trained in place unless its training replaced it.
        posterior: Around its weights.
        history: One record per epoch.
    """

    model: nn.Module
    posterior: Posterior
    history: list[EpochRecord]


def train(bench: Bench, model: nn.Module) -> Trained:
    """Train ``model`` as its cell says, and fit its posterior; resumes in both."""
    data = bench.data.train
    spam = spam_for(bench, model)
    history = fit(model, ByPrior(spam), job_for(bench), bench.accelerator, recorder(bench))
    path = bench.folder / "posterior.safetensors"
    if not path.exists():
        spam.posterior(data.loader(bench.config.batch_size)).save(path)
    return Trained(model, load_posterior(path), history)


def spam_for(bench: Bench, model: nn.Module) -> SpaM:
    """Return the prior of a cell's network."""
    config = bench.config
    evidence, tuned = config.evidence, config.method == "spam"
    return SpaM(
        model,
        len(bench.data.train),
        prior=config.prior.structure,
        curvature=CurvatureMethod(**config.curvature.model_dump()),
        precision=config.prior.precision,
        temperature=config.temperature,
        burn_in=evidence.burn_in if tuned else None,
        every=evidence.every,
        last=evidence.last,
        update=evidence.update if tuned else "adam",
        steps=evidence.steps,
        lr=evidence.lr,
        damping=evidence.damping,
        seed=bench.seed,
    )


def job_for(bench: Bench) -> Job:
    """Return what a cell's network is trained on."""
    config = bench.config
    return Job(
        train=bench.data.train,
        epochs=config.epochs,
        batch_size=config.batch_size,
        optimiser=config.optimiser,
        seed=bench.seed,
        augment=bench.recipe.data.augment,
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
