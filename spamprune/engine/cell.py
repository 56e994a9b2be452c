"""One cell of a recipe: one way of training with one seed, and all that is pruned from it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from spamprune import artifact
from spamprune.engine import semi_structured, structured, unstructured
from spamprune.engine.bench import Bench, OnEpoch, initial_model, load_data
from spamprune.engine.subject import Subject
from spamprune.engine.training import train
from spamprune.errors import TrainingError
from spamprune.recipe.schema import Arithmetic, Recipe
from spamprune.report.results import Cell


def run_cell(
    recipe: Recipe,
    training: str,
    seed: int,
    out: Path,
    on_epoch: OnEpoch = lambda stage, record: None,
) -> Cell:
    """Train, prune, fine-tune and measure; finished parts found in ``out`` are not done again.

    Args:
        recipe: The experiment.
        training: Name of one of its trainings.
        seed: One of its seeds.
        out: The run's folder.
        on_epoch: Called with the stage's name after each epoch of any training in it.
    """
    here = accelerator(recipe.arithmetic)
    bench = Bench(recipe, training, seed, out, load_data(recipe), here, on_epoch)
    bench.folder.mkdir(parents=True, exist_ok=True)
    with _arithmetic(recipe.threads):
        return bench.once("cell", Cell, lambda: _run(bench))


def accelerator(arithmetic: Arithmetic = Arithmetic()) -> Accelerator:  # noqa: B008 - frozen
    """Return the device and precision that networks are trained with.

    Raises:
        TrainingError: The process was launched in a way that training does not support.
    """
    gpu = torch.cuda.is_available()
    precision = {"fp32": "no", "bf16": "bf16", "auto": "bf16" if gpu else "no"}[
        arithmetic.precision
    ]
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", precision):
        raise TrainingError(
            f"launched with mixed precision {launched!r}: a recipe's arithmetic.precision chooses "
            "it, so launch with 'no'"
        )
    AcceleratorState._reset_state()  # which else keeps the precision of a process's first recipe
    # Apple's MPS lacks the double precision that evidence and metrics are summed in
    found = Accelerator(cpu=not gpu, mixed_precision=precision)
    if found.num_processes > 1:
        raise TrainingError(
            f"launched as {found.num_processes} processes, which would all do the same work: "
            "run one, with --jobs for several cells at once"
        )
    return found


@contextmanager
def _arithmetic(threads: int) -> Iterator[None]:
    """Compute with this many threads, and with the tiniest numbers taken for zero."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # weights on their way to zero would slow every product
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_flush_denormal(False)


def _run(bench: Bench) -> Cell:
    trained = train(bench, initial_model(bench.recipe, bench.seed).to(bench.accelerator.device))
    model, posterior = trained.model, trained.posterior
    subject = Subject(bench, model, posterior, trained.masks)
    validation = bench.data.validation
    inference = trained.inference
    pruned = trained.online or trained.gradual or (inference and inference.sparsity > 0)
    if pruned:
        artifact.save(model, bench.folder / "trained", preprocessing=bench.data.preprocessing)
    return Cell(
        training=bench.training,
        method=bench.config.method,
        seed=bench.seed,
        folder=bench.relative,
        dense=bench.quality(model, bench.data.test),
        validation=bench.quality(model, validation) if validation else None,
        size=bench.size(model),
        log_evidence=posterior.log_evidence,
        train_seconds=sum(record.seconds for record in trained.history),
        history=trained.history,
        masked=list(unstructured.run(subject)),
        patterned=list(semi_structured.run(subject)),
        compacted=list(structured.run(subject)),
        online=trained.online,
        gradual=trained.gradual,
        inference=inference,
        artifact=f"{bench.relative}/trained" if pruned else None,
    )
