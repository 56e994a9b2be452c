"""Recipes that start from trained weights, their losses, fine-tuning and arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

import spamprune as sp
from spamprune import models
from spamprune.data import DataSet
from spamprune.data import load as load_data
from spamprune.engine.forecast import forecast
from spamprune.engine.run import run
from spamprune.errors import ModelError, RecipeError, TrainingError
from spamprune.recipe import dump, fingerprint, library, load
from spamprune.recipe.schema import FineTune, Recipe, Train

QUICK = ["evaluate.latency_repeats=1", "evaluate.latency_batches=[1]"]


@pytest.mark.usefixtures("blank_figures")
def test_the_transfer_recipe_runs_from_a_file_of_weights(tmp_path: Path) -> None:
    """Weights of a network for other classes; its digits are the smoke variant's."""
    recipe = load(
        "resnet18_transfer@smoke", [*QUICK, f"model.weights={tmp_path / 'w.safetensors'}"]
    )
    torch.manual_seed(1)
    weights = models.create("resnet18", **{**recipe.model.kwargs, "num_classes": 5}).state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    still = recipe.train["spam"].optimiser.model_copy(update={"lr": 1e-9, "min_lr": 0.0})
    train = recipe.train["spam"].model_copy(update={"optimiser": still, "epochs": 1})
    recipe = recipe.model_copy(update={"train": {"spam": train}})
    (cell,) = sp.run(recipe, tmp_path / "run").cells
    trained = load_file(tmp_path / "run/spam/seed0/checkpoint.safetensors")
    kept = trained["model/layer2.0.conv1.weight"]
    torch.testing.assert_close(kept, weights["layer2.0.conv1.weight"], rtol=1e-5, atol=1e-6)
    assert trained["model/fc.weight"].shape[0] == 10
    (compacted,) = cell.compacted
    assert compacted.finetuned is not None
    assert compacted.achieved["macs"] <= 0.5


def test_the_transfer_recipe_asks_for_what_it_promises() -> None:
    recipe = load("resnet18_transfer")
    (experiment,) = recipe.prune
    assert recipe.model.weights == "pretrained"
    assert recipe.train["spam"].method == "spam"
    assert experiment.kind == "structured"
    assert experiment.recalibrate
    assert experiment.finetune is not None
    assert experiment.finetune.distil is not None
    assert load("resnet18_transfer@cifar10").data.name == "cifar10"


@pytest.mark.usefixtures("blank_figures")
def test_the_flagships_arithmetic_depends_on_the_device(tmp_path: Path) -> None:
    families = ("resnet18_cifar10", "wrn16_cifar10")  # also their grids, masks and units
    for name in filter(lambda name: name.startswith(families), library.recipes()):
        arithmetic = load(name).arithmetic
        assert (arithmetic.precision, arithmetic.channels_last) == ("auto", True)
    assert load("lenet_mnist").arithmetic.precision == "fp32"
    only = {"method": "map", "epochs": 1}
    told = {"data": {"name": "cancer"}, "model": {"name": "fc_cancer"}, "train": {"map": only}}
    recipe = Recipe.model_validate(
        {"name": "told", **told, "arithmetic": {"precision": "auto", "channels_last": True}}
    )
    results = run(recipe, tmp_path / "run")
    wanted = "bf16" if torch.cuda.is_available() else "fp32"
    assert results.environment["precision of training"] == wanted


def test_new_fields_change_nothing_by_default(write: Callable[..., str]) -> None:
    recipe = load(write())
    text = dump(recipe)
    assert fingerprint(load(write())) == fingerprint(recipe)
    for field in ("arithmetic:", "weights: null", "norms: train", "label_smoothing: 0.0"):
        assert field in text
    fine = FineTune()
    assert (fine.method, fine.epochs, fine.optimiser.lr) == ("map", 10, 0.01)
    assert fine.prior.precision == 1.0
    assert fine.distil is None
    assert set(Train.model_fields) & set(FineTune.model_fields) >= {"prior", "evidence", "loss"}


