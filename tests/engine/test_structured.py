"""What the structured experiments of a recipe can be told: block OPD, compensation, baselines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import spamprune as sp
from spamprune.bayes.posterior import load_posterior
from spamprune.data import load as load_data
from spamprune.engine import checkpoint, structured
from spamprune.engine.bench import create_model
from spamprune.engine.forecast import forecast
from spamprune.engine.run import run
from spamprune.errors import RecipeError
from spamprune.models import create
from spamprune.recipe import dump, load
from spamprune.recipe.schema import Recipe
from spamprune.report.compare import compare
from spamprune.report.results import Compacted, Results

ADAM = {"name": "adam", "lr": 0.003, "schedule": "constant"}
TARGETS = [{"params": 0.5}, {"macs": 0.3}]


def recipe(**changes: Any) -> Recipe:
    train = {"method": "map", "epochs": 5, "batch_size": 64, "optimiser": ADAM}
    kron = {"curvature": {"structure": "kron"}}
    structured = {"kind": "structured", "ranking": "global", "targets": TARGETS}
    base: dict[str, Any] = {
        "name": "tiny",
        "data": {"name": "cancer"},
        "model": {"name": "fc_cancer", "kwargs": {"widths": [30, 12, 8]}},
        "train": {"diag": train, "kron": train | kron},
        "prune": [
            structured | {"criteria": ["opd", "block_opd"], "trainings": ["kron"]},
            structured | {"criteria": ["opd"], "trainings": ["kron"], "compensate": True},
            structured
            | {
                "trainings": ["diag"],
                "ranking": "per_cost",
                "targets": TARGETS[:1],
                "finetune": {"epochs": 2, "optimiser": ADAM},
                "scratch": ADAM | {"budget": "total"},
            },
        ],
        "evaluate": {"latency_repeats": 2, "latency_batches": [1]},
    }
    return Recipe.model_validate(base | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return folder, run(recipe(), folder)


def of(results: Results, experiment: int) -> list[Compacted]:
    return [c for cell in results.cells for c in cell.compacted if c.experiment == experiment]


@pytest.mark.parametrize("experiment", [0, 1])
def test_networks_are_those_of_the_library(finished: tuple[Path, Results], experiment: int) -> None:
    """The same calls by hand, from what the run left of its training."""
    folder, results = finished
    model = create_model(recipe(), 0)
    model.load_state_dict(checkpoint.model_state(folder / "kron/seed0/checkpoint.safetensors"))
    posterior = load_posterior(folder / "kron/seed0/posterior.safetensors")
    example = torch.zeros(1, 30)
    records = of(results, experiment)
    assert len(records) == (4 if experiment == 0 else 2)
    for record in records:
        block = record.criterion == "block_opd"
        scores = sp.BlockOPD(model, posterior) if block else sp.scores.opd(model, posterior)
        plan = sp.plan(model, example, scores, sp.Target(**record.target), ranking="global")
        full = sp.compensate(model, plan, posterior) if experiment == 1 else model
        small, saved = sp.apply(full, plan), sp.load(folder / record.artifact)
        for name, tensor in small.state_dict().items():
            assert torch.equal(tensor, saved.state_dict()[name]), name
        assert record.compensated == (experiment == 1)
        assert record.residual < 1e-5


def test_compensation_changes_the_network_and_has_its_own_rows(
    finished: tuple[Path, Results], tmp_path: Path
) -> None:
    folder, results = finished
    plain, compensated = of(results, 0)[0], of(results, 1)[0]
    assert plain.widths == compensated.widths
    assert plain.pruned != compensated.pruned
    assert "opd, compensated" in (folder / "report.html").read_text()
    text = compare([folder], tmp_path / "out").read_text()
    assert "| opd, compensated | global | kron |" in text
    assert "| block_opd | global | kron |" in text
    assert "| opd | global | kron |" in text
    lines = (tmp_path / "out/comparison.csv").read_text().splitlines()
    named = [line for line in lines if '"opd, compensated"' in line and ",accuracy," in line]
    assert len(named) == len(TARGETS)


@pytest.mark.usefixtures("blank_figures")
def test_from_scratch_may_take_the_epochs_of_training_and_fine_tuning_together(
    finished: tuple[Path, Results], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    epochs: dict[str, int] = {}
    train_on = structured.train_on

    def counting(bench: Any, model: Any, training: Any, name: str, *others: Any) -> None:
        epochs[name.rpartition(".")[2]] = training.epochs
        train_on(bench, model, training, name, *others)

    monkeypatch.setattr(structured, "train_on", counting)
    only = recipe().train["diag"].model_dump()
    experiment = recipe().prune[2].model_dump()
    result = run(recipe(train={"diag": only}, prune=[experiment]), tmp_path / "out")
    assert epochs["scratch"] == 5 + 2
    (again,) = of(result, 0)
    (record,) = of(finished[1], 2)
    assert again.scratch == record.scratch
    assert record.scratch != record.finetuned
    experiment["scratch"]["budget"] = "finetune"
    run(recipe(train={"diag": only}, prune=[experiment]), tmp_path / "short")
    assert epochs["scratch"] == 2


def test_a_forecast_counts_the_epochs_from_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spamprune.engine.forecast._step_seconds", lambda *_: 1.0)
    only = {"diag": recipe().train["diag"].model_dump()}
    batch = {"batch_size": 64}
    experiment = recipe().prune[2].model_dump()
    experiment["finetune"] |= batch
    data = load_data("cancer")
    steps = -(-len(data.train) // 64)
    found = forecast(recipe(train=only, prune=[experiment]), data)
    measured = len(data.test) / 3 / 64  # a forward pass is a third of a step
    assert found == pytest.approx((5 + 2 + (5 + 2)) * steps + measured)


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("after", [8, 13], ids=["from scratch", "in fine-tuning"])
def test_a_killed_run_goes_on_and_ends_bit_identical(
    finished: tuple[Path, Results],
    kill: Callable[[Path, Path, int], None],
    tmp_path: Path,
    after: int,
) -> None:
    folder, _ = finished
    out = tmp_path / "killed"
    kill(folder / "recipe.yaml", out, after)
    again = run(recipe(), out, resume=True)
    (record,), (resumed,) = of(finished[1], 2), of(again, 2)
    assert record.finetuned == resumed.finetuned
    assert record.scratch == resumed.scratch
    first = load_file(folder / record.artifact / "model.safetensors")
    second = load_file(out / resumed.artifact / "model.safetensors")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"criteria": ["opd", "block_opd"]}, r"prune\.0\.criteria\.1: it needs Kronecker factors"),
        ({"compensate": True}, r"prune\.0\.compensate: .* the curvature of 'diag' is 'diag'"),
        ({"criteria": ["blok_opd"]}, "unknown criterion 'blok_opd'"),
        (
            {"scratch": ADAM},
            "it is compared with fine-tuning: give finetune too",
        ),
        (
            {
                "finetune": {"epochs": 2, "optimiser": ADAM},
                "scratch": {"warmup": 2},
            },
            "2 of 2 epochs leave none at full rate",
        ),
    ],
)
def test_what_cannot_be_had_is_an_error_of_the_recipe(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    good = recipe(prune=[]).model_dump(mode="json")
    path = tmp_path / "r.yaml"
    path.write_text(dump(recipe(prune=[])))
    assert load(path).model_dump(mode="json") == good
    experiment = {"kind": "structured", "targets": [{"macs": 0.5}]} | changes
    with pytest.raises(RecipeError, match=says):
        load(path, [f"prune=[{_yaml(experiment)}]"])


def _yaml(value: object) -> str:
    """Return a value in YAML's flow style."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_a_network_from_scratch_starts_as_its_architecture_and_its_sizes_say() -> None:
    fresh = create("fixup_wrn16_4", depth=10, widen=2, num_classes=10)
    example = torch.randn(2, 3, 8, 8)
    scores = sp.scores.random(fresh, seed=0)
    plan = sp.plan(fresh, example[:1], scores, sp.Target(ratio=0.5))
    small = sp.apply(fresh, plan)
    before = {name: p.clone() for name, p in small.named_parameters()}
    structured.reinitialise(small, fresh)
    zeros = {name for name, p in fresh.named_parameters() if not p.any()}
    assert any(name.endswith("conv2.weight") for name in zeros)  # residual branches start at zero
    for name, parameter in small.named_parameters():
        if name in zeros:
            assert not parameter.any()
        elif parameter.dim() == 4:
            assert not torch.equal(parameter, before[name])
            bound = parameter[0].numel() ** -0.5  # torch's, uniform
            assert 0.9 * bound < parameter.abs().max() <= bound


def test_attention_from_scratch_has_the_scale_of_its_own_size() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Linear(8, 64)
            self.attend = torch.nn.MultiheadAttention(64, 4, add_bias_kv=True, batch_first=True)
            self.head = torch.nn.Linear(64, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x)
            return self.head(self.attend(x, x, x, need_weights=False)[0].mean(1))

    fresh = Model()
    plan = sp.plan(
        fresh, torch.randn(1, 5, 8), sp.scores.random(fresh, seed=0), sp.Target(ratio=0.5)
    )
    small = sp.apply(fresh, plan)
    before = {name: p.clone() for name, p in small.attend.named_parameters()}
    structured.reinitialise(small, fresh)
    weight = small.attend.in_proj_weight
    assert weight.shape < fresh.attend.in_proj_weight.shape
    bound = (6 / sum(weight.shape)) ** 0.5  # torch's, uniform
    assert 0.9 * bound < weight.abs().max() <= bound
    for name in ("bias_k", "bias_v"):
        assert not torch.equal(small.attend.get_parameter(name), before[name])
    assert not small.attend.in_proj_bias.any()
    assert not small.attend.out_proj.bias.any()
