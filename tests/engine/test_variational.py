"""Mean-field inference and model reduction as a recipe's way of training."""

import copy
import json
import os

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.optim.adabelief import AdaBelief
from torch import nn

import spamprune as sp
from spamprune.bayes.likelihood import CLASSIFICATION
from spamprune.bayes.reduction import surplus
from spamprune.bayes.variational import MeanField
from spamprune.data import load
from spamprune.data.base import mixed_seed
from spamprune.engine import training
from spamprune.engine.bench import Bench, create_model, load_data
from spamprune.engine.cell import accelerator
from spamprune.engine.fit import Job, fit
from spamprune.engine.forecast import forecast
from spamprune.engine.run import run
from spamprune.engine.variational import Averaged, ByBound
from spamprune.errors import PruningError
from spamprune.pruning.recalibrate import recalibrate
from spamprune.recipe import Recipe
from spamprune.recipe.schema import Optimiser
from spamprune.report import measure
from tests.engine.test_run import check_identical

CANCER = load("cancer", validation=0.1)
ADABELIEF = {"name": "adabelief", "lr": 0.02}


def recipe(**changes):
    base = {
        "name": "inference",
        "seeds": [0],
        "data": {"name": "cancer", "validation": 0.1},
        "model": {"name": "fc_cancer", "kwargs": {"widths": [30, 12, 8]}},
        "train": {
            "bmr": {
                "method": "variational",
                "epochs": 12,
                "batch_size": 64,
                "optimiser": ADABELIEF,
                "variational": {"draws": 4, "reduction": {"warm_up": 8, "blocks": 2}},
            },
            "horseshoe": {
                "method": "variational",
                "epochs": 2,
                "batch_size": 64,
                "optimiser": ADABELIEF,
                "variational": {"draws": 3, "prior": "horseshoe"},
            },
        },
        "prune": [
            {"kind": "unstructured", "sparsities": [0.95], "target": "evidence"},
            {
                "kind": "structured",
                "ranking": "global",
                "targets": [{"evidence": True}],
                "finetune": {"epochs": 1, "optimiser": {"name": "adam", "lr": 0.001}},
            },
        ],
        "evaluate": {"latency_repeats": 1, "latency_batches": [1]},
    }
    return Recipe.model_validate(base | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "inference"
    return folder, run(recipe(), folder)


def field():
    torch.manual_seed(0)
    return MeanField(nn.Sequential(nn.Linear(30, 6), nn.Tanh(), nn.Linear(6, 2)), len(CANCER.train))


def test_the_loop_is_adabelief_on_the_bound():
    trained, reference = field(), field()
    optimiser = Optimiser(**ADABELIEF, schedule="constant")
    job = Job(CANCER.train, 2, 64, optimiser, seed=0)
    fit(trained, ByBound(trained, CLASSIFICATION), job, accelerator())
    optimizer = AdaBelief(
        [p for n, p in reference.named_parameters() if not n.startswith("network.")],
        lr=0.02,
        rectify=False,
        weight_decay=0.0,
    )
    loader = CANCER.train.loader(64, seed=0)
    for epoch in (1, 2):
        loader.set_epoch(epoch)
        torch.manual_seed(mixed_seed(0, epoch))
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(reference(inputs), targets)
            # in this order, since AdaBelief makes much of rounding
            (loss + reference.divergence() / len(CANCER.train)).backward()
            optimizer.step()
    for a, b in zip(trained.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_reduction_goes_as_far_as_the_bound_allows():
    """Where the odds would take all, the measured bound is what stops them."""
    trained = field()
    job = Job(CANCER.train, 10, 64, Optimiser(**ADABELIEF), seed=0)
    fit(trained, ByBound(trained, CLASSIFICATION), job, accelerator())
    data = CANCER.train.loader(64, seed=1)
    for iterations in (0, 4, 40):
        reduced = copy.deepcopy(trained)
        method = ByBound(reduced, CLASSIFICATION, due=[3], iterations=iterations)
        assert method.after_epoch(2, data) is None
        tuned = method.after_epoch(3, data)
        found = tuned.reduced
        assert found.after >= found.before
        assert tuned.log_evidence == found.after
        assert found.sparsity <= found.proposed
        gains = surplus(trained.gains(), whole=["2"], iterations=iterations)
        proposed = sum(int((g > 0).sum()) for g in gains.values())
        assert found.proposed == pytest.approx(proposed / (30 * 6 + 6 + 6 * 2 + 2))
        assert found.pruned["2"] == 0.0
        gone = sum(int((~mask).sum()) for mask in reduced.masks().values())
        assert found.sparsity == pytest.approx(gone / (30 * 6 + 6 + 6 * 2 + 2))


def test_a_run_records_what_inference_found(finished):
    folder, results = finished
    bmr, horseshoe = results.cells
    assert [c.method for c in results.cells] == ["variational"] * 2
    reductions = {r.epoch: r.reduced for r in bmr.history if r.reduced is not None}
    assert list(reductions) == [8, 10]
    assert all(r.after >= r.before for r in reductions.values())
    assert reductions[10].sparsity >= reductions[8].sparsity > 0
    assert bmr.inference.sparsity == reductions[10].sparsity
    assert bmr.inference.pruned == reductions[10].pruned
    assert bmr.inference.draws == 4
    assert horseshoe.inference.sparsity == 0
    assert horseshoe.artifact is None
    lines = (folder / "bmr/seed0/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[7])["reduced"]["pruned"] == reductions[8].pruned
    assert bmr.dense.accuracy > 85
    page = (folder / "report.html").read_text()
    for words in ("Variational inference", "Bayesian model reduction", "Sparsity of most evidence"):
        assert words in page
    assert (folder / "figures/filter_banks.safetensors").exists()


def test_masks_hold_to_the_end(finished):
    folder, results = finished
    cell = results.cells[0]
    state = load_file(folder / "bmr/seed0/checkpoint.safetensors")
    masks = {k.split(":", 1)[1].replace(":", "."): t for k, t in state.items() if "mask:" in k}
    trained = sp.load(folder / cell.artifact)
    zeros = {n: p == 0 for n, p in trained.named_parameters()}
    assert all(zeros[name][~mask].all() for name, mask in masks.items())
    total = sum(m.numel() for m in masks.values())
    pruned = sum(int((~m).sum()) for m in masks.values())
    assert cell.inference.sparsity == pytest.approx(pruned / total)
    assert cell.size.nonzero <= total - pruned
    posterior = sp.load_posterior(folder / "bmr/seed0/posterior.safetensors")
    for name, mask in masks.items():
        assert not posterior.curvature.diag[name][~mask].any()


def test_bayesian_predictions_are_averages(finished):
    folder, results = finished
    state = load_file(folder / "bmr/seed0/checkpoint.safetensors")
    model = sp.load(folder / results.cells[0].artifact)
    restored = MeanField(model, len(CANCER.train))
    restored.load_state_dict({k[6:]: t for k, t in state.items() if k.startswith("model/")})
    torch.manual_seed(0)
    found = measure.quality(Averaged(restored, 4), CANCER.test.loader(1000))
    assert found == results.cells[0].inference.averaged
    inputs, targets = next(iter(CANCER.test.loader(1000)))
    torch.manual_seed(0)
    nll = F.nll_loss(restored.predict(inputs, 4).log(), targets).item()
    assert found.nll == pytest.approx(nll, rel=1e-5)


def test_sparsity_by_evidence_is_recorded(finished):
    folder, results = finished
    for cell in results.cells:
        asked, found = cell.masked
        assert asked.chosen is None
        assert found.chosen is not None
        total = sum(p.numel() for p in sp.load(folder / found.artifact).parameters())
        assert total * (1 - found.achieved) >= found.chosen.effective - 1
        assert found.chosen.before == cell.log_evidence
        assert found.chosen.after >= found.chosen.before - 1
        assert found.requested == found.achieved
        (compacted,) = cell.compacted
        assert compacted.target == {"evidence": 1.0}
        assert compacted.achieved["evidence"] >= -1
        assert compacted.residual < 1e-4


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("after", [5, 9])
def test_a_killed_training_goes_on_and_ends_bit_identical(finished, kill, tmp_path, after):
    """Before the first reduction, and between the two."""
    folder, results = finished
    out = tmp_path / "killed"
    kill(folder / "recipe.yaml", out, after)
    again = run(recipe(), out, resume=True)
    check_identical(folder, out)
    assert [r.reduced for r in again.cells[0].history] == [
        r.reduced for r in results.cells[0].history
    ]
    assert again.cells[0].inference == results.cells[0].inference
    assert not [name for name in os.listdir(out) if "partial" in name]


def test_one_layer_cannot_be_reduced(tmp_path):
    with pytest.raises(PruningError, match="no other"):
        run(recipe(model={"name": "fc_cancer", "kwargs": {"widths": [30]}}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_forecast_counts_draws_and_the_dearer_step():
    few, many = (
        recipe(
            prune=[],
            train={
                "vi": {
                    "method": "variational",
                    "epochs": 1,
                    "optimiser": ADABELIEF,
                    "variational": {"draws": draws},
                }
            },
        )
        for draws in (1, 100_000)
    )
    assert forecast(many, CANCER) > 10 * forecast(few, CANCER)


def test_running_statistics_are_those_of_the_means(tmp_path):
    given = recipe(
        model={"name": "test_resnet", "kwargs": {"in_chans": 1}},
        data={"name": "digits", "validation": 0},
        prune=[],
    ).model_dump()
    given["train"] = {"bmr": given["train"]["horseshoe"] | {"batch_size": 256}}
    given = Recipe.model_validate(given)
    bench = Bench(given, "bmr", 0, tmp_path, load_data(given), accelerator(), lambda *_: None)
    model = training.train(bench, create_model(given, 0)).model
    by_hand = copy.deepcopy(model)
    recalibrate(by_hand, bench.data.train.loader(256, seed=0))
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, by_hand.get_buffer(name))
