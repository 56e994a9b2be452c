"""When, and with which curvature, to update the prior: LeNet on Fashion-MNIST.

Trains on all but 5 000 training images, prunes one-shot by OPD without fine-tuning, and measures
accuracy on those 5 000; test data is not touched. Every row has the same prior, schedule and number
of Adam steps but for what its name says. The price is CPU time on one thread over that of MAP
training, whose two curvature passes after the end (both have one) are left out.

``python benchmarks/spam_curvature.py --rows map sketch exact`` appends each run to a JSON-lines
file, so that a stopped study goes on, and prints the table.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from spamprune import scores
from spamprune.bayes.spam import SpaM
from spamprune.engine.bench import Bench, create_model, load_data
from spamprune.engine.training import train
from spamprune.pruning.masks import apply_masks, global_masks
from spamprune.recipe import Recipe

SPARSITIES = [0.8, 0.9, 0.95, 0.97, 0.98, 0.99]
ROWS: dict[str, dict[str, Any]] = {
    "map": {"method": "map"},
    "sketch": {"curvature": {"samples": 10000}},
    "sketch of all": {"curvature": {"samples": None}},
    "sketch of 2000": {"curvature": {"samples": 2000}},
    "exact": {"curvature": {"estimator": "exact", "samples": None}},
    "ggn sketch": {"curvature": {"labels": "ggn", "samples": 10000}},
    "ggn exact": {"curvature": {"labels": "ggn", "estimator": "exact", "samples": 10000}},
    "kron": {"curvature": {"structure": "kron", "samples": 10000}},
    "kron ggn": {"curvature": {"structure": "kron", "labels": "ggn", "draws": 1, "samples": 10000}},
    "every epoch": {"evidence": {"every": 1, "steps": 20}, "curvature": {"samples": 10000}},
    "every epoch, 2000 samples": {
        "evidence": {"every": 1, "steps": 20},
        "curvature": {"samples": 2000},
    },
    "every 10": {"evidence": {"every": 10}, "curvature": {"samples": 10000}},
    "last at half": {"evidence": {"last": 0.5}, "curvature": {"samples": 10000}},
    "closed form": {"evidence": {"update": "exact"}, "curvature": {"samples": 10000}},
    "closed form, damped": {
        "evidence": {"update": "exact", "damping": 0.5},
        "curvature": {"samples": 10000},
    },
    "closed form, every epoch": {
        "evidence": {"update": "exact", "damping": 0.5, "every": 1},
        "curvature": {"samples": 10000},
    },
}


def run(row: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one network, prune it at every sparsity, and return what was measured."""
    training = {"epochs": options.epochs, "temperature": options.temperature} | ROWS[row]
    evidence = {"every": 5, "steps": 100} | training.get("evidence", {})
    if "last" in evidence:
        evidence["last"] = int(evidence["last"] * options.epochs)
    training |= {"evidence": evidence, "prior": {"structure": options.prior}}
    recipe = Recipe.model_validate(
        {
            "name": "spam-curvature",
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
        after = 0.0
        fit_last = SpaM.posterior

        def timed(spam: SpaM, loader: Any) -> Any:
            nonlocal after
            started = time.process_time()
            posterior = fit_last(spam, loader)
            after = time.process_time() - started
            return posterior

        SpaM.posterior = timed  # type: ignore[assignment, method-assign]
        started = time.process_time()
        posterior = train(bench, model).posterior
        seconds = time.process_time() - started - after
        SpaM.posterior = fit_last  # type: ignore[method-assign]
    values, held_out = scores.opd(model, posterior), bench.data.validation
    assert held_out is not None, "the recipe holds images out"
    accuracies = [bench.quality(model, held_out).accuracy]
    for sparsity in SPARSITIES:
        pruned = copy.deepcopy(model)
        apply_masks(pruned, global_masks(values, sparsity))
        accuracies.append(bench.quality(pruned, held_out).accuracy)
    key = {k: getattr(options, k) for k in ("epochs", "temperature", "prior")}
    return key | {"row": row, "seed": seed, "seconds": seconds, "accuracies": accuracies}


def table(lines: list[dict[str, Any]]) -> str:
    """Return a Markdown table of means ± standard errors over seeds."""
    head = ["curvature", "seeds", "time / MAP", "dense", *(f"{s:.0%}" for s in SPARSITIES)]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    plain = {line["seed"]: line["seconds"] for line in lines if line["row"] == "map"}
    for row in dict.fromkeys(line["row"] for line in lines):
        mine = [line for line in lines if line["row"] == row]
        prices = [x["seconds"] / plain[x["seed"]] for x in mine if x["seed"] in plain]
        price = f"{statistics.mean(prices):.2f}" if prices else "–"
        cells = [
            f"{statistics.mean(column):.1f} ± "
            f"{statistics.stdev(column) / len(column) ** 0.5 if len(column) > 1 else 0:.1f}"
            for column in zip(*(x["accuracies"] for x in mine), strict=True)
        ]
        rows.append(f"| {row} | {len(mine)} | {price} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    """Run what is missing, then print the table of what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--prior", default="parameterwise")
    parser.add_argument("--out", type=Path, default=Path("runs/spam_curvature.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def lines() -> list[dict[str, Any]]:
        found = options.out.read_text().splitlines() if options.out.exists() else []
        return [
            x
            for x in map(json.loads, found)
            if (x["epochs"], x["temperature"], x["prior"])
            == (options.epochs, options.temperature, options.prior)
        ]

    for seed in options.seeds:
        for row in options.rows:
            if not any((x["row"], x["seed"]) == (row, seed) for x in lines()):
                with options.out.open("a") as file:
                    file.write(json.dumps(run(row, seed, options)) + "\n")
    print(table(lines()))


if __name__ == "__main__":
    main()
