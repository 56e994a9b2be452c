from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

import spamprune as sp
from spamprune.engine import fit, training
from spamprune.engine.bench import Bench, create_model, load_data
from spamprune.engine.cell import accelerator
from spamprune.engine.online import Cuts
from spamprune.engine.run import run
from spamprune.engine.training import spam_for
from spamprune.pruning import cost
from spamprune.recipe import load
from spamprune.recipe.schema import Online, Recipe

EPOCHS = 6
HELD = {"final": 0.9, "start": 2, "end": 4, "every": 2}
PAPER = {"initial": 0.1, "final": 0.7, "every": 2, "ramp": "stairs", "hold": False}


def recipe(online=HELD, **train):
    """Training on the cancer data that takes a second."""
    settings = {
        "epochs": EPOCHS,
        "batch_size": 64,
        "optimiser": {"name": "sgd", "lr": 0.05},
        "prior": {"structure": "unitwise"},
        "evidence": {"every": 2, "steps": 5},
        "online": online,
    }
    return Recipe.model_validate(
        {
            "name": "tiny",
            "data": {"name": "cancer", "validation": 0},
            "model": {"name": "fc_cancer", "kwargs": {"widths": [30, 12, 8]}},
            "train": {"spam": settings | train},
            "evaluate": {"latency_repeats": 1, "latency_batches": [1]},
        }
    )


def bench_of(given, folder):
    folder.mkdir(exist_ok=True)
    return Bench(given, "spam", 0, folder, load_data(given), accelerator(), lambda *_: None)


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- schedules -----------------------------------------------------------------------------------


