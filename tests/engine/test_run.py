import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import spamprune as sp
from spamprune.engine import run as module
from spamprune.engine.run import run
from spamprune.errors import (
    DataError,
    ModelError,
    OutputError,
    PosteriorError,
    PruningError,
    RecipeError,
    TrainingError,
)
from spamprune.recipe import Recipe, load
from spamprune.report.results import Results

SMALL_VIT = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
ADAM = {"name": "adam", "lr": 0.003, "schedule": "constant"}


def recipe(**changes):
    """A recipe on the digits that takes a second and touches every part of the engine."""
    base = {
        "name": "tiny",
        "seeds": [0],
        "data": {"name": "cancer", "validation": 0.1},
        "model": {"name": "fc_cancer", "kwargs": {"widths": [30, 12, 8]}},
        "train": {
            "map": {"method": "map", "epochs": 3, "batch_size": 64, "optimiser": ADAM},
            "spam": {
                "epochs": 6,
                "batch_size": 64,
                "optimiser": ADAM,
                "prior": {"structure": "parameterwise"},
                "evidence": {"update": "exact", "every": 2, "damping": 0.5},
            },
        },
        "prune": [
            {
                "kind": "unstructured",
                "criteria": ["opd", "random"],
                "sparsities": [0.5, 0.9],
                "finetune": {"epochs": 2, "optimiser": ADAM},
            },
            {
                "kind": "structured",
                "ranking": "global",
                "targets": [{"params": 0.5}],
                "trainings": ["spam"],
                "finetune": {"epochs": 2, "optimiser": ADAM},
                "scratch": ADAM,
            },
        ],
        "evaluate": {"latency_repeats": 2, "latency_batches": [1]},
    }
    return Recipe.model_validate(base | changes)


