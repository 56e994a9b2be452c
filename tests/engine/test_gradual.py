from functools import partial

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

import spamprune as sp
from spamprune.bayes.spam import SpaM
from spamprune.engine import fit
from spamprune.engine.bench import create_model, load_data
from spamprune.engine.run import run
from spamprune.errors import PruningError
from spamprune.models import create
from spamprune.pruning import compaction, cost
from spamprune.pruning.plan import Target, plan
from spamprune.recipe import load
from spamprune.recipe.schema import Recipe

GRADUAL = {"target": {"macs": 0.3}, "every": 2, "end": 4, "ranking": "global"}


def recipe(gradual=GRADUAL, prune=(), **train):
    """Training on the cancer data that takes a second."""
    settings = {
        "epochs": 6,
        "batch_size": 64,
        "optimiser": {"name": "sgd", "lr": 0.05},
        "prior": {"structure": "unitwise"},
        "evidence": {"every": 1, "steps": 5},
        "gradual": gradual,
    }
    return Recipe.model_validate(
        {
            "name": "tiny",
            "data": {"name": "cancer", "validation": 0},
            "model": {"name": "fc_cancer", "kwargs": {"widths": [30, 40, 20]}},
            "train": {"spam": settings | train},
            "prune": list(prune),
            "evaluate": {"latency_repeats": 1, "latency_batches": [1]},
        }
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "gradual"
    return folder, run(recipe(), folder).cells[0]


def test_the_network_shrinks_step_by_step_to_its_absolute_budget(finished):
    folder, cell = finished
    dense = create_model(recipe(), 0)
    inputs, _ = next(iter(load_data(recipe()).test.loader(1)))
    first, last = cell.gradual
    assert [first.epoch, last.epoch] == [2, 4]
    assert first.target["macs"] == pytest.approx(1 - 0.7 * (1 - 0.5**3))  # cubic
    assert last.target == {"macs": 0.3}
    for cut in cell.gradual:
        assert cut.achieved["macs"] == pytest.approx(cut.size.macs / cost.macs(dense, inputs))
        assert 0.85 * cut.target["macs"] < cut.achieved["macs"] <= cut.target["macs"]
        assert cut.residual < 1e-4
    assert last.size.macs < first.size.macs
    assert all(last.widths[layer] <= first.widths[layer] for layer in first.widths)
    assert last.trained == cell.dense
    assert cell.size.macs == last.size.macs
    small = sp.load(folder / cell.artifact)
    assert cost.macs(small, inputs) == last.size.macs
    page = (folder / "report.html").read_text()
    assert "Gradual pruning" in page


@pytest.mark.usefixtures("blank_figures")
def test_learning_rates_follow_the_schedule_of_the_whole(finished, tmp_path):
    _, cell = finished
    (plain,) = run(recipe(None), tmp_path / "plain").cells
    assert [r.lr for r in cell.history] == [r.lr for r in plain.history]
    assert [r.epoch for r in cell.history] == [1, 2, 3, 4, 5, 6]
    assert cell.history[1].loss == plain.history[1].loss  # the same until the first cut
    assert cell.history[2].loss != plain.history[2].loss


@pytest.mark.parametrize("structure", ["scalar", "layerwise", "unitwise", "parameterwise"])
def test_precisions_are_cut_along_with_the_weights(structure):
    """Against a network whose weights are the precisions, cut by the same plan."""
    torch.manual_seed(0)
    model = create("lenet", num_classes=10, in_chans=1, kernels=(3, 2, 1))
    spam = SpaM(model, 100, prior=structure)
    for factor in spam.prior.factors():
        factor.normal_()
    example = torch.randn(1, 1, 8, 8)
    scores = {name: p.detach().abs() for name, p in model.named_parameters()}
    chosen = plan(model, example, scores, Target(macs=0.4), ranking="global")
    small = compaction.apply(model, chosen)
    inherited = SpaM(small, 100, prior=structure, precision=7.0)
    inherited.inherit(spam, partial(compaction.cut_tensor, chosen))
    with torch.no_grad():
        for name, delta in spam.prior.precision().items():
            model.get_parameter(name).copy_(delta)
    expected = dict(compaction.apply(model, chosen).named_parameters())
    found = inherited.prior.precision()
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        assert delta.shape == small.get_parameter(name).shape
        torch.testing.assert_close(delta, expected[name].detach())
    assert inherited.penalty() > 0  # of the new shapes
    cut = chosen.cuts[0]
    wrong = torch.zeros([cut.size + 1] * (cut.dim + 1))
    with pytest.raises(PruningError, match=f"goes along with '{cut.tensor}', not {cut.size + 1}"):
        compaction.cut_tensor(chosen, cut.tensor, wrong)


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
def test_a_training_killed_in_any_segment_ends_bit_identical(
    finished, tmp_path, monkeypatch, after
):
    folder, whole = finished
    out, saved, save = tmp_path / "killed", [], fit.checkpoint.save

    def kill(*arguments):
        save(*arguments)
        saved.append(arguments)
        if len(saved) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(fit, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(fit.checkpoint, "save", kill)
    with pytest.raises(KeyboardInterrupt):
        run(recipe(), out)
    monkeypatch.undo()
    (cell,) = run(recipe(), out, resume=True).cells
    assert [c.widths for c in cell.gradual] == [c.widths for c in whole.gradual]
    assert [c.trained for c in cell.gradual] == [c.trained for c in whole.gradual]
    assert [r.loss for r in cell.history] == [r.loss for r in whole.history]
    lines = (out / "spam/seed0/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 6
    for file in ("checkpoint.safetensors", "posterior.safetensors", "trained/model.safetensors"):
        first, second = (
            load_file(folder / "spam/seed0" / file),
            load_file(out / "spam/seed0" / file),
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize(
    ("gradual", "says"),
    [
        ({"target": {"ratio": 0.5}, "every": 2}, "give macs, params or bytes"),
        ({"target": {"macs": 0.5}, "every": 2, "end": 6}, "1 after the last cut: end by 5"),
        ({"target": {"macs": 0.5}, "every": 6}, "no cut falls due"),
    ],
)
def test_schedules_that_cannot_be_kept_are_refused(gradual, says):
    with pytest.raises(ValidationError, match=says):
        recipe(gradual)


def test_a_later_structured_experiment_is_for_other_trainings():
    with pytest.raises(ValidationError, match="name the other trainings"):
        recipe(prune=[{"kind": "structured", "targets": [{"macs": 0.5}]}])


def test_a_budget_out_of_reach_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(PruningError, match=r"macs: 0\.0001 cannot be reached"):
        run(recipe({**GRADUAL, "target": {"macs": 0.0001}}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("blank_figures")
def test_a_cut_that_coarse_units_forestalled_is_left_out(tmp_path):
    """In steps of 20 of each layer's units, the first cut goes as far as the last should."""
    coarse = {"target": {"params": 0.51}, "every": 1, "end": 5, "round_to": 20}
    given = recipe(coarse).model_dump()
    given["model"]["kwargs"] = {"widths": [30, 40]}
    (cell,) = run(Recipe.model_validate(given), tmp_path / "out").cells
    (cut,) = cell.gradual
    assert cut.widths == {"fc1": 20}
    assert [r.epoch for r in cell.history] == [1, 2, 3, 4, 5, 6]
    # what came of it is measured at the end, not where a cut was left out
    assert cut.trained == cell.dense


@pytest.mark.usefixtures("blank_figures")
def test_layers_that_are_down_to_a_unit_are_still_told_of(tmp_path):
    (cell,) = run(recipe({**GRADUAL, "target": {"macs": 0.03}, "every": 1}), tmp_path / "out").cells
    assert min(cell.gradual[-1].widths.values()) == 1
    assert all(cut.widths.keys() == {"fc1", "fc2"} for cut in cell.gradual)
    small = sp.load(tmp_path / "out" / cell.artifact)
    assert cell.gradual[-1].widths == {"fc1": len(small.fc1.weight), "fc2": len(small.fc2.weight)}


@pytest.mark.parametrize(("name", "training"), [("lenet_fashion_mnist_gradual", "gradual")])
def test_bundled_recipes_run(name, training, tmp_path):
    smoke = load(f"{name}@smoke", ["evaluate={latency_repeats: 1, latency_batches: [1]}"])
    one = smoke.model_copy(update={"train": {training: smoke.train[training]}, "prune": []})
    (cell,) = run(one, tmp_path / "run").cells
    settings = smoke.train[training].gradual
    assert [cut.epoch for cut in cell.gradual] == list(settings.shares(cell.history[-1].epoch))