def test_stairs_are_the_papers():
    """s_e = .1 + (.99 - .1) · (e // 10) / (E // 10) at each e that 10 divides."""
    schedule = Online(initial=0.1, final=0.99, every=10, ramp="stairs")
    expected = {e: 0.1 + 0.89 * (e // 10) / 10 for e in range(10, 101, 10)}
    assert schedule.sparsities(100) == pytest.approx(expected)
    late = Online(initial=0.1, final=0.99, start=20, every=10, ramp="stairs")
    assert late.sparsities(100) == pytest.approx({e: s for e, s in expected.items() if e >= 20})


def test_a_cubic_ramp_is_zhu_and_guptas():
    """s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (nΔt))³, whose cut at t_0 itself changes nothing."""
    schedule = Online(initial=0.2, final=0.9, start=4, end=16, every=2)
    n, t0 = 7, 2
    expected = {t: 0.9 + (0.2 - 0.9) * (1 - (t - t0) / (2 * n)) ** 3 for t in range(4, 17, 2)}
    assert schedule.sparsities(20) == pytest.approx(expected)


@pytest.mark.parametrize("ramp", ["linear", "cubic", "stairs"])
def test_every_ramp_rises_and_ends_exactly(ramp):
    found = list(Online(initial=0.1, final=0.95, every=3, ramp=ramp).sparsities(20).values())
    assert len(found) == 6  # after epochs 3, 6, … 18
    assert found == sorted(found)
    assert 0.1 < found[0] < found[1]
    assert found[-1] == 0.95
    if ramp == "linear":
        steps = [b - a for a, b in zip([0.1, *found], found, strict=False)]
        assert steps == pytest.approx([0.85 / 6] * 6)


@pytest.mark.parametrize(
    ("online", "train", "says"),
    [
        ({"final": 0.9, "every": 10}, {}, "no cut falls due from epoch 10 to 6"),
        ({"final": 0.9, "every": 2, "end": 8}, {}, "end by 6"),
        ({"final": 0.9, "every": 2, "end": 5}, {}, "5 is none of them"),
        ({"final": 0.1, "initial": 0.2, "every": 2}, {}, "not above"),
        ({"every": 2}, {}, "final"),
        (HELD, {"curvature": {"structure": "kron"}}, "hold: false"),
        (HELD, {"gradual": {"target": {"macs": 0.5}, "every": 2}}, "choose one of"),
    ],
)
def test_schedules_that_cannot_be_kept_are_refused(online, train, says):
    with pytest.raises(ValidationError, match=says):
        recipe(online, **train)


# ---- cuts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", [True, False])
def test_a_cut_zeroes_the_weights_that_score_lowest_at_that_moment(tmp_path, hold):
    """Against scores by hand: the posterior's precision times the square of the weights."""
    given = recipe({**HELD, "hold": hold})
    bench = bench_of(given, tmp_path / "b")
    model = create_model(given, 0)
    spam = spam_for(bench, model)
    cuts = Cuts(bench, given.train["spam"].online, model, spam)
    assert spam.masks is cuts.masks  # pruned weights are out of the evidence
    n = cost.params(model)
    for epoch, sparsity in ((2, 0.9 * (1 - 0.5**3)), (4, 0.9)):
        precision = spam.posterior(bench.data.train.loader(64)).precision()
        flat = torch.cat([precision[name].flatten() for name, _ in model.named_parameters()])
        score = flat * weights_of(model) ** 2
        gone = set(score.argsort(stable=True)[: round(sparsity * n)].tolist())
        cuts.after_epoch(epoch)
        zeros = set((weights_of(model) == 0).nonzero()[:, 0].tolist())
        assert zeros == gone
        with torch.no_grad():  # stands for training on
            for name, p in model.named_parameters():
                p += 0.1 if cuts.masks is None else 0.1 * cuts.masks[name]


def test_what_is_held_stays_gone_whatever_its_score(tmp_path):
    given = recipe({**HELD, "criterion": "random"})
    bench = bench_of(given, tmp_path / "b")
    model = create_model(given, 0)
    cuts = Cuts(bench, given.train["spam"].online, model, spam_for(bench, model))
    cuts.after_epoch(2)
    first = dict(cuts.masks)
    bench = replace(bench, seed=1)  # random scores of another seed
    cuts._bench = bench
    cuts.after_epoch(4)
    assert all(not (cuts.masks[name] & ~mask).any() for name, mask in first.items())
    assert cost.nonzero(model) == cost.params(model) - round(0.9 * cost.params(model))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: (folder / name, run(recipe(online), folder / name).cells[0])
        for name, online in (("held", HELD), ("paper", PAPER))
    }


def test_a_held_training_ends_as_sparse_as_its_last_cut(finished):
    folder, cell = finished["held"]
    assert [cut.epoch for cut in cell.online] == [2, 4]
    assert cell.online[-1].sparsity == 0.9
    assert all(cut.held for cut in cell.online)
    assert cell.online[-1].trained == cell.dense  # two epochs after the last cut
    assert cell.online[0].trained not in (None, cell.online[0].pruned, cell.online[1].pruned)
    n = cell.size.params
    assert cell.size.nonzero == n - round(0.9 * n)
    saved = sp.load(folder / cell.artifact)
    assert cost.nonzero(saved) == cell.size.nonzero


@pytest.mark.usefixtures("blank_figures")
def test_unheld_weights_grow_again(finished, tmp_path, monkeypatch):
    _, cell = finished["paper"]
    assert [cut.epoch for cut in cell.online] == [2, 4, 6]
    assert all(cut.trained is None and not cut.held for cut in cell.online)
    assert [cut.sparsity for cut in cell.online] == pytest.approx([0.3, 0.5, 0.7])
    assert cell.online[-1].pruned == cell.dense  # the last cut ends the training
    seen = {}

    class Watched(Cuts):
        def after_epoch(self, epoch):
            super().after_epoch(epoch)
            seen[epoch] = cost.nonzero(self._model)

    monkeypatch.setattr(training, "Cuts", Watched)
    run(recipe(PAPER), tmp_path / "again")
    n = cell.size.params
    assert [seen[e] for e in (2, 4, 6)] == [n - round(s * n) for s in (0.3, 0.5, 0.7)]
    assert seen[3] > seen[2]
    assert seen[5] > seen[4]


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("name", ["held", "paper"])
@pytest.mark.parametrize("after", [0, 1, 2, 3, 5])
def test_a_killed_training_goes_on_and_ends_bit_identical(
    finished, tmp_path, monkeypatch, name, after
):
    """Killed just before a checkpoint is written: before, at and between cuts."""
    folder, whole = finished[name]
    given, out, saved = recipe({"held": HELD, "paper": PAPER}[name]), tmp_path / "killed", []
    save = fit.checkpoint.save

    def kill(*arguments):
        if len(saved) == after:
            raise KeyboardInterrupt
        saved.append(arguments)
        save(*arguments)

    monkeypatch.setattr(fit, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(fit.checkpoint, "save", kill)
    with pytest.raises(KeyboardInterrupt):
        run(given, out)
    monkeypatch.undo()
    (cell,) = run(given, out, resume=True).cells
    assert cell.online == whole.online
    for file in ("checkpoint.safetensors", "posterior.safetensors", "trained/model.safetensors"):
        first, second = (
            load_file(folder / "spam/seed0" / file),
            load_file(out / "spam/seed0" / file),
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_the_report_shows_the_cuts(finished):
    page = (finished["held"][0] / "report.html").read_text()
    assert "Online pruning" in page
    assert "stay zero" in page
    assert "Trained networks" in page
    assert "Unpruned networks" not in page


@pytest.mark.parametrize(
    ("name", "training"),
    [("lenet_fashion_mnist_online", "online-paper"), ("resnet18_cifar10_online", "online-95")],
)
def test_bundled_recipes_run(name, training, tmp_path):
    smoke = load(f"{name}@smoke", ["evaluate={latency_repeats: 1, latency_batches: [1]}"])
    one = smoke.model_copy(update={"train": {training: smoke.train[training]}, "prune": []})
    (cell,) = run(one, tmp_path / "run").cells
    settings = smoke.train[training].online
    assert [cut.epoch for cut in cell.online] == list(settings.shares(cell.history[-1].epoch))


# ---- afterwards ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("blank_figures")
def test_what_is_held_stays_pruned_in_later_experiments(tmp_path):
    """90 % gone in training: neither lighter masks nor training after them bring any back."""
    tuned = {"epochs": 2, "optimiser": {"name": "adam", "lr": 0.01}}
    given = recipe().model_dump() | {
        "prune": [
            {"kind": "unstructured", "sparsities": [0.5], "finetune": tuned},
            {"kind": "unstructured", "criteria": ["random", "bmr"], "sparsities": [0.95]},
            {"kind": "semi_structured", "finetune": tuned},
            {"kind": "structured", "targets": [{"ratio": 0.2}], "finetune": tuned},
        ]
    }
    out = tmp_path / "out"
    (cell,) = run(Recipe.model_validate(given), out).cells
    trained = sp.load(out / cell.artifact)
    left = cost.nonzero(trained)
    assert left <= 0.11 * cost.params(trained)
    for record in (*cell.masked, *cell.patterned, *cell.compacted):
        assert 0 < cost.nonzero(sp.load(out / record.artifact)) <= left
    assert cell.masked[0].achieved == pytest.approx(0.9, abs=0.01)
    assert cell.masked[0].nonzero == left
    for record in cell.masked[1:]:  # these criteria do not know what is gone
        assert record.achieved == pytest.approx(0.95, abs=0.01)
