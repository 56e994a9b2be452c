"""A whole recipe: all its cells, then the results and the report."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from spamprune import models
from spamprune.data import DataSet
from spamprune.engine.bench import create_model, load_data
from spamprune.engine.cell import run_cell
from spamprune.engine.filters import filter_banks
from spamprune.engine.progress import Progress
from spamprune.errors import OutputError
from spamprune.files import write_tensors, write_text
from spamprune.recipe import dump, fingerprint, load
from spamprune.recipe.schema import Recipe
from spamprune.report import measure, page
from spamprune.report.results import Cell, Results, write_results

Key = tuple[str, int]


def run(
    recipe: Recipe | str | Path,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    jobs: int = 1,
) -> Results:
    """Run a recipe and leave its results, models and report in ``out``.

    Args:
        recipe: What to do: a recipe, a file, or the name of a bundled recipe.
        out: Folder for everything that the run leaves; by default ``runs/<name>``.
        overrides: Changes to a file's settings, such as ``"seeds=[1]"``.
        resume: Go on with what ``out`` holds of this same recipe.
        jobs: Processes that work on the recipe's cells side by side.

    Raises:
        SpampruneError: The recipe, data, model or folder cannot be used; nothing was written then.
    """
    if not isinstance(recipe, Recipe):
        recipe = load(recipe, overrides)
    out = Path("runs") / recipe.name if out is None else Path(out)
    started = time.perf_counter()
    data = load_data(recipe)
    models.check_fits(create_model(recipe, recipe.seeds[0]), data.shape, data.classes)
    _claim(recipe, out, resume)
    keys = [(training, seed) for training in recipe.train for seed in recipe.seeds]
    cells = _run_all(recipe, out, keys, jobs)
    results = Results(
        name=recipe.name,
        description=recipe.description,
        data=_about(data),
        environment=measure.environment(),
        seconds=time.perf_counter() - started,
        cells=[cells[key] for key in keys],
    )
    banks = filter_banks(recipe, out, results)
    if banks:
        write_tensors(out / "figures" / "filter_banks.safetensors", banks, {})
    write_results(out, results)
    page.write(out)
    return results


def _claim(recipe: Recipe, out: Path, resume: bool) -> None:
    """Make ``out`` this recipe's folder, or refuse when it is something else's."""
    saved = out / "recipe.yaml"
    if saved.exists():
        if fingerprint(load(saved)) != fingerprint(recipe):
            raise OutputError(
                f"{out} holds results of another recipe or other settings: choose another --out"
            )
        if not resume:
            raise OutputError(
                f"{out} already holds this recipe's results: go on with --resume, or choose "
                "another --out"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} is there and no run's folder: choose another --out")
    if resume:
        raise OutputError(f"nothing to resume: {out} holds no run")
    out.mkdir(parents=True, exist_ok=True)
    write_text(saved, dump(recipe))


def _run_all(recipe: Recipe, out: Path, keys: list[Key], jobs: int) -> dict[Key, Cell]:
    with Progress(recipe, len(keys)) as progress:
        if jobs == 1:
            cells = {}
            for training, seed in keys:
                report = progress.of_cell(training, seed)
                cells[training, seed] = run_cell(recipe, training, seed, out, report)
                progress.cell_done()
            return cells
        with _workers(min(jobs, len(keys))) as pool:
            futures = {
                pool.submit(_work, recipe.model_dump_json(), training, seed, str(out)): (
                    training,
                    seed,
                )
                for training, seed in keys
            }
            cells = {}
            for future in as_completed(futures):
                cells[futures[future]] = Cell.model_validate_json(future.result())
                progress.cell_done()
            return cells


@contextmanager
def _workers(count: int) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        count, mp_context=context, initializer=_die_with, initargs=(os.getpid(),)
    )
    try:
        yield pool
        pool.shutdown()
    finally:  # after an error, what has not begun is dropped
        pool.shutdown(cancel_futures=True)


def _die_with(parent: int) -> None:
    """End this worker soon after the run is killed, so that it never races a resumed one."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(recipe: str, training: str, seed: int, out: str) -> str:
    """Run one cell in a worker process; strings in and out keep the two sides independent."""
    cell = run_cell(Recipe.model_validate_json(recipe), training, seed, Path(out))
    return cell.model_dump_json()


def _about(data: DataSet) -> dict[str, object]:
    return {
        "name": data.name,
        "train": len(data.train),
        "validation": len(data.validation) if data.validation else 0,
        "test": len(data.test),
        "classes": data.classes,
        "shape": list(data.shape),
        "source": data.source,
        "deviations": list(data.deviations),
    }
