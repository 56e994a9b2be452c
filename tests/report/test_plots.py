from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from spamprune.report.plots import cost_accuracy, sparsity_curves, training_curves
from spamprune.report.results import Results
from spamprune.report.style import GREY, criterion_markers, training_colours
from spamprune.report.weights import filter_banks, precision_histograms, varied
from spamprune.scores import CRITERIA
from tests.report.drawings import words_in

MANY = ("opd", "magnitude", "snip", "grasp", "synflow", "a plug-in")


@pytest.mark.parametrize(
    "how",
    [
        {"seeds": 1},
        {"seeds": 5},
        {"trainings": {"only-map": "map"}, "seeds": 1},
        {"criteria": MANY},
    ],
)
def test_figures_name_what_they_show(
    how: dict[str, Any], make_results: Callable[..., Results]
) -> None:
    results = make_results(**how)
    trainings = {cell.training for cell in results.cells}
    criteria = set(how.get("criteria", ("opd", "magnitude")))
    assert trainings <= words_in(training_curves(results))
    for stage in ("pruned", "finetuned"):
        texts = words_in(sparsity_curves(results, 0, stage))
        assert criteria <= texts
        assert {"80", "99", "as trained"} <= texts
        if len(trainings) > 1:
            assert all(any(text.startswith(name) for text in texts) for name in trainings)
    texts = words_in(cost_accuracy(results, 1))
    assert criteria | {"fine-tuned", "just pruned", "trained from scratch", "as trained"} <= texts
    assert any("× fewer" in text for text in texts)


def test_evidence_is_drawn_only_where_it_was_measured(make_results: Callable[..., Results]) -> None:
    assert "Log evidence / nats" in words_in(training_curves(make_results()))
    assert "Log evidence / nats" not in words_in(training_curves(make_results({"a": "map"})))


def test_one_epoch_and_one_sparsity(make_results: Callable[..., Results]) -> None:
    results = make_results(seeds=1, epochs=1)
    for cell in results.cells:
        cell.masked = [m for m in cell.masked if m.requested == 0.9]
    words_in(training_curves(results))
    assert "90" in words_in(sparsity_curves(results, 0, "pruned"))


def test_numbers_that_are_none(make_results: Callable[..., Results]) -> None:
    results = make_results(seeds=1)
    results.cells[0].masked[-1].pruned.nll = float("nan")
    results.cells[0].masked[-2].pruned.nll = float("inf")
    words_in(sparsity_curves(results, 0, "pruned"))


def test_figures_are_deterministic(make_results: Callable[..., Results]) -> None:
    first, second = (sparsity_curves(make_results(), 0, "pruned") for _ in range(2))
    assert first == second
    assert "<dc:date>" not in first


def test_colours_are_fixed_and_distinct(make_results: Callable[..., Results]) -> None:
    colours = training_colours(make_results({"spam": "spam", "base": "map", "other": "spam"}))
    assert colours["base"] == GREY
    assert len(set(colours.values())) == 3
    assert criterion_markers(["opd", "x"])["opd"] == criterion_markers(["magnitude", "opd"])["opd"]
    assert len(set(criterion_markers([*MANY, "another"]).values())) == 7


def test_constant_precisions_have_no_histogram() -> None:
    deltas = {"w": torch.tensor([1.0, 2.0]), "b": torch.ones(3), "s": torch.ones(())}
    kept = varied({"unitwise": deltas, "scalar": {"w": torch.ones(4)}})
    assert {name: set(d) for name, d in kept.items()} == {"unitwise": {"w"}}


def test_precision_histograms() -> None:
    generator = torch.Generator().manual_seed(0)
    deltas = {f"layer{i}.weight": torch.rand(30 - i, generator=generator) + 0.1 for i in range(26)}
    texts = words_in(precision_histograms({"spam": deltas}, {"spam": "#0072b2"}))
    assert "layer0.weight  (30)".replace("  ", " ") in {" ".join(t.split()) for t in texts}
    assert not any(text.startswith("layer25") for text in texts)  # only the largest 24


def test_filter_banks() -> None:
    weight = torch.arange(1.0, 19.0).reshape(3, 2, 3)
    masked = weight.clone()
    masked[1] = 0
    banks = [
        ("conv", {"dense": weight, "masked": masked, "compacted": masked[[0, 2]]}),
        ("gone", {"dense": torch.ones(4, 4), "masked": torch.zeros(4, 4), "compacted": None}),
    ]
    texts = words_in(filter_banks(banks))
    assert {"conv", "gone", "Trained", "Masked", "Compacted", "exactly zero"} <= texts
    assert {"3 × 6", "3 × 6, 66.7 % nonzero", "2 × 6", "4 × 4, 0 % nonzero"} <= texts


def test_all_criteria_at_once_have_looks(make_results: Callable[..., Results]) -> None:
    known = (*CRITERIA, "block_opd")
    criteria = (*known, "opd, compensated")
    markers = criterion_markers(criteria)
    assert len({markers[criterion] for criterion in known}) == len(known) == 11
    assert set(criteria) <= words_in(cost_accuracy(make_results(seeds=1, criteria=criteria), 1))


def test_many_trainings_have_colours_of_their_own(make_results: Callable[..., Results]) -> None:
    results = make_results({f"t{i}": "spam" for i in range(20)}, seeds=1)
    colours = training_colours(results)
    assert len(set(colours.values())) == 20
    assert colours["t0"] == "#0072b2"
