"""Recipes that ask for mean-field inference, model reduction and sparsity by evidence."""

import pytest
import yaml

from spamprune.errors import RecipeError
from spamprune.recipe import dump, load
from spamprune.recipe.schema import Reduction

ADABELIEF = {"name": "adabelief", "lr": 0.01}


def base(**training):
    settings = {"method": "variational", "epochs": 10, "optimiser": ADABELIEF, **training}
    return {
        "name": "t",
        "data": {"name": "cancer"},
        "model": {"name": "fc_cancer"},
        "train": {"vi": settings},
    }


def write(tmp_path, recipe):
    path = tmp_path / "t.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_settings_have_defaults_and_survive_a_dump(tmp_path):
    found = load(write(tmp_path, base()))
    inference = found.train["vi"].inference()
    assert (inference.prior, inference.draws, inference.reduction) == ("gaussian", 100, None)
    path = tmp_path / "again.yaml"
    path.write_text(dump(found))
    assert load(path) == found
    assert load(write(tmp_path, base(method="map", optimiser={}))).train["vi"].inference() is None


@pytest.mark.parametrize(
    ("warm_up", "blocks", "epochs", "due"),
    [(5, 5, 10, [5, 6, 7, 8, 9]), (4, 2, 10, [4, 7]), (9, 1, 10, [9])],
)
def test_reductions_fall_due_before_blocks_of_equal_length(warm_up, blocks, epochs, due):
    reduction = Reduction(warm_up=warm_up, blocks=blocks)
    reduction.check(epochs)
    assert list(reduction.due(epochs)) == due


@pytest.mark.parametrize(
    ("training", "says"),
    [
        ({"variational": {"reduction": {"warm_up": 4, "blocks": 5}}}, "do not make 5 blocks"),
        ({"variational": {"reduction": {"warm_up": 10}}}, "reduction.blocks"),
        ({"variational": {"prior": "laplace"}}, "variational.prior"),
        ({"temperature": 2.0}, "vi.temperature: method 'variational' has no use"),
        ({"prior": {"precision": 3.0}}, "vi.prior: method 'variational' has no use"),
        ({"curvature": {"structure": "kron"}}, "vi.curvature: method 'variational'"),
        ({"online": {"final": 0.9, "every": 2}}, "vi.online: method 'variational'"),
        ({"loss": {"mixup": 0.2}}, "vi.loss.mixup: the bound"),
        (
            {"method": "map", "optimiser": {}, "variational": {}},
            "vi.variational: method 'map' has no use",
        ),
        ({"method": "map"}, r"optimiser.name: a Gaussian prior acts after the steps of sgd"),
    ],
)
def test_what_cannot_be_had_is_an_error(tmp_path, training, says):
    with pytest.raises(RecipeError, match=says):
        load(write(tmp_path, base(**training)))


@pytest.mark.parametrize(
    ("experiment", "says"),
    [
        ({"sparsities": []}, "sparsities: give at least one, or target: evidence"),
        ({"target": "evidence", "rounds": 3}, "target: rounds lead to a sparsity"),
        ({"finetune": {"optimiser": ADABELIEF}}, "finetune.optimiser.name: a Gaussian prior"),
    ],
)
def test_experiments_that_make_no_sense(tmp_path, experiment, says):
    recipe = base() | {"prune": [{"kind": "unstructured", **experiment}]}
    with pytest.raises(RecipeError, match=says):
        load(write(tmp_path, recipe))


def test_a_sparsity_by_evidence_needs_no_other(tmp_path):
    prune = [
        {"kind": "unstructured", "sparsities": [], "target": "evidence"},
        {"kind": "structured", "targets": [{"evidence": True}]},
    ]
    masks, units = load(write(tmp_path, base() | {"prune": prune})).prune
    assert (masks.sparsities, masks.target) == ([], "evidence")
    assert units.targets[0].evidence is True
