"""Working on several cells of a recipe at once, in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TypeAlias

from spamprune.engine.cell import run_cell
from spamprune.engine.progress import Progress
from spamprune.errors import TrainingError
from spamprune.recipe.schema import Recipe
from spamprune.report.results import Cell, EpochRecord

Key = tuple[str, int]
Epochs: TypeAlias = "Queue[tuple[str, int, str, str] | None]"

_epochs: Epochs | None = None  # of a worker: where it reports its epochs


def run_cells(
    recipe: Recipe, out: Path, keys: list[Key], jobs: int, progress: Progress
) -> dict[Key, Cell]:
    """Run the cells ``keys`` in ``jobs`` processes; they give what one process would.

    After an error or an interrupt all workers stop at once: what they had is resumed from.

    Raises:
        TrainingError: A worker died, as it does when memory runs out.
    """
    context = multiprocessing.get_context("spawn")
    epochs: Epochs = context.Queue()
    stop = context.Event()
    listener = threading.Thread(target=_listen, args=(epochs, progress), daemon=True)
    listener.start()
    pool = ProcessPoolExecutor(
        min(jobs, len(keys)),
        mp_context=context,
        initializer=_start_worker,
        initargs=(os.getpid(), stop, epochs),
    )
    cells = {}
    try:
        work = {pool.submit(_work, recipe.model_dump_json(), *key, str(out)): key for key in keys}
        for future in as_completed(work):
            cells[work[future]] = Cell.model_validate_json(future.result())
            progress.cell_done(*work[future])
    except BrokenProcessPool as error:
        raise TrainingError(
            "a worker died, perhaps for want of memory: go on with --resume and fewer --jobs"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        epochs.put(None)
        listener.join()
    return cells


def _listen(epochs: Epochs, progress: Progress) -> None:
    while (item := epochs.get()) is not None:
        training, seed, stage, record = item
        progress.epoch(training, seed, stage, EpochRecord.model_validate_json(record))


def _start_worker(parent: int, stop: Event, epochs: Epochs) -> None:
    """Prepare a worker, which ends soon after its run does, however that ends."""
    global _epochs
    _epochs = epochs
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run decides what an interrupt means

    def watch() -> None:
        while os.getppid() == parent and not stop.is_set():
            time.sleep(0.2)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def _work(recipe: str, training: str, seed: int, out: str) -> str:
    """Run one cell in a worker; strings in and out keep the two sides independent."""

    def report(stage: str, record: EpochRecord) -> None:
        if _epochs is not None:
            _epochs.put((training, seed, stage, record.model_dump_json()))

    cell = run_cell(Recipe.model_validate_json(recipe), training, seed, Path(out), report)
    return cell.model_dump_json()
