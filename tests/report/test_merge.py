from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spamprune.errors import OutputError
from spamprune.report.merge import measured, merge
from spamprune.report.results import Results
from spamprune.report.summary import families, masked_series, trainings

MakeRun = Callable[..., str]


def seeds(results: Results) -> dict[str, list[int]]:
    return {name: [cell.seed for cell in cells] for name, cells in trainings(results).items()}


def test_one_run_is_itself(make_run: MakeRun, make_results: Callable[..., Results]) -> None:
    merged = merge([make_run("a")])
    assert merged.results.cells == make_results().cells
    assert merged.origins == ["prune.0 of a", "prune.1 of a"]
    assert merged.methods["map"].train.method == "map"
    assert merged.methods["spam-unitwise"].model == "lenet"


def test_seeds_of_several_runs_are_pooled(make_run: MakeRun) -> None:
    merged = merge([make_run("a"), make_run("b", first_seed=2, name="other", threads=2)])
    assert seeds(merged.results) == {"map": [0, 1, 2, 3], "spam-unitwise": [0, 1, 2, 3]}
    points = masked_series(merged.results, 0, "pruned")["map", "opd"]
    assert all(len(measured) == 4 for measured in points.values())
    assert all(len(family.members) == 4 for family in families(merged.results))


def test_methods_of_several_runs_stand_side_by_side(make_run: MakeRun) -> None:
    a = make_run("a", trainings={"map": "map"})
    b = make_run("b", trainings={"spam": "spam"})
    merged = merge([a, b])
    assert seeds(merged.results) == {"map": [0, 1], "spam": [0, 1]}
    assert len({experiment for _, experiment in _experiments(merged.results)}) == 2


def _experiments(results: Results) -> set[tuple[str, int]]:
    return {(r.kind, r.experiment) for cell in results.cells for r in measured(cell)}


@pytest.mark.parametrize(
    "change",
    [
        {"train.map.temperature": 8},
        {"model.kwargs": {"widths": [1, 1, 1, 1]}},
        {"data.augment": "flip"},
        {"arithmetic.precision": "bf16"},
    ],
)
def test_the_same_name_with_other_settings_is_another_method(
    make_run: MakeRun, change: dict[str, Any]
) -> None:
    merged = merge([make_run("a"), make_run("b", changes=change)])
    assert {"map (a)", "map (b)"} <= set(merged.methods)
    assert seeds(merged.results)["map (a)"] == [0, 1]
    assert seeds(merged.results)["map (b)"] == [0, 1]


def test_folders_of_one_name_are_told_apart_by_their_paths(make_run: MakeRun) -> None:
    merged = merge([make_run("x/run"), make_run("y/run", changes={"data.augment": "flip"})])
    assert {"map (x/run)", "map (y/run)"} <= set(merged.methods)
    merged = merge(["x/run", make_run("z", changes={"data.augment": "flip"})])
    assert {"map (run)", "map (z)"} <= set(merged.methods)


