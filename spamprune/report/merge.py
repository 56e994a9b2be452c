"""Several finished runs as one: their seeds and methods side by side, if they can be compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from spamprune.errors import OutputError
from spamprune.recipe import load
from spamprune.recipe.schema import Recipe, Train, Unstructured
from spamprune.report.results import (
    Cell,
    Compacted,
    Masked,
    Patterned,
    Quality,
    Results,
    read_results,
)
from spamprune.report.summary import criterion_of

Measured: TypeAlias = Masked | Patterned | Compacted

_SAME_DATA = ("name", "train", "validation", "test", "classes", "shape", "deviations")
# what distinguishes rows of one table; experiments that agree in all else share a table
_OWN_ROWS = {
    *("criteria", "sparsities", "rounds", "n", "m"),
    *("ranking", "targets", "trainings", "compensate"),
}
_STEPS = {"sparsities", "targets"}  # of iterative experiments: each depends on those before


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    recipe: Recipe
    results: Results

    @property
    def name(self) -> str:
        """Return the folder's own name, also where the path to it is "."."""
        return self.folder.resolve().name


@dataclass(frozen=True)
class Method:
    """A way of training a network, the same in all runs that have it."""

    model: str
    train: Train

    @property
    def hessian(self) -> str:
        """Return what the posterior's curvature is like, in the paper's words."""
        if self.train.method == "variational":
            return "Mean field"
        return {"diag": "Diag", "kron": "KFAC"}[self.train.curvature.structure]

    @property
    def prior(self) -> str:
        """Return what the prior is like."""
        settings = self.train.inference()
        if settings is not None:
            return settings.prior
        return "MAP" if self.train.method == "map" else self.train.prior.structure


@dataclass(frozen=True)
class Merged:
    """Comparable runs.

    Attributes:
        runs: As they were given.
        results: All their measurements; each seed of a training is one cell, and experiments
            are numbered over all runs.
        methods: By the name that the cells' ``training`` has.
        origins: Where each experiment is written first, such as "prune.0 of runs/lenet".
    """

    runs: list[Run]
    results: Results
    methods: dict[str, Method]
    origins: list[str]


def merge(folders: Sequence[str | Path]) -> Merged:
    """Merge finished runs on the same data.

    Trainings that have the same name and the same settings, the model's and the augmentation's
    included, are one method, over whose seeds there is a mean; what several runs have of one
    seed counts once. Those with the same name and other settings are told apart by their run's
    folder.

    Args:
        folders: Those of the runs; at least one.

    Raises:
        OutputError: A run is not finished, is on other data or another split, or got something
            else than another one from the same seed.
        RecipeError: A run's recipe is not one of this version of spamprune.
    """
    if not folders:
        raise OutputError("nothing to compare: give the folder of a finished run")
    runs = [_read(Path(folder)) for folder in folders]
    for run in runs[1:]:
        _check_comparable(runs[0], run)
    names = _names(runs)
    experiments: dict[str, str] = {}  # settings → origin
    for run in runs:
        for i in range(len(run.recipe.prune)):
            experiments.setdefault(_settings(run, i), f"prune.{i} of {run.folder}")
    numbers = {settings: number for number, settings in enumerate(experiments)}
    cells: dict[tuple[str, int], tuple[Run, Cell]] = {}
    for run in runs:
        places = [numbers[_settings(run, i)] for i in range(len(run.recipe.prune))]
        for cell in run.results.cells:
            named = _renamed(run, cell, names[_identity(run, cell.training)], places)
            key = (named.training, named.seed)
            cells[key] = (run, _joined(*cells[key], run, named) if key in cells else named)
    results = Results(
        name="comparison",
        description="",
        data=runs[0].results.data,
        environment={},
        train_seconds=sum(cell.train_seconds for _, cell in cells.values()),
        cells=[cell for _, cell in cells.values()],
    )
    return Merged(runs, results, dict(_methods(runs, names)), list(experiments.values()))


def _read(folder: Path) -> Run:
    results = read_results(folder)
    return Run(folder, load(folder / "recipe.yaml"), results)


def _check_comparable(first: Run, other: Run) -> None:
    """Raise unless both runs were measured on the same samples in the same way."""

    def facts(run: Run) -> dict[str, object]:
        data = run.results.data
        keys: tuple[str, ...] = _SAME_DATA
        if run.recipe.data.name == "image_folder":  # its name does not say which data it is
            both = all("digest" in r.results.data for r in (first, other))  # earlier runs had none
            keys = (*keys, "digest" if both else "source")
        found = {f"data.{key}": data.get(key) for key in keys}
        return {**found, "evaluate.bins": run.recipe.evaluate.bins}

    there = facts(other)
    for name, value in facts(first).items():
        if there.get(name) != value:
            raise OutputError(
                f"{other.folder} cannot be compared with {first.folder}: its {name} is "
                f"{there.get(name)!r}, not {value!r}: compare runs on the same data and split"
            )


