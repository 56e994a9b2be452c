import pytest

from spamprune.data import load
from spamprune.engine import forecast as module
from spamprune.engine.forecast import forecast, in_words, posteriors
from spamprune.recipe import Recipe


def recipe(**changes):
    content = {
        "name": "r",
        "data": {"name": "cancer"},
        "model": {"name": "fc_cancer"},
        "seeds": [0, 1],
        "train": {"t": {"method": "map", "epochs": 10, "batch_size": 50}},
    }
    return Recipe.model_validate(content | changes)


@pytest.fixture(autouse=True)
def a_step_takes_a_second(monkeypatch):
    monkeypatch.setattr(module, "_step_seconds", lambda *_: 1.0)


def test_epochs_seeds_and_jobs_count():
    data = load("cancer")
    steps = -(-len(data.train) // 50)
    assert forecast(recipe(), data) == 2 * 10 * steps
    assert forecast(recipe(), data, jobs=2) == 10 * steps
    assert forecast(recipe(), data, jobs=8) == 10 * steps  # there are only two cells


def test_evidence_updates_and_fine_tuning_count():
    data = load("cancer")
    steps = -(-len(data.train) // 50)
    spam = {"method": "spam", "epochs": 10, "batch_size": 50, "evidence": {"every": 5}}
    tune = {"epochs": 3, "batch_size": 50}
    pruned = [
        {"kind": "structured", "targets": [{"ratio": 0.5}, {"macs": 0.5}], "finetune": tune},
        {"kind": "unstructured", "sparsities": [0.5], "criteria": ["opd", "obd"]},
    ]
    found = forecast(recipe(train={"t": spam}, prune=pruned, seeds=[0]), data)
    measured = 4 * len(data.test) / 3 / 50  # a forward pass is a third of a step
    assert found == pytest.approx((10 + 2 + 2 * 3) * steps + measured)


def test_scoring_and_the_search_for_the_most_evidence_count():
    data = load("cancer")
    samples, tests = len(data.train), len(data.test)
    masks = {"kind": "unstructured", "sparsities": [0.5], "criteria": ["opd", "grasp"]}
    plain = forecast(recipe(prune=[]), data)
    scored = forecast(recipe(prune=[masks]), data) - plain
    assert scored == pytest.approx(2 * (2 * tests / 3 + 3 * samples) / 50)
    few = forecast(recipe(prune=[masks | {"batches": 2}]), data) - plain
    assert few == pytest.approx(2 * (2 * tests / 3 + 3 * 2 * 50) / 50)
    sought = forecast(recipe(prune=[masks | {"target": "evidence"}]), data) - plain - scored
    assert sought == pytest.approx(2 * 2 * (tests / 3 + 20 * samples / 3) / 50)


def test_rounds_of_scoring_count():
    data = load("cancer")
    rounds = {
        "kind": "unstructured",
        "sparsities": [0.5, 0.9],
        "criteria": ["snip"],
        "rounds": 10,
    }
    plain = forecast(recipe(prune=[], seeds=[0]), data)
    scored = forecast(recipe(prune=[rounds], seeds=[0]), data) - plain
    assert scored == pytest.approx((2 * len(data.test) / 3 + 2 * 10 * len(data.train)) / 50)
    fisher = {"kind": "structured", "targets": [{"ratio": 0.5}], "criteria": ["fisher"]}
    scored = forecast(recipe(prune=[fisher], seeds=[0]), data) - plain
    assert scored == pytest.approx((len(data.test) / 3 + len(data.train)) / 50)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(5, "less than a minute"), (300, "5 min"), (4800, "1 h 20 min"), (400_000, "5 days")],
)
def test_durations_in_words(seconds, words):
    assert in_words(seconds) == words


def test_steps_are_timed(monkeypatch):
    monkeypatch.undo()
    assert 0 < forecast(recipe(), load("cancer")) < 600


def test_a_line_for_each_kind_of_posterior():
    kron = {"curvature": {"structure": "kron"}, "method": "map", "epochs": 1}
    train = {"a": {"method": "map", "epochs": 1}, "b": {"method": "map", "epochs": 2}, "c": kron}
    data = load("cancer")
    plain, factors = posteriors(recipe(train=train), data)
    assert plain.startswith(f"posterior of a, b: sketch of {len(data.train)} samples: about ")
    assert factors.startswith("posterior of c: Kronecker factors of ")
    assert " beside activations of " in plain