KRON = "{method: spam, curvature: {structure: kron}}"


@pytest.mark.parametrize(
    ("tail", "says"),
    [
        (
            f"  - {{kind: unstructured, finetune: {KRON}}}\n",
            r"prune\.0\.finetune\.curvature\.structure: Kronecker factors cannot leave out masked",
        ),
        (
            f"  - {{kind: semi_structured, finetune: {KRON}}}\n",
            r"prune\.0\.finetune\.curvature\.structure: Kronecker",
        ),
        (
            "  - {kind: unstructured, finetune: {method: spam, epochs: 3}}\n",
            r"prune\.0\.finetune\.evidence\.every: with every 5",
        ),
        (
            "  - {kind: unstructured, finetune: {precision: 2.0}}\n",
            r"prune\.0\.finetune\.precision: unknown key",
        ),
        (
            "  - {kind: unstructured, finetune: {distil: {weight: 0.0}}}\n",
            r"prune\.0\.finetune\.distil\.weight: 0\.0 is not valid",
        ),
        (
            "  - {kind: unstructured, finetune: {loss: {label_smoothing: 1}}}\n",
            r"prune\.0\.finetune\.loss\.label_smoothing: 1 is not valid",
        ),
    ],
)
def test_what_does_not_go_together_is_named(tmp_path: Path, tail: str, says: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: small\ndata: {name: cancer}\nmodel: {name: fc_cancer}\n"
        f"train: {{map: {{method: map}}}}\nprune:\n{tail}"
    )
    with pytest.raises(RecipeError, match=says):
        load(path)


def test_compacted_networks_may_have_kronecker_factors() -> None:
    (experiment,) = Recipe.model_validate(
        {
            "name": "kron",
            "data": {"name": "cancer"},
            "model": {"name": "fc_cancer"},
            "train": {"map": {"method": "map"}},
            "prune": [
                {
                    "kind": "structured",
                    "targets": [{"ratio": 0.5}],
                    "finetune": {"method": "spam", "curvature": {"structure": "kron"}},
                }
            ],
        }
    ).prune
    assert experiment.finetune is not None
    assert experiment.finetune.curvature.structure == "kron"
    with pytest.raises(ValidationError, match="precision"):
        Recipe.model_validate({"arithmetic": {"precision": "fp16"}})


def small(**changes: Any) -> Recipe:
    base = {
        "name": "small",
        "data": {"name": "cancer"},
        "model": {"name": "fc_cancer"},
        "train": {"map": {"method": "map", "epochs": 1}},
    }
    return Recipe.model_validate(base | changes)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        (
            {"model": {"name": "fc_cancer", "weights": "no.safetensors"}},
            ModelError,
            r"no\.safetensors cannot be read",
        ),
        (
            {"model": {"name": "fc_cancer", "weights": "pretrained"}},
            ModelError,
            "no pretrained weights of 'fc_cancer'",
        ),
        (
            {"train": {"map": {"method": "map", "loss": {"cutmix": 1.0}}}},
            TrainingError,
            r"loss\.cutmix needs images",
        ),
        (
            {"prune": [{"kind": "unstructured", "finetune": {"loss": {"cutmix": 1.0}}}]},
            TrainingError,
            r"loss\.cutmix needs images",
        ),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says) as caught:
        run(small(**changes), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_forecast_counts_evidence_updates_and_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spamprune.engine.forecast._step_seconds", lambda *_: 1.0)
    data: DataSet = load_data("cancer")

    def seconds(**finetune: Any) -> float:
        return forecast(
            small(prune=[{"kind": "unstructured", "sparsities": [0.5], "finetune": finetune}]), data
        )

    plain = seconds()
    batches = 10 * 4  # of 128 among 410 samples
    assert seconds(distil={}) == pytest.approx(plain + batches / 3)
    assert seconds(method="spam") == pytest.approx(plain + 2 * 4)
