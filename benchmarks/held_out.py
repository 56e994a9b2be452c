"""A recipe's trainings judged on training images that were held out, to choose settings by.

``python benchmarks/held_out.py RECIPE [TRAINING ...] [OVERRIDE ...]`` trains on nine tenths of the
training data with the first seed, in all ways or those named, prunes one-shot by OPD and by
magnitude without fine-tuning, and prints accuracy on the other tenth. Test data are not touched. An
override is one of ``spamprune run``, such as ``train.diag-unitwise.temperature=2``.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from spamprune import scores
from spamprune.engine.bench import Bench, create_model, load_data
from spamprune.engine.cell import accelerator
from spamprune.engine.training import train
from spamprune.pruning.masks import apply_masks, global_masks
from spamprune.recipe import Recipe, load

SPARSITIES = (0.8, 0.9, 0.95, 0.97, 0.98, 0.99)


def accuracies(recipe: Recipe, training: str, criteria: Sequence[str]) -> list[float]:
    """Train one network; return its accuracy in percent, dense and masked by each criterion."""
    seed = recipe.seeds[0]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        (out / training / f"seed{seed}").mkdir(parents=True)
        data = load_data(recipe)
        bench = Bench(recipe, training, seed, out, data, accelerator(), lambda *_: None)
        trained = train(bench, create_model(recipe, seed).to(bench.accelerator.device))
    model, held_out = trained.model, bench.data.validation
    if held_out is None:
        raise SystemExit("nothing is held out: set data.validation")
    found = [bench.quality(model, held_out).accuracy]
    for criterion in criteria:
        values = scores.CRITERIA[criterion](model, trained.posterior)
        for sparsity in SPARSITIES:
            pruned = copy.deepcopy(model)
            apply_masks(pruned, global_masks(values, sparsity))
            found.append(bench.quality(pruned, held_out).accuracy)
    return found


def print_head(criteria: Sequence[str]) -> None:
    """Print the head of the table."""
    columns = [f"{criterion} {s:.0%}" for criterion in criteria for s in SPARSITIES]
    print("| " + " | ".join(["training", "dense", *columns]) + " |")
    print("|---" * (len(columns) + 2) + "|", flush=True)


def print_row(name: str, found: Sequence[float]) -> None:
    """Print a row of the table."""
    print(f"| {name} | " + " | ".join(f"{a:.1f}" for a in found) + " |", flush=True)


def prepare() -> None:
    """Compute as a run does."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", help="a recipe's name or file")
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="TRAINING|OVERRIDE",
        help="trainings (default: all), and overrides such as train.NAME.temperature=2",
    )
    options = parser.parse_args()
    prepare()
    overrides = [argument for argument in options.arguments if "=" in argument]
    chosen = load(options.recipe, ["data.validation=0.1", *overrides])
    names = [name for name in options.arguments if "=" not in name] or list(chosen.train)
    pair = ("opd", "magnitude")
    print_head(pair)
    for name in names:
        started = time.process_time()
        row = accuracies(chosen, name, pair)
        print_row(f"{name}, {time.process_time() - started:.0f} CPU s", row)
