"""Fine-tuning: by SpaM under masks, by distillation, and what goes with it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

import spamprune as sp
from spamprune.data import load
from spamprune.engine.bench import Bench, create_model, load_data
from spamprune.engine.methods import spam_of
from spamprune.engine.subject import Subject, train_on
from spamprune.errors import PosteriorError
from spamprune.pruning.masks import apply_masks, global_masks
from spamprune.pruning.recalibrate import recalibrate
from spamprune.recipe.schema import FineTune, Recipe
from spamprune.report.results import EpochRecord

CANCER = load("cancer", validation=0)
KEPT = torch.arange(30) % 3 != 0  # input features


def linear(features: int) -> nn.Linear:
    layer = nn.Linear(features, 2)
    torch.manual_seed(3)
    weight = 0.3 * torch.randn(2, 30)
    with torch.no_grad():
        layer.weight.copy_(weight if features == 30 else weight[:, KEPT])
        layer.bias.copy_(torch.tensor([0.1, -0.2]))
    return layer


def tuned(update: str, structure: str) -> FineTune:
    steps = {} if update == "exact" else {"steps": 30}
    return FineTune.model_validate(
        {
            "method": "spam",
            "prior": {"structure": structure, "precision": 2.0},
            "curvature": {"estimator": "exact"},
            "evidence": {"update": update, "every": 1, **steps},
        }
    )


@pytest.mark.parametrize(
    ("update", "structure"),
    [
        *((u, s) for u in ("adam", "mackay") for s in ("scalar", "layerwise", "unitwise")),
        ("adam", "parameterwise"),
        ("exact", "parameterwise"),
    ],
)
def test_masked_weights_take_no_part_in_evidence(update: str, structure: str) -> None:
    """A masked input counts as one that the network does not have."""
    whole, small = linear(30), linear(int(KEPT.sum()))
    masks = {"weight": KEPT.expand(2, 30), "bias": torch.ones(2, dtype=torch.bool)}
    apply_masks(whole, masks)
    inputs, targets = next(iter(CANCER.train.loader(len(CANCER.train))))
    settings = tuned(update, structure)
    masked = spam_of(settings, whole, len(inputs), 0, masks)
    reference = spam_of(settings, small, len(inputs), 0)
    blind = spam_of(settings, whole, len(inputs), 0)  # masks are not known to it
    step = masked.update(1, [(inputs, targets)])
    expected = reference.update(1, [(inputs[:, KEPT], targets)])
    blind.update(1, [(inputs, targets)])
    assert step is not None
    assert expected is not None
    assert (step.before, step.after) == pytest.approx((expected.before, expected.after), rel=1e-5)
    found, wanted = masked.prior.precision(), reference.prior.precision()
    torch.testing.assert_close(found["weight"][:, KEPT], wanted["weight"], rtol=1e-3, atol=0)
    torch.testing.assert_close(found["bias"], wanted["bias"], rtol=1e-3, atol=0)
    assert found["weight"].isfinite().all()
    if structure in ("scalar", "layerwise"):  # zeros that data seem to determine: a stronger prior
        assert blind.prior.precision()["weight"][0, 1] > 1.2 * found["weight"][0, 1]


def test_kronecker_factors_cannot_leave_out_weights() -> None:
    model = linear(30)
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    settings = FineTune.model_validate(
        {"method": "spam", "curvature": {"structure": "kron"}, "evidence": {"every": 1}}
    )
    spam = spam_of(settings, model, len(CANCER.train), 0, masks)
    with pytest.raises(PosteriorError, match="masks"):
        spam.update(1, CANCER.train.loader(64))


ADAM = {"name": "adam", "lr": 0.003, "schedule": "constant"}


def recipe(**changes: Any) -> Recipe:
    base = {
        "name": "tiny",
        "data": {"name": "cancer", "validation": 0.1},
        "model": {"name": "fc_cancer", "kwargs": {"widths": [30, 12, 8]}},
        "train": {"map": {"method": "map", "epochs": 3, "batch_size": 64, "optimiser": ADAM}},
        "evaluate": {"latency_repeats": 1, "latency_batches": [1]},
    }
    return Recipe.model_validate(base | changes)


def bench(folder: Path, found: Recipe | None = None) -> Bench:
    found = found or recipe()
    seen: list[tuple[str, EpochRecord]] = []
    return Bench(
        found,
        next(iter(found.train)),
        0,
        folder,
        load_data(found),
        Accelerator(cpu=True),
        lambda stage, record: seen.append((stage, record)),
    )


def subject(folder: Path) -> Subject:
    here = bench(folder)
    model = create_model(here.recipe, 0)
    return Subject(here, model, sp.fit_posterior(model, here.data.train.loader(64)))


def finetune(**changes: Any) -> FineTune:
    settings = {"epochs": 4, "batch_size": 64, "optimiser": ADAM}
    return FineTune.model_validate(settings | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "spam", "prior": {"structure": "unitwise"}, "evidence": {"every": 1}},
        {"distil": {"weight": 0.7, "temperature": 3.0}, "loss": {"mixup": 0.4}},
    ],
)
def test_a_killed_fine_tuning_goes_on_and_ends_bit_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr("spamprune.engine.fit.CHECKPOINT_SECONDS", 0)
    settings = finetune(**changes)

    def tune(folder: Path, dies: bool) -> nn.Module:
        trained = subject(folder)
        masks = global_masks(trained.scores("magnitude"), 0.6)
        records: list[EpochRecord] = []

        def die(_: str, record: EpochRecord) -> None:
            records.append(record)
            if dies and record.epoch == 2:
                raise KeyboardInterrupt

        trained = replace(trained, bench=replace(trained.bench, on_epoch=die))
        before = copy.deepcopy(trained.model.state_dict())
        trained.bench.folder.mkdir(parents=True, exist_ok=True)
        pruned = copy.deepcopy(trained.model)
        trained.tune(pruned, settings, "tuned", masks)
        for name, parameter in pruned.named_parameters():
            assert (parameter[~masks[name]] == 0).all()
        assert all(torch.equal(t, before[n]) for n, t in trained.model.state_dict().items())
        assert [r.log_evidence is not None for r in records] == [settings.method == "spam"] * 4
        return pruned

    whole = tune(tmp_path / "whole", dies=False)
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "killed", dies=True)
    resumed = tune(tmp_path / "killed", dies=False)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not list(tmp_path.rglob("*.checkpoint.safetensors"))


def test_a_taught_network_comes_nearer_to_its_teacher(tmp_path: Path) -> None:
    """The teacher is in evaluation mode meanwhile, and in its own mode afterwards."""
    trained = subject(tmp_path)
    inputs, _ = next(iter(trained.bench.data.test.loader(200)))
    modes = []
    trained.model.train()
    trained.model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    trained.bench.folder.mkdir(parents=True)

    def distance(changes: dict[str, Any]) -> float:
        student = create_model(trained.bench.recipe, 1)
        name = f"tuned{len(modes)}"
        trained.tune(student, finetune(epochs=20, **changes), name)
        with torch.no_grad():
            target = trained.model(inputs).log_softmax(1)
            gap = student(inputs).log_softmax(1) - target
        return (target.exp() * -gap).sum(1).mean().item()

    alone = distance({})
    assert modes == [True]  # it was not asked
    modes.clear()
    taught = distance({"distil": {"weight": 1.0, "temperature": 1.0}})
    assert set(modes[:-1]) == {False}
    assert trained.model.training
    assert taught < 0.05 < alone


def test_fine_tuning_by_map_is_under_a_fixed_prior(tmp_path: Path) -> None:
    """With rates and precisions that shrink all weights by a known factor."""
    here = bench(tmp_path)
    here.folder.mkdir(parents=True)
    settings = finetune(
        epochs=1,
        optimiser={"name": "sgd", "lr": 1e-9, "momentum": 0.0, "min_lr": 0.0},
        prior={"precision": 1e9},
        temperature=2.0,
    )
    model = create_model(here.recipe, 0)
    before = copy.deepcopy(model)
    train_on(here, model, settings, "tuned")
    samples = len(here.data.train)
    factor, steps = 1.0, len(here.data.train.loader(64))
    for step in range(steps):
        rate = 1e-9 * 0.5 * (1 + math.cos(math.pi * step / steps))
        factor /= 1 + rate * 1e9 * 2.0 / samples
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(a, factor * b, rtol=1e-4, atol=1e-6)


def norm_states(path: Path) -> dict[str, Tensor]:
    return {n: t for n, t in load_file(path / "model.safetensors").items() if "running" in n}


@pytest.mark.usefixtures("blank_figures")
def test_masked_networks_are_recalibrated_too(tmp_path: Path) -> None:
    unstructured = {"kind": "unstructured", "sparsities": [0.5], "criteria": ["magnitude"]}
    fours = {"kind": "semi_structured", "criteria": ["magnitude"]}
    found = recipe(
        data={"name": "digits"},
        model={"name": "test_resnet", "kwargs": {"in_chans": 1, "num_classes": 10}},
        train={"map": {"method": "map", "epochs": 1, "batch_size": 256, "optimiser": ADAM}},
        prune=[e | {"recalibrate": anew} for e in (unstructured, fours) for anew in (False, True)],
    )
    (cell,) = sp.run(found, tmp_path / "run").cells
    for records in (cell.masked, cell.patterned):
        plain, anew = records
        by_hand = sp.load(tmp_path / "run" / plain.artifact)
        sp.recalibrate(by_hand, load_data(found).train.loader(256, seed=0))
        torch.testing.assert_close(
            norm_states(tmp_path / "run" / anew.artifact),
            {n: t for n, t in by_hand.state_dict().items() if "running" in n},
        )
        assert anew.pruned != plain.pruned


@pytest.mark.usefixtures("blank_figures")
def test_recalibration_comes_before_the_just_pruned_accuracy(tmp_path: Path) -> None:
    """And a network from scratch takes statistics of its own, though fine-tuning freezes them."""
    structured = {"kind": "structured", "targets": [{"ratio": 0.5}], "criteria": ["random"]}
    tuned = {"epochs": 1, "batch_size": 256, "optimiser": ADAM}
    found = recipe(
        data={"name": "digits"},
        model={"name": "test_resnet", "kwargs": {"in_chans": 1, "num_classes": 10}},
        train={"map": {"method": "map", "epochs": 1, "batch_size": 256, "optimiser": ADAM}},
        prune=[
            structured,
            structured | {"recalibrate": True, "finetune": tuned, "scratch": ADAM},
            structured
            | {"recalibrate": True, "finetune": tuned | {"norms": "frozen"}, "scratch": ADAM},
        ],
    )
    (cell,) = sp.run(found, tmp_path / "run").cells
    plain, trained, frozen = cell.compacted
    assert plain.pruned != trained.pruned == frozen.pruned
    assert plain.residual == frozen.residual
    by_hand = sp.load(tmp_path / "run" / plain.artifact)
    recalibrate(by_hand, load_data(found).train.loader(256, seed=0))
    states = {n: t for n, t in by_hand.state_dict().items() if "running" in n}
    kept, moved = (norm_states(tmp_path / "run" / r.artifact) for r in (frozen, trained))
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, states[name])
        assert not torch.equal(tensor, moved[name])
    assert frozen.finetuned != trained.finetuned
    assert frozen.scratch == trained.scratch
