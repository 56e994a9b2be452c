"""How the temperature trades dense accuracy for sparsity: LeNet on Fashion-MNIST.

Trains for a few epochs on all but 5 000 training images, prunes one-shot by OPD without
fine-tuning, and prints accuracy on those 5 000; test data is not touched. Run it with
``python benchmarks/temperature.py [EPOCHS]``; about two minutes a row on one core.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from spamprune import scores
from spamprune.engine import cell
from spamprune.engine.bench import Bench, create_model, load_data
from spamprune.pruning.masks import apply_masks, global_masks
from spamprune.recipe import Recipe

SPARSITIES = [0.8, 0.9, 0.95, 0.97, 0.98, 0.99]
SAMPLED = {"curvature": {"samples": 10000}}
EXACT = SAMPLED | {
    "prior": {"structure": "parameterwise"},
    "evidence": {"update": "exact", "every": 1, "damping": 0.5},
}
ADAM = SAMPLED | {"prior": {"structure": "unitwise"}, "evidence": {"every": 1, "steps": 20}}
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("MAP", {"method": "map"}),
    *((f"parameterwise T={t}", EXACT | {"temperature": float(t)}) for t in (1, 4, 8, 16)),
    *((f"unitwise T={t}", ADAM | {"temperature": float(t)}) for t in (1, 4, 10)),
]


def measure(name: str, training: dict[str, Any], epochs: int) -> None:
    """Train one network, prune it at every sparsity, and print a row of the table."""
    recipe = Recipe.model_validate(
        {
            "name": "temperature",
            "data": {"name": "fashion_mnist", "validation": 5 / 60},
            "model": {"name": "lenet"},
            "train": {"t": {"epochs": epochs, **training}},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            recipe, "t", 0, Path(folder), load_data(recipe), Accelerator(), lambda *_: None
        )
        model = create_model(recipe, 0)
        _, posterior = cell.train(bench, model)
    found = [bench.quality(model, bench.data.validation).accuracy]
    values = scores.opd(model, posterior)
    for sparsity in SPARSITIES:
        pruned = copy.deepcopy(model)
        apply_masks(pruned, global_masks(values, sparsity))
        found.append(bench.quality(pruned, bench.data.validation).accuracy)
    print(f"| {name} | " + " | ".join(f"{a:.1f}" for a in found) + " |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    print("| training | dense | " + " | ".join(f"{s:.0%}" for s in SPARSITIES) + " |")
    print("|---" * (len(SPARSITIES) + 2) + "|")
    for row in ROWS:
        measure(*row, int(sys.argv[1]) if len(sys.argv) > 1 else 20)
