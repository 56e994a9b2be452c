"""How the temperature trades dense accuracy for sparsity: LeNet on Fashion-MNIST.

Trains for a few epochs on all but 5 000 training images, prunes one-shot by OPD without
fine-tuning, and prints accuracy on those 5 000; test data is not touched. Run it with
``python benchmarks/temperature.py [EPOCHS]``; about two minutes a row on one core.
"""

from __future__ import annotations

import argparse
from typing import Any

from held_out import accuracies, prepare, print_head, print_row

from spamprune.recipe import Recipe

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


def recipe(training: dict[str, Any], epochs: int) -> Recipe:
    """Return the recipe of one row."""
    return Recipe.model_validate(
        {
            "name": "temperature",
            "data": {"name": "fashion_mnist", "validation": 5 / 60},
            "model": {"name": "lenet"},
            "train": {"t": {"epochs": epochs, **training}},
        }
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("epochs", nargs="?", type=int, default=20, help="of each training (20)")
    options = parser.parse_args()
    prepare()
    print_head(["opd"])
    for name, training in ROWS:
        print_row(name, accuracies(recipe(training, options.epochs), "t", ["opd"]))
