"""The recipes that come with spamprune: all are valid, and one of each family really runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import spamprune as sp
from spamprune.data import load as load_data
from spamprune.engine.cell import run_cell
from spamprune.recipe import library, load
from spamprune.recipe.schema import Recipe

NAMES = list(library.recipes())
TABLES = ["lenet_mnist", "mixer_mnist", "residual_mlp_mnist"]  # 2 and 3
QUICK = ["evaluate.latency_repeats=1", "evaluate.latency_batches=[1]"]


def only(recipe: Recipe, training: str) -> Recipe:
    """Return ``recipe`` with one of its trainings."""
    return recipe.model_copy(update={"train": {training: recipe.train[training]}})


def test_bases_are_not_recipes_themselves() -> None:
    assert {"fc_cancer", "wrn16_cifar10", *TABLES} <= set(NAMES)
    assert "paper" not in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_valid_and_described(name: str) -> None:
    recipe = load(name)
    assert recipe.name == name
    assert recipe.description
    assert len(recipe.description.splitlines()[0]) <= 100


@pytest.mark.parametrize("name", NAMES)
def test_every_smoke_variant_is_small_and_needs_no_download(name: str) -> None:
    recipe, smoke = load(name), load(f"{name}@smoke")
    assert smoke.name == f"{name}-smoke"
    assert smoke.data.name in ("digits", "cancer")
    assert smoke.model.name == recipe.model.name
    assert list(smoke.train) == list(recipe.train)  # everything is tried
    assert all(training.epochs <= 3 for training in smoke.train.values())
    assert {type(e) for e in smoke.prune} == {type(e) for e in recipe.prune}
    for training, settings in smoke.train.items():
        assert settings.prior == recipe.train[training].prior
        assert settings.curvature.structure == recipe.train[training].curvature.structure


@pytest.mark.parametrize("name", TABLES)
def test_the_grid_of_tables_2_and_3(name: str) -> None:
    train = load(name).train
    grid = {
        (t.curvature.structure, t.prior.structure) for t in train.values() if t.method == "spam"
    }
    priors = ("scalar", "layerwise", "unitwise", "parameterwise")
    assert grid == {(structure, prior) for structure in ("diag", "kron") for prior in priors}
    assert [t.method for t in train.values()].count("map") == 1
    optimisers = {t.optimiser.model_dump_json() for t in train.values()}
    assert len(optimisers) == 1
    assert {(t.epochs, t.batch_size, t.evidence.steps) for t in train.values()} == {(100, 128, 100)}


PAPERS = (
    *("lenet_mnist", "lenet_cifar10", "mixer_mnist", "residual_mlp_mnist", "vit_mnist"),
    *("resnet18_cifar10", "wrn16_cifar10", "wrn16_cifar100"),
)


def test_settings_of_the_papers_code() -> None:
    """The table in PROTOCOLS, section A: optimiser, learning rate, burn-in, steps, temperature."""
    found = {
        name: (
            t.optimiser.name,
            t.optimiser.lr,
            t.evidence.burn_in,
            t.evidence.steps,
            t.temperature,
        )
        for name in PAPERS
        for t in [load(name).train["diag-parameterwise"]]
    }
    assert found == {
        "lenet_mnist": ("sgd", 0.1, 0, 100, 1),
        "lenet_cifar10": ("sgd", 0.1, 0, 100, 1),
        "mixer_mnist": ("adam", 1e-3, 0, 100, 1),
        "residual_mlp_mnist": ("adam", 1e-3, 0, 100, 1),
        "vit_mnist": ("adam", 1e-3, 0, 100, 1),
        "resnet18_cifar10": ("sgd", 0.1, 20, 50, 1),
        "wrn16_cifar10": ("sgd", 0.1, 20, 100, 0.2),
        "wrn16_cifar100": ("sgd", 0.1, 20, 100, 0.2),
    }


@pytest.mark.parametrize(
    ("name", "training"),
    [
        ("fc_cancer", "spam"),
        ("lenet_fashion_mnist", "spam-unitwise"),
        ("lenet_mnist", "kfac-parameterwise"),
        ("mixer_mnist", "kfac-unitwise"),
        ("residual_mlp_mnist", "diag-layerwise"),
        ("vit_mnist", "diag-parameterwise"),
        ("resnet18_cifar10", "diag-parameterwise"),
        ("wrn16_cifar100", "map"),
    ],
)
def test_a_smoke_run_of_each_family(name: str, training: str, tmp_path: Path) -> None:
    recipe = only(load(f"{name}@smoke", QUICK), training)
    (cell,) = sp.run(recipe, tmp_path / "run").cells
    assert cell.training == training
    criteria = {c for experiment in recipe.prune for c in experiment.criteria}
    assert {m.criterion for m in cell.masked} == criteria
    assert all(m.achieved == pytest.approx(m.requested, abs=0.01) for m in cell.masked)
    assert all(np.isfinite(record.loss) for record in cell.history)
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_flagship_trains_prunes_and_reloads_on_files_in_cifars_format(tmp_path: Path) -> None:
    """WRN-16-4 in its full size, on 20 random images."""
    folder = tmp_path / "data" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        labels, pixels = rng.integers(10, size=(4, 1)), rng.integers(256, size=(4, 3072))
        (folder / name).write_bytes(np.hstack([labels, pixels]).astype(np.uint8).tobytes())
    short = [
        f"data.root={folder}",
        "seeds=[0]",
        "train.diag-parameterwise.epochs=1",
        "train.diag-parameterwise.evidence={every: 1, steps: 2}",
        "prune=[{kind: unstructured, criteria: [opd], sparsities: [0.9]}, "
        "{kind: structured, targets: [{ratio: 0.5}]}]",
        "evaluate.batch_size=4",
    ]
    recipe = load("wrn16_cifar10", [*short, *QUICK])
    cell = run_cell(recipe, "diag-parameterwise", 0, tmp_path / "run")
    assert cell.size.params == 2_745_306
    assert cell.history[0].log_evidence is not None
    (masked,), (compacted,) = cell.masked, cell.compacted
    assert masked.nonzero == pytest.approx(0.1 * cell.size.params, rel=0.01)
    assert compacted.size.params < 0.5 * cell.size.params
    assert compacted.residual < 1e-4
    inputs, _ = next(iter(load_data("cifar10", root=folder, validation=0).test.loader(4)))
    small = sp.load(tmp_path / "run" / compacted.artifact)
    again = sp.load(tmp_path / "run" / compacted.artifact)
    assert sum(p.numel() for p in small.parameters()) == compacted.size.params
    with torch.no_grad():
        assert torch.equal(small(inputs), again(inputs))
