"""A whole recipe: all its cells, then the results and the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from torch import nn

from spamprune import models
from spamprune.bayes.curvature import CurvatureMethod, fit_curvature
from spamprune.bayes.parameters import named_parameters
from spamprune.data import DataSet
from spamprune.engine import parallel
from spamprune.engine.bench import initial_model, load_data
from spamprune.engine.cell import accelerator, run_cell
from spamprune.engine.filters import filter_banks
from spamprune.engine.fit import check_batches
from spamprune.engine.forecast import forecast, in_words, posteriors
from spamprune.engine.objective import check_loss, likelihood_of
from spamprune.engine.parallel import Key
from spamprune.engine.progress import Progress
from spamprune.engine.variational import check_reduction
from spamprune.errors import OutputError, PosteriorError, RecipeError
from spamprune.files import write_tensors, write_text
from spamprune.modules import batch_norms
from spamprune.pruning.plan import Target, check_reachable
from spamprune.pruning.semi_structured import semi_structured_masks
from spamprune.recipe import dump, fingerprint, load
from spamprune.recipe.schema import Recipe, SemiStructured, Structured, Training
from spamprune.report import measure, page
from spamprune.report.results import Cell, Results, write_results

#: Runs that are expected to take longer than this say so before they start, seconds.
TOLD_FROM = 120
#: In a run's folder: the recipe and the data that its parts were made by. ``recipe.yaml`` may be
#: edited, and an image folder may change.
_MADE_BY = ".made_by.json"
#: What tells data apart; where they lie, and how that is said, may change.
_FACTS = ("name", "train", "validation", "test", "classes", "shape")


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
        overrides: Changes to a file's settings, such as ``"seeds=[1]"``; only for a file.
        resume: Go on with what ``out`` holds of this same recipe.
        jobs: Processes that work on the recipe's cells side by side.

    Raises:
        SpampruneError: The recipe, data, model, targets or folder cannot be used (nothing was
            written then), or training or writing failed (what was finished is kept).
    """
    if not isinstance(recipe, Recipe):
        recipe = load(recipe, overrides)
    elif overrides:
        raise RecipeError(
            f"overrides {list(overrides)} are for a file, and {recipe.name!r} is a recipe already: "
            "change it, or give its file"
        )
    out = Path("runs") / recipe.name if out is None else Path(out)
    data = load_data(recipe)
    _preflight(recipe, data)
    _claim(recipe, data, out, resume)
    expected = forecast(recipe, data, jobs)
    if expected >= TOLD_FROM:
        done = " less what is finished" if resume else ""
        console = Console(stderr=True, highlight=False, markup=False)
        console.print(f"{recipe.name}: about {in_words(expected)} here{done}")
        for line in posteriors(recipe, data):
            console.print(line)
    keys = [(training, seed) for training in recipe.train for seed in recipe.seeds]
    cells = _run_all(recipe, out, keys, jobs)
    results = Results(
        name=recipe.name,
        description=recipe.description,
        data=_about(data),
        environment=measure.environment() | _arithmetic(recipe),
        train_seconds=sum(cell.train_seconds for cell in cells.values()),
        cells=[cells[key] for key in keys],
    )
    banks = filter_banks(recipe, out, results)
    if banks:
        write_tensors(out / "figures" / "filter_banks.safetensors", banks, {})
    write_results(out, results)
    page.write(out)
    return results


def _preflight(recipe: Recipe, data: DataSet) -> None:
    """Raise for whatever an untrained network already shows to be impossible."""
    model = initial_model(recipe, recipe.seeds[0])
    models.check_fits(model, data.shape, data.classes)
    data.train.loader(1, seed=0, augment=recipe.data.augment)
    tunings = [experiment.finetune for experiment in recipe.prune]
    for stage in (*recipe.train.values(), *filter(None, tunings)):
        check_loss(stage.loss, data.shape)
    _check_norms(recipe, model)
    _check_batches(recipe, data, model)
    _check_curvature(recipe, data, model)
    inputs, _ = next(iter(data.test.loader(1)))
    for training in recipe.train.values():
        if training.gradual is not None:
            target = Target(**training.gradual.target.model_dump())
            check_reachable(model, inputs, [target], **training.gradual.choices())
        settings = training.inference()
        if settings is not None and settings.reduction is not None:
            check_reduction(model)
    for experiment in recipe.prune:
        if isinstance(experiment, Structured):
            asked = [t for t in experiment.targets if t.evidence is None]  # that is always met
            targets = [Target(**target.model_dump()) for target in asked]
            check_reachable(model, inputs, targets, **experiment.choices())
        if isinstance(experiment, SemiStructured):
            anything = {n: p.detach() for n, p in named_parameters(model).items()}
            semi_structured_masks(model, anything, n=experiment.n, m=experiment.m)


