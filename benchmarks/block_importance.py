"""What blocks of the posterior and compensation buy before any fine-tuning.

LeNet on Fashion-MNIST, trained by SpaM (or with a fixed scalar prior, ``--method map``) on all but
5 000 training images. One posterior with Kronecker factors scores units in several ways; the
network is compacted to several budgets of MACs and parameters and measured on the 5 000; test data
is not touched.

``python benchmarks/block_importance.py`` prints means ± standard errors over seeds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch
from accelerate import Accelerator
from torch import nn

import spamprune as sp
from spamprune.engine.bench import Bench, create_model, load_data
from spamprune.engine.training import train
from spamprune.pruning.compaction import Ranking
from spamprune.pruning.units import Scores
from spamprune.recipe import Recipe

TARGETS = [
    sp.Target(params=0.5),
    sp.Target(params=0.3),
    sp.Target(params=0.2),
    sp.Target(params=0.1),
    sp.Target(macs=0.7),
    sp.Target(macs=0.5),
]
KRON = sp.CurvatureMethod(structure="kron", samples=10_000)


def magnitude(model: nn.Module, posterior: sp.Posterior) -> Scores:
    """Squared weights."""
    return {name: p.detach().square() for name, p in model.named_parameters()}


ROWS: dict[str, tuple[Callable[[nn.Module, sp.Posterior], Scores], bool]] = {
    "squared magnitude": (magnitude, False),
    "OPD, diagonal": (sp.scores.opd, False),
    "OPD, diagonal, compensated": (sp.scores.opd, True),
    "block OPD": (sp.BlockOPD, False),
    "block OPD, compensated": (sp.BlockOPD, True),
}


def run(
    seed: int, epochs: int, method: str, ranking: Ranking
) -> tuple[float, dict[str, list[float]]]:
    """Train one network and return its accuracy and, by row, those of the pruned networks."""
    training = {
        "method": method,
        "epochs": epochs,
        "prior": {"structure": "unitwise"},
        "evidence": {"every": 1, "steps": 20},
    }
    if method == "map":
        training = {"method": method, "epochs": epochs}
    recipe = Recipe.model_validate(
        {
            "name": "block-importance",
            "data": {"name": "fashion_mnist", "validation": 5 / 60},
            "model": {"name": "lenet"},
            "train": {"t": training},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            recipe, "t", seed, Path(folder), load_data(recipe), Accelerator(), lambda *_: None
        )
        model = create_model(recipe, seed)
        trained = train(bench, model).posterior
    loader = bench.data.train.loader(128, seed=seed)
    n_data = len(bench.data.train)
    curvature = sp.fit_posterior(model, loader, n_data=n_data, curvature=KRON).curvature
    posterior = sp.Posterior(curvature, trained.prior_precision, trained.temperature, float("nan"))
    example, held_out = bench.example(), bench.data.validation
    assert held_out is not None, "the recipe holds images out"
    found: dict[str, list[float]] = {}
    for row, (score, compensated) in ROWS.items():
        scores = score(model, posterior)
        for target in TARGETS:
            plan = sp.plan(model, example, scores, target, ranking=ranking)
            full = sp.compensate(model, plan, posterior) if compensated else model
            small = sp.apply(full, plan)
            found.setdefault(row, []).append(bench.quality(small, held_out).accuracy)
    return bench.quality(model, held_out).accuracy, found


def main() -> None:
    """Run all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--method", default="spam", choices=["spam", "map"])
    parser.add_argument("--ranking", default="global", choices=get_args(Ranking))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    results = [run(seed, options.epochs, options.method, options.ranking) for seed in options.seeds]
    dense = statistics.mean(accuracy for accuracy, _ in results)
    print(f"{options.method}, dense {dense:.1f}\n")
    heads = [f"{value:.0%} of {key}" for key, value in (t.named() for t in TARGETS)]
    print("| importance | " + " | ".join(heads) + " |\n" + "|---" * (len(heads) + 1) + "|")
    for row in ROWS:
        columns = zip(*(found[row] for _, found in results), strict=True)
        cells = [
            f"{statistics.mean(c):.1f} ± "
            f"{statistics.stdev(c) / len(c) ** 0.5 if len(c) > 1 else 0:.1f}"
            for c in columns
        ]
        print(f"| {row} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