_Identity = tuple[str, str]  # a training's name, and all settings that shape its networks


def _identity(run: Run, training: str) -> _Identity:
    recipe = run.recipe
    sections = (recipe.model, recipe.arithmetic, recipe.train[training])
    settings = (section.model_dump_json() for section in sections)
    return training, "\n".join((recipe.data.augment, *settings))


def _names(runs: Sequence[Run]) -> dict[_Identity, str]:
    """Return a name for each training; one that several have is told apart by the run's folder."""
    first: dict[_Identity, Run] = {}
    for run in runs:
        for training in run.recipe.train:
            first.setdefault(_identity(run, training), run)
    own = [training for training, _ in first]
    short = len({run.name for run in runs}) == len(runs)
    return {
        (training, settings): f"{training} ({run.name if short else run.folder})"
        if own.count(training) > 1
        else training
        for (training, settings), run in first.items()
    }


def _methods(runs: Sequence[Run], names: dict[_Identity, str]) -> Iterator[tuple[str, Method]]:
    for run in runs:
        model = run.recipe.model
        arguments = ", ".join(f"{key}={value}" for key, value in model.kwargs.items())
        shown = f"{model.name}({arguments})" if arguments else model.name
        for training, train in run.recipe.train.items():
            yield names[_identity(run, training)], Method(shown, train)


def _settings(run: Run, index: int) -> str:
    """Return what experiments of one table share; two of one run with the same share it too."""
    experiment = run.recipe.prune[index]
    own_rows = _OWN_ROWS - _STEPS if experiment.iterative else _OWN_ROWS
    return experiment.model_dump_json(exclude=own_rows)


def _renamed(run: Run, cell: Cell, name: str, places: Sequence[int]) -> Cell:
    """Return ``cell`` under a training's name over all runs, with experiments numbered so too."""

    def moved(record: Measured) -> dict[str, int]:
        return {"experiment": places[record.experiment]}

    def scored(record: Masked) -> dict[str, int]:  # which earlier versions did not write down
        experiment = run.recipe.prune[record.experiment]
        rounds = experiment.rounds if isinstance(experiment, Unstructured) else 1
        return {**moved(record), "rounds": rounds}

    masked = {_key(m): m for m in (m.model_copy(update=scored(m)) for m in cell.masked)}
    patterned = {_key(p): p for p in (p.model_copy(update=moved(p)) for p in cell.patterned)}
    compacted = {_key(c): c for c in (c.model_copy(update=moved(c)) for c in cell.compacted)}
    return cell.model_copy(
        update={
            "training": name,
            "masked": list(masked.values()),
            "patterned": list(patterned.values()),
            "compacted": list(compacted.values()),
        }
    )


def measured(cell: Cell) -> list[Measured]:
    """Return all that was pruned from a cell's network."""
    return [*cell.masked, *cell.patterned, *cell.compacted]


def _key(record: Measured) -> tuple[object, ...]:
    """Return what identifies a measurement among those of its cell."""
    if isinstance(record, Masked):
        asked = record.requested if record.chosen is None else "evidence"
        return record.kind, record.experiment, criterion_of(record), asked
    if isinstance(record, Patterned):
        return record.kind, record.experiment, record.criterion, record.pattern
    target = tuple(record.target.items())
    way = (record.criterion, record.compensated, record.ranking)
    return record.kind, record.experiment, *way, target


def _joined(run: Run, cell: Cell, other_run: Run, other: Cell) -> Cell:
    """Return one cell with what two runs measured of the same training and seed.

    Raises:
        OutputError: They got different networks, whose mean would count the seed twice.
    """
    known: dict[tuple[object, ...], Measured] = {_key(r): r for r in measured(cell)}
    again = [(known[_key(r)], r) for r in measured(other) if _key(r) in known]
    if cell.dense != other.dense or any(_outcome(a) != _outcome(b) for a, b in again):
        raise OutputError(
            f"seed {cell.seed} of training {cell.training!r} is in {run.folder} and in "
            f"{other_run.folder}, with different results, as on other hardware or with another "
            "version: leave one run out, or run it with other seeds"
        )
    return cell.model_copy(
        update={
            "masked": [*cell.masked, *(m for m in other.masked if _key(m) not in known)],
            "patterned": [*cell.patterned, *(p for p in other.patterned if _key(p) not in known)],
            "compacted": [*cell.compacted, *(c for c in other.compacted if _key(c) not in known)],
        }
    )


def _outcome(record: Measured) -> tuple[Quality | None, ...]:
    scratch = record.scratch if isinstance(record, Compacted) else None
    return record.pruned, record.finetuned, scratch