def _check_norms(recipe: Recipe, model: nn.Module) -> None:
    """Raise if a recipe says what is to become of BatchNorms, and there are none."""
    if batch_norms(model):
        return
    asked = [f"train.{name}.norms" for name, t in recipe.train.items() if t.norms == "frozen"]
    for index, experiment in enumerate(recipe.prune):
        if experiment.finetune is not None and experiment.finetune.norms == "frozen":
            asked.append(f"prune.{index}.finetune.norms")
        if experiment.recalibrate:
            asked.append(f"prune.{index}.recalibrate")
    if asked:
        raise RecipeError(
            f"{', '.join(asked)}: {recipe.model.name} has no BatchNorm with running statistics: "
            "leave it out"
        )


def _check_batches(recipe: Recipe, data: DataSet, model: nn.Module) -> None:
    """Raise if BatchNorm is to normalise by a last batch of one sample, and cannot."""
    by_batch: list[tuple[str, Training]] = [
        (f"train.{name}", training)
        for name, training in recipe.train.items()
        if training.norms == "train"
        or any(e.recalibrate and e.concerns(name) for e in recipe.prune)
    ]
    for index, experiment in enumerate(recipe.prune):
        tune = experiment.finetune
        anew = isinstance(experiment, Structured) and experiment.scratch is not None
        if tune is not None and (tune.norms == "train" or anew):  # fresh networks freeze no norms
            by_batch.append((f"prune.{index}.finetune", tune))
    for where, settings in by_batch:
        check_batches(model, data.train, settings.batch_size, f"{where}.batch_size")


def _check_curvature(recipe: Recipe, data: DataSet, model: nn.Module) -> None:
    """Raise if the curvature of a training cannot be computed, which one sample tells."""
    fitted: list[tuple[str, Training]] = [
        (f"train.{n}", t) for n, t in recipe.train.items() if t.inference() is None
    ]
    fitted += [
        (f"prune.{i}.finetune", e.finetune)
        for i, e in enumerate(recipe.prune)
        if e.finetune is not None and (e.finetune.method == "spam" or e.iterative)
    ]
    once = {(s.curvature, likelihood_of(s.loss)): where for where, s in reversed(fitted)}
    sample = next(iter(data.train.loader(1)))
    for (curvature, likelihood), where in once.items():
        try:
            fit_curvature(
                model,
                [sample],
                n_data=len(data.train),
                method=CurvatureMethod(**curvature.model_dump()),
                likelihood=likelihood,
            )
        except PosteriorError as error:
            raise PosteriorError(f"{where}.curvature: {error}") from error


def _claim(recipe: Recipe, data: DataSet, out: Path, resume: bool) -> None:
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
        _check_made_by(recipe, data, out)
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} is there and no run's folder: choose another --out")
    if resume:
        raise OutputError(f"nothing to resume: {out} holds no run")
    made_by = {"recipe": recipe.model_dump(mode="json"), "data": _about(data)}
    try:
        write_text(out / _MADE_BY, json.dumps(made_by, indent=1))
        write_text(saved, dump(recipe))
    except OSError:
        (out / _MADE_BY).unlink(missing_ok=True)
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        raise


def _check_made_by(recipe: Recipe, data: DataSet, out: Path) -> None:
    """Raise if other settings or other data made what ``out`` holds."""
    path = out / _MADE_BY
    if not path.exists():  # an earlier version made the folder
        return
    try:
        made_by = json.loads(path.read_text(encoding="utf-8"))
        # the values and not their fingerprint, to which later versions add their defaults
        settings = Recipe.model_validate_json(json.dumps(made_by["recipe"]))
        before = {key: made_by["data"][key] for key in _FACTS}
        before["digest"] = made_by["data"].get("digest", data.digest)  # earlier versions had none
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} is damaged: choose another --out") from error
    if fingerprint(settings) != fingerprint(recipe):
        raise OutputError(
            f"{out / 'recipe.yaml'} was changed after results were made by it: choose another "
            "--out, or undo the change"
        )
    now = {**_about(data), "digest": data.digest}
    changed = [f"{k} was {was}, is {now[k]}" for k, was in before.items() if was != now[k]]
    if changed:
        raise OutputError(
            f"{out} holds results on other data ({'; '.join(changed)}): choose another --out, or "
            "bring the data back"
        )


def _run_all(recipe: Recipe, out: Path, keys: list[Key], jobs: int) -> dict[Key, Cell]:
    with Progress(recipe, len(keys)) as progress:
        if jobs > 1:
            return parallel.run_cells(recipe, out, keys, jobs, progress)
        cells = {}
        for training, seed in keys:
            report = partial(progress.epoch, training, seed)
            cells[training, seed] = run_cell(recipe, training, seed, out, report)
            progress.cell_done(training, seed)
        return cells


def _arithmetic(recipe: Recipe) -> dict[str, str]:
    mixed = accelerator(recipe.arithmetic).mixed_precision
    precision = {"no": "fp32"}.get(mixed, mixed)
    return {"threads": str(recipe.threads), "precision of training": precision}


def _about(data: DataSet) -> dict[str, object]:
    digest = {} if data.digest is None else {"digest": data.digest}
    return {
        "name": data.name,
        "train": len(data.train),
        "validation": len(data.validation) if data.validation else 0,
        "test": len(data.test),
        "classes": data.classes,
        "shape": list(data.shape),
        "source": data.source,
        "deviations": list(data.deviations),
        **digest,
    }
