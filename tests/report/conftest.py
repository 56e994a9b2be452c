"""Made-up results of the shape that a run writes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from spamprune.recipe import dump
from spamprune.recipe.schema import Recipe
from spamprune.report.merge import measured
from spamprune.report.results import (
    Cell,
    Compacted,
    EpochRecord,
    Masked,
    Quality,
    Results,
    Size,
    write_results,
)

SPARSITIES = (0.2, 0.5, 0.8, 0.9, 0.95, 0.99)
ENVIRONMENT = {"python": "3.11.7", "torch": "2.6.0", "cpu": "A & B <processor>", "cores": "2"}


def _quality(accuracy: float) -> Quality:
    accuracy = max(accuracy, 10.0)
    error = 100 - accuracy
    return Quality(accuracy=accuracy, nll=error / 30, ece=error / 400, brier=error / 60)


def _size(share: float) -> Size:
    params = int(60_170 * share)
    return Size(
        params=params,
        nonzero=params,
        macs=int(231_720 * share**0.9),
        bytes=4 * params,
        artifact_bytes=4 * params + 2_000,
        latency={1: 2e-4 * (0.5 + share), 128: 5e-3 * (0.2 + share)},
        threads=1,
    )


def _history(method: str, seed: int, epochs: int) -> list[EpochRecord]:
    return [
        EpochRecord(
            epoch=epoch,
            loss=2 * math.exp(-epoch / 8) + 0.1 + 0.02 * seed,
            lr=0.1,
            seconds=1.5,
            validation_accuracy=90 - 40 * math.exp(-epoch / 6) + seed,
            log_evidence=-9e4 * math.exp(-epoch / 9) - 2e4
            if method == "spam" and epoch % 5 == 0
            else None,
        )
        for epoch in range(1, epochs + 1)
    ]


def _masked(fragility: float, finetuned: bool, criteria: tuple[str, ...]) -> list[Masked]:
    return [
        Masked(
            experiment=0,
            criterion=criterion,
            requested=s,
            achieved=s,
            nonzero=round((1 - s) * 60_170),
            artifact=f"map/seed0/prune0-{criterion}-{s}",
            pruned=_quality(90 - 60 * fragility * (1 + 0.4 * i) * s**6),
            finetuned=_quality(90 - 25 * fragility * (1 + 0.4 * i) * s**6) if finetuned else None,
        )
        for i, criterion in enumerate(criteria)
        for s in SPARSITIES
    ]


def _compacted(fragility: float, folder: str, criteria: tuple[str, ...]) -> list[Compacted]:
    return [
        Compacted(
            experiment=1,
            criterion=criterion,
            ranking=ranking,
            target={"macs": share},
            achieved={"macs": share * 0.97},
            notes=["conv1: at its minimum of 1 unit"] if share < 0.1 else [],
            widths={"conv1": 3, "conv2": 7, "conv3": 31, "fc": 20},
            residual=3e-7,
            size=_size(share * (1 + 0.1 * j)),
            pruned=_quality(90 - 4 * fragility / share**0.9 - i),
            finetuned=_quality(90 - 0.25 * fragility / share**0.8 - i / 2),
            scratch=_quality(89 - 0.5 / share**0.7 - i / 2),
            artifact=f"{folder}/artifacts/{criterion}-{ranking}-{share}",
        )
        for i, criterion in enumerate(criteria)
        for j, ranking in enumerate(("uniform", "global"))
        for share in (0.5, 0.2, 0.1, 0.05)
    ]


@pytest.fixture(scope="session")
def make_results() -> Callable[..., Results]:
    """Return a function that makes results: trainings × seeds, with or without pruning."""

    def make(
        trainings: dict[str, Literal["spam", "map"]] | None = None,
        seeds: int = 2,
        *,
        masked: bool = True,
        compacted: bool = True,
        finetuned: bool = True,
        criteria: tuple[str, ...] = ("opd", "magnitude"),
        epochs: int = 30,
    ) -> Results:
        if trainings is None:
            trainings = {"map": "map", "spam-unitwise": "spam"}
        cells = []
        for name, method in trainings.items():
            for seed in range(seeds):
                fragility = (1.0 if method == "map" else 0.4) * (1 + 0.2 * seed)
                folder = f"cells/{name}-{seed}"
                cells.append(
                    Cell(
                        training=name,
                        method=method,
                        seed=seed,
                        folder=folder,
                        dense=_quality(90 - 0.3 * seed),
                        validation=_quality(89.5),
                        size=_size(1.0),
                        log_evidence=-21_345.6 - (9_000 if method == "map" else 0),
                        train_seconds=45.0 + seed,
                        history=_history(method, seed, epochs),
                        masked=_masked(fragility, finetuned, criteria) if masked else [],
                        compacted=_compacted(fragility, folder, criteria) if compacted else [],
                    )
                )
        return Results(
            name="lenet_fmnist",
            description="LeNet on Fashion-MNIST, with <tags> & ampersands. Takes 20 minutes.",
            data={"name": "fashion_mnist", "train": 54_000, "validation": 6_000, "test": 10_000},
            environment=ENVIRONMENT,
            train_seconds=1234.5,
            cells=cells,
        )

    return make


def _recipe(name: str, threads: int, results: Results) -> dict[str, Any]:
    """Return the recipe that could have given ``results``."""
    cells = results.cells
    masked = {m.criterion: None for cell in cells for m in cell.masked}
    compacted = {c.criterion: None for cell in cells for c in cell.compacted}
    prune: list[dict[str, Any]] = [
        {"kind": "unstructured", "criteria": list(masked) or ["opd"]},
        {
            "kind": "structured",
            "criteria": list(compacted) or ["opd"],
            "targets": [{"macs": share} for share in (0.5, 0.2, 0.1, 0.05)],
        },
    ]
    return {
        "name": name,
        "seeds": list({cell.seed: None for cell in cells}),
        "threads": threads,
        "data": {"name": "fashion_mnist"},
        "model": {"name": "lenet"},
        "train": {cell.training: {"method": cell.method} for cell in cells},
        "prune": prune,
    }


@pytest.fixture
def make_run(
    make_results: Callable[..., Results], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Return a function that writes a finished run into a folder of the current one.

    ``changes`` are to the recipe, ``data`` and ``environment`` to the results; ``keep`` names the
    criteria that are left; ``worse`` lowers the accuracy of the unpruned networks; ``reverse``
    turns the experiments round.
    """
    monkeypatch.chdir(tmp_path)

    def make(
        folder: str,
        *,
        first_seed: int = 0,
        name: str = "lenet_fmnist",
        threads: int = 1,
        changes: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
        keep: tuple[str, ...] | None = None,
        worse: float = 0.0,
        reverse: bool = False,
        **arguments: Any,
    ) -> str:
        results = make_results(**arguments)
        results.data |= data or {}
        results.environment = results.environment | (environment or {})
        for cell in results.cells:
            cell.seed += first_seed
            cell.dense.accuracy -= worse
            if keep is not None:
                cell.masked = [m for m in cell.masked if m.criterion in keep]
        recipe = _recipe(name, threads, results)
        if reverse:
            recipe["prune"].reverse()
            for record in (r for cell in results.cells for r in measured(cell)):
                record.experiment = 1 - record.experiment
        for path, value in (changes or {}).items():
            *parents, last = path.split(".")
            holder: Any = recipe
            for key in parents:
                holder = (
                    holder[int(key)] if isinstance(holder, list) else holder.setdefault(key, {})
                )
            holder[last] = value
        write_results(Path(folder), results)
        checked = Recipe.model_validate(recipe)
        Path(folder, "recipe.yaml").write_text(dump(checked), encoding="utf-8")
        return folder

    return make
