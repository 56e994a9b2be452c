"""The shortest way: prune a trained network, and say what that costs and saves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from accelerate import Accelerator
from torch import Tensor, nn

from spamprune import artifact, models
from spamprune.bayes.posterior import fit_posterior
from spamprune.bayes.spam import SpaM
from spamprune.data import DataSet, Split
from spamprune.data.base import Augment
from spamprune.engine.cell import accelerator
from spamprune.engine.fit import Job, check_batches, fit
from spamprune.engine.methods import ByPrior
from spamprune.engine.network import Network, fit_data
from spamprune.engine.stages import Stages
from spamprune.errors import OutputError, PruningError, TrainingError, nearest
from spamprune.files import write_text
from spamprune.pruning.compaction import Plan, Ranking, apply, verify
from spamprune.pruning.evidence import Evidence
from spamprune.pruning.plan import Target, check_reachable, plan
from spamprune.pruning.recalibrate import recalibrate
from spamprune.pruning.units import DEFAULT_KINDS, KINDS, Kind
from spamprune.recipe.schema import Optimiser
from spamprune.report import measure
from spamprune.report.results import EpochRecord, Size
from spamprune.scores import CRITERIA

PLAN = "plan.json"
#: Batch sizes at which a forward pass is timed.
LATENCY_BATCHES = (1, 32)


@dataclass(frozen=True)
class Request:
    """What to do to a network.

    Attributes:
        target: How small; None: as small as the evidence says.
        criterion: What scores weights.
        ranking: How units are compared; see :func:`spamprune.plan`.
        kinds: Which kinds of units may go.
        round_to: Channels that remain in each layer are a multiple of this.
        calibration: Training samples for the posterior and for BatchNorm.
        decay: The weight decay that the network was trained with, per step of SGD or decoupled: the
            precision of the prior, of fine-tuning too, over the number of training samples. None:
            the prior is N(0, 1).
        epochs: Of fine-tuning.
        lr: Learning rate of fine-tuning, by Adam, falling to zero along a cosine.
        batch_size: Samples in a step.
        augment: Augmentation while fine-tuning.
        seed: Of everything random.

    Raises:
        PruningError: A criterion, ranking or kind is unknown.
        TrainingError: The learning rate is not positive.
    """

    target: Target | None
    criterion: str = "opd"
    ranking: Ranking = "uniform"
    kinds: tuple[Kind, ...] = DEFAULT_KINDS
    round_to: int = 1
    calibration: int = 2000
    decay: float | None = None
    epochs: int = 0
    lr: float = 3e-4
    batch_size: int = 64
    augment: Augment = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        CRITERIA[self.criterion]
        for what, values, valid in (
            ("ranking", [self.ranking], get_args(Ranking)),
            ("kind of units", self.kinds, KINDS),
            ("augmentation", [self.augment], get_args(Augment)),
        ):
            for value in values:
                if value not in valid:
                    raise PruningError(f"unknown {what} {value!r}: {nearest(value, valid)}")
        if self.decay is not None and not 0 < self.decay < math.inf:
            raise PruningError(f"weight decay {self.decay} is out of range: a positive number")
        if not 0 < self.lr <= 1e6:
            raise TrainingError(f"learning rate {self.lr} is out of range: a positive number")


@dataclass(frozen=True)
class Outcome:
    """What became of a network.

    Attributes:
        plan: What went.
        residual: Largest relative difference from the masked network.
        sizes: What a network costs, ``"dense"`` and ``"pruned"``.
        accuracy: On the test data in percent, by stage, in the order of the stages.
    """

    plan: Plan
    residual: float
    sizes: dict[str, Size]
    accuracy: dict[str, float]


def prune(network: Network, data: DataSet, request: Request, out: Path, stages: Stages) -> Outcome:
    """Score, plan, prune, recalibrate, fine-tune, measure and save a trained network.

    Scores and statistics come from training samples; test samples are only ever measured on.

    Args:
        network: The network; its weights are left as they are.
        data: What it classifies.
        request: What to do.
        out: A folder that is new or empty, for the artifact and ``plan.json``.
        stages: Told what is being done.

    Raises:
        ModelError: The data do not fit the network.
        OutputError: ``out`` is in use.
        PruningError: The target cannot be met.
        TrainingError: A batch of fine-tuning is too small for BatchNorm.
    """
    data = fit_data(network, data)
    data.train.loader(1, seed=0, augment=request.augment)
    here = accelerator()
    model = network.model.to(here.device)
    some = _Calibration(data.train, request)
    example = next(iter(some))[0].to(here.device)
    if request.epochs:
        check_batches(model, data.train, request.batch_size, "batch size")
    choices: dict[str, Any] = {
        "ranking": request.ranking,
        "kinds": request.kinds,
        "round_to": request.round_to,
    }
    check_reachable(model, example[:1], filter(None, [request.target]), **choices)
    _claim(out)
    accuracy: dict[str, float] = {}

    def test(stage: str, tested: nn.Module) -> None:
        with stages.stage(f"accuracy of the {stage} network on {len(data.test)} test samples"):
            quality = measure.quality(tested, data.test.loader(request.batch_size))
        accuracy[stage] = quality.accuracy

    test("dense", model)
    with stages.stage(f"Laplace posterior on {some.samples} training samples"):
        n = len(data.train)
        prior = 1.0 if request.decay is None else request.decay * n
        posterior = fit_posterior(model, some, n_data=n, prior=prior, seed=request.seed)
    aim = "the most evidence"
    if request.target is not None:
        aim = "{} {:g}".format(*request.target.named())
    with stages.stage(f"plan for {aim} by {request.criterion}"):
        chosen = plan(
            model,
            example[:1],
            CRITERIA[request.criterion](model, posterior, data=some, seed=request.seed),
            request.target or Target(evidence=Evidence(model, posterior, some)),
            **choices,
        )
    with stages.stage("pruning, and comparison with the masked network"):
        small = apply(model, chosen)
        residual = verify(model, small, chosen, example)
    test("pruned", small)
    with stages.stage(f"BatchNorm statistics on {some.samples} training samples"):
        layers = recalibrate(small, some)
    if layers:
        test("recalibrated", small)
    else:
        stages.note("there are none")
    if request.epochs:
        with stages.stage(f"fine-tuning for {request.epochs} epochs"):
            _finetune(small, data, request, prior, here, stages)
        test("fine-tuned", small)
    with stages.stage("cost of the dense and the pruned network"):
        sizes = {
            name: measure.size(measured, example[:1], latency_batches=LATENCY_BATCHES)
            for name, measured in (("dense", model), ("pruned", small))
        }
    outcome = Outcome(chosen, residual, sizes, accuracy)
    _save(small, network, data, request, some.samples, outcome, out)
    return outcome


class _Calibration:
    """The same few training samples each time, in batches of about the same size."""

    def __init__(self, train: Split, request: Request):
        self.samples = min(request.calibration, len(train))
        batches = math.ceil(self.samples / request.batch_size)
        self._loader = train.loader(math.ceil(self.samples / batches), seed=request.seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        left = self.samples
        for inputs, targets in self._loader:
            yield inputs[:left], targets[:left]
            left -= len(inputs[:left])
            if not left:
                return


def _claim(out: Path) -> None:
    """Make ``out`` unless it is there; refuse a place that is in use."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} is there and not an empty folder: choose another --out")
    out.mkdir(parents=True, exist_ok=True)


