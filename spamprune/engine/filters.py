"""Weights for the report's filter pictures: dense, masked and compacted (paper, figures 15-18)."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import Tensor, nn

from spamprune import artifact
from spamprune.bayes.posterior import load_posterior
from spamprune.engine import checkpoint
from spamprune.engine.bench import create_model, load_data
from spamprune.engine.variational import restore
from spamprune.pruning import masks
from spamprune.recipe.schema import BLOCK_OPD, Recipe
from spamprune.report.results import Cell, Compacted, Results
from spamprune.scores import CRITERIA

#: A picture of a larger matrix would show no filter.
LARGEST = 200_000


def filter_banks(recipe: Recipe, out: Path, results: Results) -> dict[str, Tensor]:
    """Return weight tensors named ``dense/<layer>``, ``masked/<layer>``, ``compacted/<layer>``.

    They are those of the first SpaM cell (else the first cell) that was pruned structurally: its
    trained network, the same under a global mask as sparse as the smallest compacted network, and
    that network itself. Empty where no cell was pruned structurally.
    """
    cells = [cell for cell in results.cells if cell.compacted]
    if not cells:
        return {}
    cell = next((cell for cell in cells if cell.method == "spam"), cells[0])
    smallest = min(cell.compacted, key=lambda record: record.size.bytes)
    dense = create_model(recipe, cell.seed)
    state = checkpoint.model_state(out / cell.folder / "checkpoint.safetensors")
    settings = recipe.train[cell.training].inference()
    if settings is None:
        dense.load_state_dict(state)
    else:
        restore(dense, settings, state)
    banks = _named("dense", dense)
    banks |= _named("masked", _masked(recipe, out, cell, dense, smallest))
    banks |= _named("compacted", artifact.load(out / smallest.artifact))
    return banks


def _masked(recipe: Recipe, out: Path, cell: Cell, dense: nn.Module, like: Compacted) -> nn.Module:
    posterior = load_posterior(out / cell.folder / "posterior.safetensors")
    data = load_data(recipe).train.loader(recipe.train[cell.training].batch_size, seed=cell.seed)
    criterion = "opd" if like.criterion == BLOCK_OPD else like.criterion  # that scores no weights
    scores = CRITERIA[criterion](dense, posterior, data=data, seed=cell.seed)
    copied = copy.deepcopy(dense)
    masks.apply_masks(copied, masks.global_masks(scores, 1 - like.size.params / cell.size.params))
    return copied


def _named(kind: str, model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{kind}/{name.removesuffix('.weight')}": p.detach().cpu().contiguous()
        for name, p in model.named_parameters()
        if p.dim() > 1 and p.numel() <= LARGEST
    }
