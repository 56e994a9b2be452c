"""Iterative experiments: prune, fine-tune, score anew, prune further."""

from __future__ import annotations

import csv
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

import spamprune as sp
from spamprune.bayes.posterior import load_posterior
from spamprune.data import Split, load
from spamprune.engine import structured, subject, unstructured
from spamprune.engine.bench import create_model, load_data
from spamprune.engine.forecast import forecast
from spamprune.engine.run import run
from spamprune.pruning import cost
from spamprune.recipe import Recipe
from spamprune.report import measure
from spamprune.report.compare import compare
from spamprune.report.results import Compacted, Masked, Quality, Results

SGD = {"name": "sgd", "lr": 0.05}
SPAM = {"prior": {"structure": "unitwise"}, "evidence": {"every": 1, "steps": 5}}
TUNE: dict[str, Any] = {"epochs": 2, "batch_size": 64, "optimiser": SGD}
BUDGETS = (0.6, 0.4, 0.2)
MASKS: dict[str, Any] = {
    "kind": "unstructured",
    "schedule": "iterative",
    "criteria": ["opd", "snip"],
    "sparsities": [0.5, 0.8, 0.9],
    "finetune": {**TUNE, "method": "spam", **SPAM, "distil": {}},
}
UNITS: dict[str, Any] = {
    "kind": "structured",
    "schedule": "iterative",
    "ranking": "global",
    "targets": [{"macs": budget} for budget in BUDGETS],
    "finetune": TUNE,
    "scratch": {**SGD, "budget": "total"},
}