def test_the_current_folder_has_a_name(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run("a"), make_run("b", changes={"data.augment": "flip"})
    monkeypatch.chdir("a")
    assert {"map (a)", "map (b)"} <= set(merge([".", "../b"]).methods)


def test_experiments_are_matched_by_settings_and_not_by_place(make_run: MakeRun) -> None:
    a, b = make_run("a"), make_run("b", first_seed=2, reverse=True)
    merged = merge([a, b])
    assert len(merged.origins) == 2
    assert _experiments(merged.results) == {("unstructured", 0), ("structured", 1)}
    tuned = make_run("c", first_seed=4, changes={"prune.0.finetune": {"epochs": 3}})
    merged = merge([a, b, tuned])
    assert merged.origins == ["prune.0 of a", "prune.1 of a", "prune.0 of c"]
    assert ("unstructured", 2) in _experiments(merged.results)


def test_criteria_of_two_runs_of_one_network_join(make_run: MakeRun) -> None:
    a = make_run("a", criteria=("opd",), compacted=False)
    b = make_run("b", criteria=("opd", "magnitude"), compacted=False, keep=("magnitude",))
    merged = merge([a, b])
    assert seeds(merged.results)["map"] == [0, 1]
    series = masked_series(merged.results, 0, "pruned")
    assert {criterion for _, criterion in series} == {"opd", "magnitude"}
    assert all(len(m) == 2 for points in series.values() for m in points.values())


def test_rounds_are_the_recipes_also_where_results_do_not_tell(make_run: MakeRun) -> None:
    """Those of earlier versions do not; masks in rounds and at once are no two seeds of one row."""
    only = {"criteria": ("snip",), "compacted": False}
    once = make_run("a", **only)
    rounds = make_run("b", **only, first_seed=2, changes={"prune.0.rounds": 20})
    series = masked_series(merge([once, rounds]).results, 0, "pruned")
    assert {criterion for _, criterion in series} == {"snip", "snip, 20 rounds"}
    assert all(len(m) == 2 for points in series.values() for m in points.values())


def test_a_seed_counts_once(make_run: MakeRun) -> None:
    a = make_run("a")
    assert merge([a, a]).results.cells == merge([a]).results.cells
    b = make_run("b", changes={"train.spam-unitwise.temperature": 8})
    merged = merge([a, b])
    assert seeds(merged.results)["map"] == [0, 1]
    points = masked_series(merged.results, 0, "pruned")["map", "opd"]
    assert all(len(measured) == 2 for measured in points.values())


def test_a_seed_with_two_outcomes_is_refused(make_run: MakeRun) -> None:
    a = make_run("a")
    message = r"^seed 0 of training 'map' is in a and in b, with different results, .*leave one run"
    with pytest.raises(OutputError, match=message):
        merge([a, make_run("b", compacted=False, masked=False, worse=3.0)])
    with pytest.raises(OutputError, match=message):
        merge([a, make_run("b", finetuned=False)])


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        ({"name": "mnist"}, {}, "its data.name is 'mnist', not 'fashion_mnist': compare runs on"),
        ({"validation": 0, "train": 60_000}, {}, "its data.train is 60000, not 54000"),
        ({"test": 5}, {}, "its data.test is 5, not 10000"),
        ({"shape": [1, 8, 8]}, {}, r"its data.shape is \[1, 8, 8\], not None"),
        ({}, {"evaluate.bins": 10}, "its evaluate.bins is 10, not 15"),
    ],
)
def test_runs_on_other_data_are_refused(
    make_run: MakeRun, data: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    a, b = make_run("a"), make_run("b", first_seed=2, data=data, changes=changes)
    with pytest.raises(OutputError, match=f"^b cannot be compared with a: {message}"):
        merge([a, b])


def test_a_copy_of_the_data_elsewhere_is_the_same_data(make_run: MakeRun) -> None:
    merged = merge([make_run("a"), make_run("b", first_seed=2, data={"source": "files in /b"})])
    assert len(merged.results.cells) == 8


@pytest.mark.parametrize(
    ("fact", "free"),
    [("digest", {"source": "images under z"}), ("source", {})],  # earlier versions have no digest
)
def test_another_image_folder_is_other_data(
    make_run: MakeRun, fact: str, free: dict[str, str]
) -> None:
    changes = {"data.name": "image_folder"}
    same = {"name": "image_folder", "source": "images under x", fact: "x"}
    a = make_run("a", data=same, changes=changes)
    b = make_run("b", data={**same, **free}, changes=changes, first_seed=2)
    c = make_run("c", data={**same, fact: "y"}, changes=changes, first_seed=4)
    assert len(merge([a, b]).results.cells) == 8
    with pytest.raises(OutputError, match=rf"^c cannot be compared with a: its data\.{fact} is"):
        merge([a, b, c])


def test_unfinished_missing_and_no_runs_are_refused(make_run: MakeRun) -> None:
    with pytest.raises(OutputError, match=r"^nothing to compare"):
        merge([])
    with pytest.raises(OutputError, match=r"nowhere.*finished run"):
        merge(["nowhere"])
    Path(make_run("a"), "results.json").unlink()
    with pytest.raises(OutputError, match=r"a/results\.json: .*finished run"):
        merge(["a"])