def weights(folder):
    """Every tensor that a run leaves, by file and name, without what a clock influences."""
    return {
        f"{path.relative_to(folder)}:{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def check_identical(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return folder, run(recipe(), folder)


def test_a_run_leaves_everything_that_it_promises(finished):
    folder, results = finished
    for name in ("recipe.yaml", "results.json", "report.html"):
        assert (folder / name).stat().st_size > 0
    assert Results.model_validate_json((folder / "results.json").read_text()) == results
    assert load(folder / "recipe.yaml") == recipe()
    assert results.environment["torch"] == torch.__version__
    map_cell, spam_cell = results.cells
    assert [len(c.history) for c in results.cells] == [3, 6]
    lines = (folder / "spam/seed0/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [r.log_evidence is not None for r in spam_cell.history] == [False, True] * 3
    assert all(r.log_evidence is None for r in map_cell.history)
    assert all(r.validation_accuracy is not None for r in spam_cell.history)
    assert len(map_cell.masked) == 4
    for record in map_cell.masked:
        pruned = sp.load(folder / record.artifact)
        assert sum(int(p.count_nonzero()) for p in pruned.parameters()) == record.nonzero
        assert record.nonzero <= round((1 - record.requested) * map_cell.size.params) + 1
    assert map_cell.compacted == []
    assert not list(folder.rglob("*.partial"))
    assert not list(folder.rglob("*finetune.checkpoint*"))


def test_what_was_asked_was_reached(finished):
    _, results = finished
    for cell in results.cells:
        for record in cell.masked:
            assert record.achieved == pytest.approx(record.requested, abs=0.002)
            assert record.finetuned is not None
    (compacted,) = results.cells[1].compacted
    assert compacted.achieved["params"] <= 0.5
    assert compacted.residual <= 1e-4
    assert compacted.scratch is not None
    assert compacted.size.params <= 0.5 * results.cells[1].size.params


def test_a_pruned_model_loads_in_a_fresh_process_and_predicts_the_same(finished):
    folder, results = finished
    artifact = folder / results.cells[1].compacted[0].artifact
    code = (
        "import sys, torch, spamprune as sp; m = sp.load(sys.argv[1]);"
        "print(m(torch.linspace(-1, 1, 30)[None]).tolist(), 'torch_pruning' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, artifact], capture_output=True, text=True, check=True
    )
    here = sp.load(artifact)(torch.linspace(-1, 1, 30)[None]).tolist()
    assert done.stdout.strip() == f"{here} False"


@pytest.mark.usefixtures("blank_figures")
def test_two_jobs_give_the_same_weights_as_one(finished, tmp_path):
    folder, _ = finished
    run(recipe(), tmp_path / "two", jobs=2)
    check_identical(folder, tmp_path / "two")


@pytest.mark.usefixtures("blank_figures")
def test_another_seed_gives_other_weights(finished, tmp_path):
    folder, _ = finished
    run(recipe(seeds=[1], prune=[]), tmp_path / "other")
    name = "checkpoint.safetensors"
    first = load_file(folder / "spam/seed0" / name)["model/head.weight"]
    assert not torch.equal(
        first, load_file(tmp_path / "other/spam/seed1" / name)["model/head.weight"]
    )


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("after", [2, 7, 16])
def test_a_killed_run_goes_on_and_ends_bit_identical(finished, kill, tmp_path, after):
    """Killed in MAP's fine-tuning or training, and in the middle of SpaM's."""
    folder, _ = finished
    out = tmp_path / "killed"
    kill(folder / "recipe.yaml", out, after)
    assert not (out / "results.json").exists()
    run(recipe(), out, resume=True)
    check_identical(folder, out)


@pytest.mark.usefixtures("blank_figures")
def test_an_error_in_a_worker_is_told(tmp_path):
    out = tmp_path / "out"
    two = recipe(seeds=[0, 1], train={"map": recipe().train["map"].model_dump()}, prune=[])
    run(two, out)
    (out / "map/seed1/cell.json").write_text("{")
    (out / "map/seed0/cell.json").unlink()
    with pytest.raises(OutputError, match=r"seed1.cell\.json is damaged"):
        run(two, out, resume=True, jobs=2)


def test_killing_a_run_with_jobs_ends_its_workers(tmp_path):
    endless = {"map": {"method": "map", "epochs": 100_000, "optimiser": ADAM}}
    slow = recipe(train=endless, prune=[], seeds=[0, 1])
    source = tmp_path / "slow.yaml"
    source.write_text(yaml.safe_dump(slow.model_dump(mode="json")))
    code = (
        "import sys; from pathlib import Path; from spamprune.engine.run import run;"
        "from spamprune.recipe import load\n"
        "if __name__ == '__main__': run(load(sys.argv[1]), Path(sys.argv[2]), jobs=2)"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, script, source, tmp_path / "out"])
    lines = tmp_path / "out/map/seed0/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not lines.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.kill()
    process.wait()
    sizes, deadline = [0, lines.stat().st_size], time.monotonic() + 30
    while sizes[-1] != sizes[-2] and time.monotonic() < deadline:
        time.sleep(3)
        sizes.append(lines.stat().st_size)
    assert sizes[-1] == sizes[-2] > 0


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("what", ["loss", "weights"])
def test_numbers_that_are_lost_stop_the_run_and_the_last_good_epoch_is_kept(
    tmp_path, monkeypatch, what
):
    """In epoch 3 the loss is NaN, or the last step of it spoils a weight."""
    out, epochs = tmp_path / "bad", []
    shrink = sp.SpaM.shrink

    def spoil(self, optimizer):
        shrink(self, optimizer)
        if epochs and epochs[-1] == 2:
            if what == "weights":
                self.model.head.weight.data[0, 0] = float("nan")
            else:
                self.model.fc1.weight.data.fill_(float("inf"))

    monkeypatch.setattr(sp.SpaM, "shrink", spoil)
    monkeypatch.setattr("spamprune.engine.fit.CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(
        "spamprune.engine.progress.Progress.epoch", lambda *a: epochs.append(a[-1].epoch)
    )
    with pytest.raises(TrainingError, match=r"in epoch 3 .*holds epoch 2.*optimiser\.lr"):
        run(recipe(prune=[]), out)
    kept = load_file(out / "map/seed0/checkpoint.safetensors")
    assert all(t.isfinite().all() for t in kept.values())
    assert not (out / "results.json").exists()
    monkeypatch.undo()
    run(recipe(prune=[]), out, resume=True)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"data": {"name": "digits"}}, ModelError, "fc_cancer"),
        ({"data": {"name": "mnist", "root": "/nowhere/at/all"}}, DataError, "/nowhere/at/all"),
        ({"model": {"name": "fc_cancer", "kwargs": {"depth": 3}}}, ModelError, "depth"),
        ({"data": {"name": "cancer", "augment": "flip"}}, DataError, "augment"),
        (
            {"prune": [{"kind": "structured", "targets": [{"macs": 0.0001}]}]},
            PruningError,
            "macs: 0.0001 cannot be reached",
        ),
        (
            {
                "train": {"map": {"method": "map", "norms": "frozen", "epochs": 1}},
                "prune": [{"kind": "structured", "recalibrate": True, "targets": [{"macs": 0.5}]}],
            },
            RecipeError,
            r"train\.map\.norms, prune\.0\.recalibrate: fc_cancer has no BatchNorm",
        ),
        (
            {
                "data": {"name": "digits", "validation": 0},
                "model": {"name": "resnet10t", "kwargs": {"in_chans": 1, "num_classes": 10}},
                "train": {"map": {"method": "map", "epochs": 1, "batch_size": 359}},
                "prune": [],
            },
            TrainingError,
            r"train\.map\.batch_size: batches of 359 of 1437 .* BatchNorm in ResNet",
        ),
        (
            {
                "train": {
                    "map": {
                        "method": "map",
                        "loss": {"label_smoothing": 0.1},
                        "curvature": {"estimator": "asdl"},
                    }
                },
                "prune": [],
            },
            PosteriorError,
            r"train\.map\.curvature: asdl knows plain classification only",
        ),
        (
            {
                "data": {"name": "digits", "validation": 0},
                "model": {"name": "test_vit", "kwargs": SMALL_VIT},
                "train": {"map": {"method": "map"}},
                "prune": [
                    {
                        "kind": "structured",
                        "targets": [{"macs": 0.5}],
                        "finetune": {"method": "spam", "curvature": {"estimator": "asdl"}},
                    }
                ],
            },
            PosteriorError,
            r"prune\.0\.finetune\.curvature: estimator 'asdl' is not right for parameter",
        ),
        (
            {"prune": [{"kind": "structured", "targets": [{"ratio": 0.001}]}]},
            PruningError,
            "ratio 0.001 removes no unit: ask for more",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, changes, error, says):
    with pytest.raises(error, match=says) as caught:
        run(recipe(**changes), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_folders_with_other_results_are_left_alone(finished, tmp_path):
    folder, _ = finished
    before = sorted(folder.rglob("*"))
    with pytest.raises(OutputError, match="another recipe or other settings"):
        run(recipe(seeds=[3]), folder, resume=True)
    with pytest.raises(OutputError, match="--resume"):
        run(recipe(), folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="no run's folder"):
        run(recipe(), tmp_path / "mine")
    with pytest.raises(OutputError, match="nothing to resume"):
        run(recipe(), tmp_path / "empty", resume=True)
    assert sorted(folder.rglob("*")) == before
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


@pytest.mark.usefixtures("blank_figures")
def test_results_of_other_settings_or_data_are_not_resumed(tmp_path, monkeypatch):
    out = tmp_path / "out"
    short = {"map": {"method": "map", "epochs": 1, "batch_size": 64, "optimiser": ADAM}}
    run(recipe(train=short, prune=[]), out)
    saved = (out / "recipe.yaml").read_text()
    (out / "recipe.yaml").write_text(saved.replace("epochs: 1\n", "epochs: 2\n"))
    with pytest.raises(OutputError, match=r"recipe\.yaml was changed"):
        run(out / "recipe.yaml", out, resume=True)
    (out / "recipe.yaml").write_text(saved)
    run(out / "recipe.yaml", out, resume=True)
    loaded = module.load_data(recipe())
    fewer = replace(loaded, train=loaded.test)
    says = rf"other data \(train was {len(loaded.train)}, is {len(loaded.test)}\)"
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_data", lambda _: fewer)
        with pytest.raises(OutputError, match=says):
            run(out / "recipe.yaml", out, resume=True)
        patch.setattr(module, "load_data", lambda _: replace(loaded, digest="b"))
        run(out / "recipe.yaml", out, resume=True)  # made before there were digests
        made_by = json.loads((out / ".made_by.json").read_text())
        made_by["data"]["digest"] = "a"
        (out / ".made_by.json").write_text(json.dumps(made_by))
        with pytest.raises(OutputError, match=r"other data \(digest was a, is b\)"):
            run(out / "recipe.yaml", out, resume=True)
    (out / ".made_by.json").unlink()  # as in folders of earlier versions
    run(out / "recipe.yaml", out, resume=True)


@pytest.mark.usefixtures("blank_figures")
def test_resuming_a_finished_run_changes_no_weight(finished):
    folder, results = finished
    before = weights(folder)
    again = run(recipe(), folder, resume=True)
    assert again.cells == results.cells
    assert all(torch.equal(t, weights(folder)[n]) for n, t in before.items())


@pytest.mark.usefixtures("blank_figures")
def test_a_damaged_record_is_named(finished, tmp_path):
    out = tmp_path / "damaged"
    run(recipe(train={"map": recipe().train["map"].model_dump()}, prune=[]), out)
    (out / "map/seed0/cell.json").write_text("{")
    with pytest.raises(OutputError, match=r"cell\.json is damaged"):
        run(load(out / "recipe.yaml"), out, resume=True)


@pytest.mark.usefixtures("blank_figures")
def test_paths_may_be_strings(tmp_path):
    source = Path(tmp_path / "r.yaml")
    source.write_text(yaml.safe_dump(recipe(prune=[]).model_dump(mode="json")))
    results = sp.run(str(source), str(tmp_path / "o"), overrides=["train.spam.epochs=2"])
    assert len(results.cells[1].history) == 2


def test_overrides_of_a_recipe_that_is_loaded_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"overrides \['seeds=\[1\]'\] are for a file"):
        run(recipe(), tmp_path / "o", overrides=["seeds=[1]"])
    assert not (tmp_path / "o").exists()


def test_a_curvature_that_trainings_share_is_tried_once(tmp_path, monkeypatch):
    tried = []

    def counted(*arguments, **settings):
        tried.append(settings["method"])

    monkeypatch.setattr(module, "fit_curvature", counted)
    maps = {name: {"method": "map", "epochs": 1} for name in ("one", "two")}
    exact = {"method": "map", "epochs": 1, "curvature": {"estimator": "exact"}}
    variational = {"method": "variational", "epochs": 1}
    wanted = recipe(train={**maps, "exact": exact, "field": variational}, prune=[])
    module._preflight(wanted, module.load_data(wanted))
    assert sorted(method.chosen for method in tried) == ["exact", "sketch"]