def recipe(*experiments: dict[str, Any], **train: Any) -> Recipe:
    """A run of two seconds."""
    settings = {"epochs": 3, "batch_size": 64, "optimiser": SGD, **SPAM, **train}
    return Recipe.model_validate(
        {
            "name": "iterative",
            "data": {"name": "cancer", "validation": 0},
            "model": {"name": "fc_cancer", "kwargs": {"widths": [30, 40, 20]}},
            "train": {"spam": settings},
            "prune": list(experiments or (MASKS, UNITS)),
            "evaluate": {"latency_batches": []},
        }
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("runs") / "iterative"
    return folder, run(recipe(), folder)


@pytest.fixture
def scratch_epochs(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Return how long each network is trained from scratch, by its stage, as runs get there."""
    epochs, train_on = {}, structured.train_on

    def counting(bench: Any, model: Any, training: Any, name: str, *others: Any) -> Any:
        epochs[name] = training.epochs
        return train_on(bench, model, training, name, *others)

    monkeypatch.setattr(structured, "train_on", counting)
    return epochs


def quality(model: nn.Module, split: Split) -> Quality:
    """Measure as a run does: with one thread, which tells in the last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure.quality(model, split.loader(1000))
    finally:
        torch.set_num_threads(before)


def masked(results: Results, criterion: str) -> list[Masked]:
    return [m for m in results.cells[0].masked if m.criterion == criterion]


def test_masks_are_chosen_by_scores_of_the_network_fine_tuned_before(
    finished: tuple[Path, Results],
) -> None:
    """The same by hand, from the artifacts and posteriors of the steps before."""
    folder, results = finished
    test = load_data(recipe()).test
    for before, after in pairwise(masked(results, "opd")):
        model = sp.load(folder / before.artifact)
        posterior = load_posterior(folder / f"{before.artifact}.posterior.safetensors")
        gone = torch.cat([p.flatten() == 0 for p in model.parameters()])
        assert gone.double().mean().item() == pytest.approx(before.requested, abs=1e-3)
        scores = sp.scores.opd(model, posterior)
        flat = torch.cat([score.flatten() for score in scores.values()])
        flat[gone] = -1  # OPD is not negative
        lowest = flat.argsort(stable=True)[: round(after.requested * len(flat))]
        with torch.no_grad():
            weights = torch.nn.utils.parameters_to_vector(model.parameters())
            weights[lowest] = 0
            torch.nn.utils.vector_to_parameters(weights, model.parameters())
        assert quality(model, test) == after.pruned
        assert before.schedule == after.schedule == "iterative"
        final = sp.load(folder / after.artifact)
        zeros = torch.cat([p.flatten() == 0 for p in final.parameters()])
        assert bool(zeros[gone].all())  # what is gone stays gone
        assert quality(final, test) == after.finetuned


def test_the_first_step_is_the_one_shot_one(finished: tuple[Path, Results], tmp_path: Path) -> None:
    once = run(recipe({**MASKS, "schedule": "one_shot"}), tmp_path / "once")
    for criterion in ("opd", "snip"):
        first, *others = masked(finished[1], criterion)
        again, *rest = masked(once, criterion)
        assert first.pruned == again.pruned
        assert first.finetuned == again.finetuned
        assert all(a.finetuned != b.finetuned for a, b in zip(others, rest, strict=True))


def test_budgets_are_of_the_trained_network(finished: tuple[Path, Results]) -> None:
    folder, results = finished
    steps: list[Compacted] = results.cells[0].compacted
    inputs, _ = next(iter(load_data(recipe()).test.loader(1)))
    dense = cost.macs(create_model(recipe(), 0), inputs)
    assert [step.target for step in steps] == [{"macs": budget} for budget in BUDGETS]
    for step, budget in zip(steps, BUDGETS, strict=True):
        assert step.achieved["macs"] == pytest.approx(step.size.macs / dense)
        assert 0.85 * budget < step.achieved["macs"] <= budget + 1e-12
        assert step.residual < 1e-5
        saved = sp.load(folder / step.artifact)
        assert cost.macs(saved, inputs) == step.size.macs
        assert quality(saved, load_data(recipe()).test) == step.finetuned
    for before, after in pairwise(steps):
        assert all(after.widths[layer] <= n for layer, n in before.widths.items())
        assert all(note.startswith("of the step before: ") for note in after.notes)


def test_units_are_chosen_by_scores_of_the_network_fine_tuned_before(
    finished: tuple[Path, Results],
) -> None:
    """The same by hand, from the artifact, the posterior and the plan of the step before."""
    folder, results = finished
    for before, after in pairwise(results.cells[0].compacted):
        model = sp.load(folder / before.artifact)
        posterior = load_posterior(folder / f"{before.artifact}.posterior.safetensors")
        left = {"macs": after.target["macs"] / before.achieved["macs"]}
        scores = sp.scores.opd(model, posterior)
        plan = sp.plan(model, torch.zeros(1, 30), scores, sp.Target(**left), ranking="global")
        small = sp.apply(model, plan)
        assert plan.to_json() == (folder / f"{after.artifact}.plan.json").read_text()
        assert quality(small, load_data(recipe()).test) == after.pruned


def test_only_steps_that_lead_on_keep_their_posterior_and_masks(
    finished: tuple[Path, Results],
) -> None:
    folder, results = finished
    *steps, last = masked(results, "snip")
    *cuts, end = results.cells[0].compacted
    for name in ("posterior", "masks"):
        assert all((folder / f"{s.artifact}.{name}.safetensors").exists() for s in steps)
        assert not (folder / f"{last.artifact}.{name}.safetensors").exists()
    assert all((folder / f"{c.artifact}.posterior.safetensors").exists() for c in cuts)
    assert not (folder / f"{end.artifact}.posterior.safetensors").exists()


@pytest.mark.usefixtures("blank_figures")
def test_rounds_start_at_what_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    starts = []
    iterative_masks = unstructured.masks.iterative_masks

    def starting(*arguments: Any, start: Any, **others: Any) -> Any:
        starts.append(start and unstructured.masks.sparsity_of(start))
        return iterative_masks(*arguments, start=start, **others)

    monkeypatch.setattr(unstructured.masks, "iterative_masks", starting)
    steps = {**MASKS, "criteria": ["snip"], "rounds": 3, "sparsities": [0.5, 0.8]}
    (cell,) = run(recipe(steps), tmp_path / "out").cells
    assert starts == [None, cell.masked[0].achieved]
    assert [m.achieved for m in cell.masked] == pytest.approx([0.5, 0.8], abs=1e-3)


@pytest.mark.usefixtures("blank_figures")
def test_networks_of_all_steps_are_taught_by_the_dense_one(
    scratch_epochs: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    teachers, teacher = [], subject.Teacher

    def teaching(model: Any, distil: Any) -> Any:
        teachers.append(sum(p.numel() for p in model.parameters()))
        return teacher(model, distil)

    monkeypatch.setattr(subject, "Teacher", teaching)
    taught = {**UNITS, "finetune": {**TUNE, "distil": {}}}
    (cell,) = run(recipe(taught), tmp_path / "taught").cells
    assert teachers == [cell.size.params] * len(BUDGETS)
    # the baseline takes as long as training and all the fine-tuning on the way
    assert list(scratch_epochs.values()) == [3 + 2, 3 + 4, 3 + 6]


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("after", [6, 10, 14, 18, 25])
def test_a_killed_run_goes_on_and_ends_bit_identical(
    finished: tuple[Path, Results],
    kill: Callable[[Path, Path, int], None],
    tmp_path: Path,
    after: int,
) -> None:
    folder, whole = finished
    out = tmp_path / "killed"
    kill(folder / "recipe.yaml", out, after)
    (again,), (cell,) = run(recipe(), out, resume=True).cells, whole.cells
    assert again.masked == cell.masked
    for resumed, step in zip(again.compacted, cell.compacted, strict=True):
        assert (resumed.widths, resumed.pruned) == (step.widths, step.pruned)
        assert (resumed.finetuned, resumed.scratch) == (step.finetuned, step.scratch)
    for record in (cell.masked[-1], cell.compacted[-1]):
        first = load_file(folder / record.artifact / "model.safetensors")
        second = load_file(out / record.artifact / "model.safetensors")
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.usefixtures("blank_figures")
def test_block_opd_of_later_steps_has_the_factors_of_fine_tuning(tmp_path: Path) -> None:
    kron = {"curvature": {"structure": "kron"}}
    steps = {**UNITS, "criteria": ["block_opd"], "compensate": True, "scratch": None}
    (cell,) = run(recipe({**steps, "finetune": {**TUNE, **kron}}, **kron), tmp_path / "out").cells
    assert [step.target["macs"] for step in cell.compacted] == list(BUDGETS)
    assert all(step.residual < 1e-5 for step in cell.compacted)


@pytest.mark.usefixtures("blank_figures")
def test_a_budget_that_a_step_before_has_met_has_its_network(
    scratch_epochs: dict[str, int], tmp_path: Path
) -> None:
    """Units are coarse: an eighth each. Nothing is fine-tuned for it, nor counted."""
    budgets = [{"params": budget} for budget in (0.5, 0.4, 0.3)]
    narrow = recipe({**UNITS, "targets": budgets})
    made = narrow.model_copy(
        update={"model": narrow.model.model_copy(update={"kwargs": {"widths": [30, 8]}})}
    )
    (cell,) = run(made, tmp_path / "out").cells
    first, second, third = cell.compacted
    assert first.achieved["params"] <= 0.4
    own = {"target": {"params": 0.4}, "notes": second.notes}
    assert second == first.model_copy(update=own)
    assert "a step before had met this target already" in second.notes[-1]
    assert third.achieved["params"] <= 0.3
    assert list(scratch_epochs.values()) == [3 + 2, 3 + 4]


@pytest.mark.usefixtures("blank_figures")
def test_zeros_that_nobody_masked_are_no_masks(tmp_path: Path) -> None:
    """Those that online pruning without masks left."""
    online = {"online": {"final": 0.9, "start": 1, "end": 3, "every": 2, "hold": False}}
    (cell,) = run(recipe({**MASKS, "sparsities": [0.2, 0.5]}, **online), tmp_path / "out").cells
    size = cell.size.params
    assert [m.achieved for m in cell.masked] == pytest.approx([0.2, 0.5] * 2, abs=1 / size)


@pytest.mark.usefixtures("blank_figures")
def test_chains_that_differ_share_no_row(tmp_path: Path) -> None:
    """At 90 % and at a fifth of the MACs, after other steps, of one run and of several."""
    chains = [{**MASKS, "sparsities": steps} for steps in ([0.5, 0.9], [0.8, 0.9])]
    units = {**UNITS, "scratch": None}
    chains += [{**units, "targets": [{"macs": a}, {"macs": 0.2}]} for a in (0.6, 0.4)]
    run(recipe(*chains), tmp_path / "one")
    again, other = recipe(chains[0], chains[2]), recipe(chains[1], chains[3])
    run(again, tmp_path / "two")
    run(other.model_copy(update={"seeds": [1]}), tmp_path / "three")
    compare([tmp_path / name for name in ("one", "two", "three")], tmp_path / "out")
    with (tmp_path / "out/comparison.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["metric"] == "accuracy"]
    last = [
        line
        for line in lines
        if line["stage"] == "pruned" and (line["sparsity_pct"] == "90" or "20 %" in line["target"])
    ]
    assert len(last) == 2 * 2 + 2  # two criteria of masks
    seeds = {(line["experiment"].partition(" of ")[0], line["seeds"]) for line in last}
    assert seeds == {("prune.0", "1"), ("prune.1", "2"), ("prune.2", "1"), ("prune.3", "2")}


@pytest.mark.parametrize(
    ("experiment", "says"),
    [
        ({**MASKS, "finetune": None}, "give finetune"),
        ({**MASKS, "sparsities": [0.9, 0.5]}, "order them from low to high"),
        ({**MASKS, "target": "evidence"}, "leave target out"),
        (
            {**MASKS, "finetune": {**MASKS["finetune"], "curvature": {"structure": "kron"}}},
            "use 'diag'",
        ),
        ({**UNITS, "finetune": None, "scratch": None}, "give finetune"),
        ({**UNITS, "targets": [{"macs": 0.2}, {"macs": 0.6}]}, "from large to small"),
        ({**UNITS, "targets": [{"macs": 0.6}, {"bytes": 0.2}]}, "all of one of macs"),
        ({**UNITS, "targets": [{"ratio": 0.2}, {"ratio": 0.6}]}, "all of one of macs"),
        ({**UNITS, "ratios": {"0": 0.5}}, "leave ratios out"),
        ({**UNITS, "criteria": ["block_opd"]}, "Kronecker factors of the fine-tuned network"),
        (
            {
                **UNITS,
                "schedule": "one_shot",
                "finetune": {**TUNE, "curvature": {"structure": "kron"}},
            },
            "it is for method 'spam' or schedule 'iterative'",
        ),
    ],
)
def test_what_cannot_go_step_by_step_is_refused(experiment: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        recipe(experiment)


def test_a_forecast_counts_posteriors_scores_and_all_fine_tuning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("spamprune.engine.forecast._step_seconds", lambda *_: 1.0)
    data = load("cancer", validation=0)
    samples, steps = len(data.train), -(-len(data.train) // 64)

    def extra(experiment: dict[str, Any]) -> float:
        other = forecast(recipe({**experiment, "schedule": "one_shot"}), data)
        return forecast(recipe(experiment), data) - other

    # two posteriors for each of two criteria, two more scorings by snip
    assert extra(MASKS) == pytest.approx(4 * steps + 2 * samples / 64)
    # two posteriors; 2 and 4 epochs more from scratch
    assert extra(UNITS) == pytest.approx((2 + 2 + 4) * steps)


def test_reports_tell_steps_from_one_shot_pruning(
    finished: tuple[Path, Results], tmp_path: Path
) -> None:
    folder, _ = finished
    said = "Iterative: each network was pruned from the fine-tuned one before it."
    assert (folder / "report.html").read_text().count(said) >= 2
    assert compare([folder], tmp_path / "out").read_text().count(said) == 3
    with (tmp_path / "out/comparison.csv").open(newline="") as file:
        found = {(line["kind"], line["schedule"]) for line in csv.DictReader(file)}
    pruned = {("unstructured", "iterative"), ("structured", "iterative")}
    assert found == {("dense", ""), *pruned}
