"""Unstructured experiments of a recipe."""

from __future__ import annotations

from pathlib import Path

import torch

import spamprune as sp
from spamprune.engine import checkpoint
from spamprune.engine.cell import run_cell
from spamprune.recipe.schema import Recipe


def test_lamp_of_magnitudes_is_the_papers(tmp_path: Path) -> None:
    """Lee et al. 2021: θ² over the sum of what is no smaller, one threshold for all layers."""
    recipe = Recipe.model_validate(
        {
            "name": "lamp",
            "data": {"name": "cancer"},
            "model": {"name": "fc_cancer", "kwargs": {"widths": [30, 12, 8]}},
            "train": {"map": {"method": "map", "epochs": 1}},
            "prune": [
                {
                    "kind": "unstructured",
                    "criteria": ["magnitude"],
                    "sparsities": [0.7],
                    "threshold": "lamp",
                }
            ],
            "evaluate": {"latency_batches": []},
        }
    )
    cell = run_cell(recipe, "map", 0, tmp_path)
    dense = checkpoint.model_state(tmp_path / cell.folder / "checkpoint.safetensors")
    scores = {}
    for name, weight in dense.items():
        squares = weight.double().square().flatten()
        shares = [s / squares[squares >= s].sum() for s in squares]
        scores[name] = torch.stack(shares).view_as(weight)
    ranked = torch.cat([s.flatten() for s in scores.values()]).sort().values
    threshold = ranked[round(0.7 * len(ranked))]
    pruned = sp.load(tmp_path / cell.masked[0].artifact)
    for name, weight in pruned.named_parameters():
        assert torch.equal(weight != 0, scores[name] >= threshold)