def _finetune(
    small: nn.Module,
    data: DataSet,
    request: Request,
    precision: float,
    here: Accelerator,
    stages: Stages,
) -> None:
    def note(record: EpochRecord) -> None:
        stages.note(f"epoch {record.epoch}: loss {record.loss:.4f}, {record.seconds:.1f} s")

    job = Job(
        train=data.train,
        epochs=request.epochs,
        batch_size=request.batch_size,
        optimiser=Optimiser(name="adam", lr=request.lr, min_lr=0.0),
        seed=request.seed,
        augment=request.augment,
    )
    prior = SpaM(small, len(data.train), prior="scalar", precision=precision, burn_in=None)
    fit(small, ByPrior(prior), job, here, note)


def _save(
    small: nn.Module,
    network: Network,
    data: DataSet,
    request: Request,
    calibration: int,
    outcome: Outcome,
    out: Path,
) -> None:
    dense, pruned = outcome.sizes["dense"], outcome.sizes["pruned"]
    last = list(outcome.accuracy.values())[-1]
    metrics: dict[str, Any] = {
        f"accuracy on {data.name} (%)": {**outcome.accuracy, "saved": last},
        # of the network that came in, as all else here: it may have been pruned before
        "parameters": {"dense": dense.params, "saved": pruned.params},
        "MACs": {"dense": dense.macs, "saved": pruned.macs},
    }
    for batch in LATENCY_BATCHES:
        metrics[f"latency of a batch of {batch} (ms)"] = {
            "dense": 1000 * dense.latency[batch],
            "saved": 1000 * pruned.latency[batch],
        }
    artifact.save(
        small,
        out,
        source=models.source_of(network.model),
        preprocessing=data.preprocessing,
        metrics=metrics,
        base_model=network.base_model,
        licence=network.licence,
        extra={
            "criterion": request.criterion,
            "calibration samples": calibration,
            "fine-tuned epochs": request.epochs,
            "environment": measure.environment(),
            "plan": outcome.plan.summary(),
        },
    )
    write_text(out / PLAN, outcome.plan.to_json())
