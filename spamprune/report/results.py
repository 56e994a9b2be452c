"""The shape of ``results.json``: what a run measured, as data that any program can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from spamprune.errors import OutputError
from spamprune.files import write_text

RESULTS = "results.json"
#: iterative: pruned from the fine-tuned network of the step before.
Schedule = Literal["one_shot", "iterative"]


class Record(BaseModel):
    """A part of the results."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class Quality(Record):
    """How well a network predicts the test data, at its point estimate."""

    accuracy: float  # percent
    nll: float  # nats per sample
    ece: float  # 0..1, equal-width bins
    quantile_ece: float | None = None  # the same with 20 bins of equal counts
    brier: float  # sum over classes, 0..2


class Size(Record):
    """What a network costs."""

    params: int
    nonzero: int
    macs: int  # of one sample
    bytes: int  # of the parameters
    artifact_bytes: int | None = None  # of the files on disk
    latency: dict[int, float] = {}  # batch size → median seconds of a forward pass
    threads: int = 1


class ByEvidence(Record):
    """A sparsity that the evidence chose."""

    effective: float  # γ, how many parameters the data determine: no fewer weights are kept
    before: float  # log evidence in nats, of the whole network
    after: float  # of the pruned one
    pruned: dict[str, float]  # layer → fraction of its weights
    notes: list[str]  # when to look twice


class Masked(Record):
    """One unstructured pruning of a trained network."""

    kind: Literal["unstructured"] = "unstructured"
    experiment: int  # its position in the recipe's `prune`
    schedule: Schedule = "one_shot"
    criterion: str
    rounds: int = 1  # how often weights were scored on the way
    requested: float  # where the evidence chose: as achieved
    achieved: float
    chosen: ByEvidence | None = None
    nonzero: int
    pruned: Quality
    finetuned: Quality | None = None
    artifact: str  # folder, relative to the run's


class Patterned(Record):
    """One semi-structured pruning of a trained network."""

    kind: Literal["semi_structured"] = "semi_structured"
    experiment: int
    criterion: str
    pattern: str  # such as "2:4": of each four weights two stay
    achieved: float  # fraction of all weights that are zero
    nonzero: int
    notes: list[str]  # matrices left whole or stored densely, with the reason
    pruned: Quality
    finetuned: Quality | None = None
    half_latency: dict[int, float] = {}  # on a GPU, in half precision: batch size → seconds
    compressed_latency: dict[int, float] = {}  # the same with torch's compressed 2:4 weights
    artifact: str  # folder, relative to the run's


class Compacted(Record):
    """One structured pruning of a trained network."""

    kind: Literal["structured"] = "structured"
    experiment: int
    schedule: Schedule = "one_shot"
    criterion: str
    compensated: bool = False  # whether the weights that stay made up for those that went
    ranking: Literal["uniform", "global", "per_cost", "isomorphic"]
    target: dict[str, float]  # such as {"macs": 0.1}
    achieved: dict[str, float]  # the same keys: what was reached
    notes: list[str]  # layers kept whole or at their minimum, with the reason
    widths: dict[str, int]  # layer → units kept
    residual: float  # largest relative difference from the masked network
    size: Size
    pruned: Quality  # right after the step
    finetuned: Quality | None = None
    scratch: Quality | None = None  # the same architecture trained from fresh weights
    artifact: str  # folder, relative to the run's


class Reduced(Record):
    """One Bayesian model reduction of a network in training; fractions are of its weights."""

    proposed: float  # what ΔF and the layers' odds would have held at zero
    sparsity: float  # what is, since the evidence was measured not to fall
    pruned: dict[str, float]  # layer → fraction
    before: float  # evidence lower bound in nats, before it
    after: float


class EpochRecord(Record):
    """One epoch of training: a line of ``metrics.jsonl``."""

    epoch: int
    loss: float  # mean training loss in nats
    lr: float
    seconds: float
    validation_accuracy: float | None = None  # percent
    log_evidence: float | None = None  # nats, after this epoch's update
    log_precision: list[float] | None = None  # mean log δ of each parameter tensor
    reduced: Reduced | None = None


class OnlineCut(Record):
    """One step of masks that grow during training."""

    epoch: int  # the cut follows it
    criterion: str
    held: bool  # whether pruned weights stay zero
    sparsity: float
    pruned: Quality  # right after the cut
    trained: Quality | None = None  # right before the next cut, or at the end; only if held


class GradualCut(Record):
    """One step of units that go during training; fractions are of the dense network."""

    epoch: int  # the cut follows it
    criterion: str
    ranking: Literal["uniform", "global", "per_cost", "isomorphic"]
    target: dict[str, float]  # such as {"macs": 0.4}
    achieved: dict[str, float]  # the same key: what was reached
    notes: list[str]  # on layers; fractions here are of the network before this cut
    widths: dict[str, int]  # layer → units kept
    residual: float  # largest relative difference from the masked network
    size: Size
    pruned: Quality  # right after the cut
    trained: Quality | None = None  # right before the next cut, or at the end


class Inference(Record):
    """What mean-field inference gives besides the network at its posterior means."""

    draws: int
    averaged: Quality  # of predictions averaged over so many draws of the weights
    sparsity: float  # fraction of the weights that are held at zero
    pruned: dict[str, float]  # the same by layer


class Cell(Record):
    """One training with one seed, and all that was pruned from it."""

    training: str
    method: Literal["spam", "map", "variational"]
    seed: int
    folder: str  # relative to the run's
    dense: Quality
    validation: Quality | None
    size: Size
    log_evidence: float
    train_seconds: float
    history: list[EpochRecord]
    masked: list[Masked]
    patterned: list[Patterned] = []
    compacted: list[Compacted]
    online: list[OnlineCut] = []
    gradual: list[GradualCut] = []
    inference: Inference | None = None
    artifact: str | None = None  # of a network pruned in training: folder, relative to the run's


class Results(Record):
    """Everything a run measured."""

    name: str
    description: str
    data: dict[str, Any]  # name, sizes of the splits, classes, where it came from
    environment: dict[str, str]  # versions and hardware
    train_seconds: float  # of all cells together, without pruning and fine-tuning
    cells: list[Cell]


def write_results(folder: Path, results: Results) -> Path:
    """Write ``results.json`` into ``folder``, atomically, and return its path."""
    path = folder / RESULTS
    write_text(path, results.model_dump_json(indent=1) + "\n")
    return path


def read_results(folder: Path) -> Results:
    """Read the ``results.json`` in ``folder``.

    Raises:
        OutputError: The file is missing, damaged or of another version.
    """
    path = folder / RESULTS
    try:
        return Results.model_validate_json(path.read_bytes())
    except OSError as error:
        raise OutputError(
            f"cannot read {path}: {error.strerror}: give the folder of a finished run"
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise OutputError(
            f"{path} is damaged or of another version of spamprune: {where}: {first['msg']}: "
            "run the recipe again"
        ) from error
