"""Unstructured experiments of a recipe."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch

import spamprune as sp
from spamprune.engine import checkpoint
from spamprune.engine.bench import create_model, load_data
from spamprune.engine.cell import run_cell
from spamprune.pruning.masks import global_masks
from spamprune.recipe.schema import Recipe


def test_criteria_may_see_some_batches_only(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "batches",
            "data": {"name": "cancer"},
            "model": {"name": "fc_cancer", "kwargs": {"widths": [30, 12, 8]}},
            "train": {"map": {"method": "map", "epochs": 1, "batch_size": 32}},
            "prune": [
                {"kind": "unstructured", "criteria": ["snip"], "sparsities": [0.7], "batches": n}
                for n in (2, None)
            ],
            "evaluate": {"latency_batches": []},
        }
    )
    cell = run_cell(recipe, "map", 3, tmp_path)
    dense = create_model(recipe, 3)
    dense.load_state_dict(checkpoint.model_state(tmp_path / cell.folder / "checkpoint.safetensors"))
    loader = load_data(recipe).train.loader(32, seed=3)
    found = []
    for data, masked in zip((list(islice(loader, 2)), loader), cell.masked, strict=True):
        scores = sp.scores.snip(dense, data)
        kept = global_masks(scores, 0.7)
        pruned = sp.load(tmp_path / masked.artifact)
        for name, weight in pruned.named_parameters():
            assert torch.equal(weight != 0, kept[name] & (dense.get_parameter(name) != 0))
        found.append(torch.cat([mask.flatten() for mask in kept.values()]))
    assert not torch.equal(*found)


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
