"""The recipes that come with spamprune: all are valid, and one of each family really runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import spamprune as sp
from spamprune.recipe import library, load
from spamprune.recipe.load import check
from spamprune.recipe.schema import Recipe
from spamprune.report.merge import measured

NAMES = list(library.recipes())
TABLES = ["lenet_mnist", "mixer_mnist", "residual_mlp_mnist"]  # 2 and 3
GRIDS = [*TABLES, "lenet_cifar10"]  # and others of figures 5 and 8 to 10, with the same settings
QUICK = ["evaluate.latency_repeats=1", "evaluate.latency_batches=[1]"]


def only(recipe: Recipe, training: str) -> Recipe:
    """Return ``recipe`` with one of its trainings."""
    return recipe.model_copy(update={"train": {training: recipe.train[training]}})


def test_bases_are_not_recipes_themselves() -> None:
    assert {"fc_cancer", "wrn16_cifar10", *TABLES} <= set(NAMES)
    assert "paper" not in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_valid_and_described(name: str) -> None:
    recipe = check(name)  # with all of its variants
    assert isinstance(recipe, Recipe), recipe
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


@pytest.mark.parametrize("name", GRIDS)
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


def test_the_map_names_every_table_figure_and_recipe() -> None:
    page = (Path(__file__).parents[2] / "docs" / "paper.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith(("| table", "| figure"))]
    rows = [line.strip("| ").split(" | ") for line in lines]
    figures = {f"figure {i}" for i in (1, 2, *range(4, 15), 19, 20)}
    tables = {f"table {i}" for i in range(1, 5)}
    assert {place for place, *_ in rows} == figures | tables | {"figures 15 to 18"}
    assert all(set(re.findall(r"`(\w+)`", recipes)) <= set(NAMES) for _, _, recipes, _ in rows)


@pytest.mark.parametrize("name", GRIDS)
def test_curves_of_figure_4_are_of_held_out_training_images(name: str) -> None:
    curves = load(f"{name}@curves")
    assert curves.data.validation == 0.1
    assert curves.prune == []
    assert curves.train == load(name).train


PAPERS = (
    *("lenet_mnist", "lenet_cifar10", "mixer_mnist", "residual_mlp_mnist", "vit_mnist"),
    *("resnet18_cifar10", "wrn16_cifar10", "wrn16_cifar100"),
)


def test_settings_of_the_papers_code() -> None:
    """The table in PROTOCOLS, section A: optimiser, learning rate, burn-in, steps, temperature.

    The code's burn-in of 20 is one of 19 here: it names the epoch of the first update.
    """
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
        "resnet18_cifar10": ("sgd", 0.1, 19, 50, 1),
        "wrn16_cifar10": ("sgd", 0.1, 19, 100, 0.2),
        "wrn16_cifar100": ("sgd", 0.1, 19, 100, 0.2),
    }


@pytest.mark.parametrize(
    ("published", "described", "networks"),
    [
        ("vit_mnist", "vit_mnist@described", ("simple_vit_mnist", "vit_mnist")),
        ("residual_mlp_mnist", "mixer_mnist", ("residual_mlp_mnist", "mixer_mnist")),
    ],
)
def test_networks_as_published_and_as_described(
    published: str, described: str, networks: tuple[str, str]
) -> None:
    code, paper = load(published), load(described)
    assert (code.model.name, paper.model.name) == networks
    assert (code.train, code.prune) == (paper.train, paper.prune)


@pytest.mark.usefixtures("blank_figures")
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
        ("bmr_lenet_fashion_mnist", "bmr"),
        ("bmr_vit_fashion_mnist", "bmr"),
        ("fc_mnist", "diag-unitwise"),
        ("fc_mnist_structured", "diag-unitwise"),
        ("residual_mlp_mnist_finetune", "diag-parameterwise"),
        ("mixer_fashion_mnist", "diag-unitwise"),
    ],
)
def test_a_smoke_run_of_each_family(name: str, training: str, tmp_path: Path) -> None:
    recipe = only(load(f"{name}@smoke", QUICK), training)
    (cell,) = sp.run(recipe, tmp_path / "run").cells
    assert cell.training == training
    criteria = {c for experiment in recipe.prune for c in experiment.criteria}
    assert {record.criterion for record in measured(cell)} == criteria
    assert all(m.achieved == pytest.approx(m.requested, abs=0.01) for m in cell.masked)
    tuned = any(experiment.finetune for experiment in recipe.prune)
    assert tuned == any(record.finetuned for record in measured(cell))
    assert all(np.isfinite(record.loss) for record in cell.history)
    assert (tmp_path / "run" / "report.html").is_file()
