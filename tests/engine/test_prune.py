from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import spamprune as sp
from spamprune import data as data_sets
from spamprune.artifact import read_config
from spamprune.data import DataSet
from spamprune.engine import network
from spamprune.engine.prune import Outcome, Request, prune
from spamprune.engine.stages import Stages
from spamprune.errors import OutputError, PruningError, TrainingError
from spamprune.pruning import cost
from spamprune.report import measure
from tests.data.conftest import image_root  # noqa: F401  a fixture


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return data_sets.load("digits", validation=0)


def work(
    name: str, data: DataSet, out: Path, request: Request
) -> tuple[network.Network, Outcome, str]:
    said = io.StringIO()
    found = network.find(name, data, random=True)
    outcome = prune(found, data, request, out, Stages(Console(file=said, width=200)))
    return found, outcome, said.getvalue()


def test_everything_is_done_measured_and_saved(digits: DataSet, tmp_path: Path) -> None:
    request = Request(
        sp.Target(macs=0.5), calibration=200, epochs=2, lr=3e-3, kinds=("width", "hidden")
    )
    out = tmp_path / "new" / "small"
    found, outcome, said = work("test_resnet", digits, out, request)
    dense, pruned = outcome.sizes["dense"], outcome.sizes["pruned"]
    assert pruned.macs <= 0.5 * dense.macs
    assert set(pruned.latency) == {1, 32}
    assert list(outcome.accuracy) == ["dense", "pruned", "recalibrated", "fine-tuned"]
    assert outcome.accuracy["fine-tuned"] > 50 > outcome.accuracy["pruned"]
    assert outcome.residual <= 1e-4
    for stage in ("Laplace posterior on 200", "plan for macs 0.5 by opd", "epoch 2: loss"):
        assert stage in said

    small = sp.load(out)
    again = measure.quality(small, digits.test.loader(64))
    assert again.accuracy == pytest.approx(outcome.accuracy["fine-tuned"])
    assert cost.params(small) == pruned.params
    plan = sp.Plan.from_json((out / "plan.json").read_text())
    assert plan == outcome.plan
    shapes = [p.shape for p in sp.apply(found.model, plan).parameters()]
    assert shapes == [p.shape for p in small.parameters()]
    config = read_config(out)
    assert config.metrics["accuracy on digits (%)"]["saved"] == outcome.accuracy["fine-tuned"]  # type: ignore[index]
    assert config.preprocessing is not None
    assert config.preprocessing.input_size == [1, 8, 8]
    assert config.extra["criterion"] == "opd"


def test_the_evidence_says_how_far(digits: DataSet, tmp_path: Path) -> None:
    request = Request(None, calibration=200, batch_size=200, ranking="global")
    found, outcome, said = work("test_resnet", digits, tmp_path / "o", request)
    assert "plan for the most evidence by opd" in said
    some = [next(iter(digits.train.loader(200, seed=0)))]
    posterior = sp.fit_posterior(found.model, some, n_data=len(digits.train), seed=0)
    scores = sp.scores.opd(found.model, posterior)
    target = sp.Target(evidence=sp.Evidence(found.model, posterior, some))
    by_hand = sp.plan(found.model, some[0][0][:1], scores, target, ranking="global")
    assert outcome.plan == by_hand
    assert outcome.sizes["pruned"].params < outcome.sizes["dense"].params


def test_an_artifact_is_pruned_again(digits: DataSet, tmp_path: Path) -> None:
    request = Request(sp.Target(ratio=0.3), calibration=65, batch_size=64, criterion="taylor")
    _, first, _ = work("test_resnet", digits, tmp_path / "1", request)
    found = network.find(str(tmp_path / "1"), digits)
    second = prune(found, digits, request, tmp_path / "2", Stages(Console(file=io.StringIO())))
    assert second.accuracy["dense"] == pytest.approx(first.accuracy["recalibrated"])
    assert second.sizes["dense"].params == first.sizes["pruned"].params
    sizes = [f"{second.sizes[stage].params:,}" for stage in ("dense", "pruned")]
    (row,) = re.findall(r"\| parameters \|(.*)\|", (tmp_path / "2" / "README.md").read_text())
    assert [cell.strip() for cell in row.split("|") if cell.strip()] == sizes
    assert cost.params(sp.load(tmp_path / "2")) < 0.8 * second.sizes["dense"].params


def test_a_folder_of_images_and_a_network_without_batchnorm(
    image_root: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    data = data_sets.load("image_folder", root=image_root, validation=0)
    request = Request(sp.Target(params=0.5), epochs=1, batch_size=5, augment="flip")
    _, outcome, said = work("test_vit", data, tmp_path / "o", request)
    assert outcome.sizes["pruned"].params <= 0.5 * outcome.sizes["dense"].params
    assert list(outcome.accuracy) == ["dense", "pruned", "fine-tuned"]
    assert "there are none" in said
    config = read_config(tmp_path / "o")
    assert config.preprocessing is not None
    assert config.preprocessing.crop_pct == 0.95


def test_calibration_draws_on_training_data_alone(digits: DataSet, tmp_path: Path) -> None:
    class Forbidden:
        def loader(self, *_: object, **__: object) -> object:
            raise AssertionError("test data")

        def __len__(self) -> int:
            return 1

    forbidden = replace(digits, test=Forbidden())  # type: ignore[arg-type]
    request = Request(sp.Target(ratio=0.5), calibration=100)
    with pytest.raises(AssertionError, match="test data"):
        work("test_resnet", forbidden, tmp_path / "o", request)  # to measure the accuracy

    def plan(data: DataSet, out: str) -> sp.Plan:
        return work("test_resnet", data, tmp_path / out, request)[1].plan

    other = replace(digits, test=digits.train)
    assert plan(digits, "a") == plan(other, "b")


def test_a_place_in_use_is_refused(digits: DataSet, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(OutputError, match="not an empty folder"):
            work("test_resnet", digits, out, Request(sp.Target(ratio=0.5)))


@pytest.mark.parametrize(
    ("name", "request_", "error", "message"),
    [
        (
            "resnet10t",
            Request(sp.Target(ratio=0.3), batch_size=718, epochs=1),
            TrainingError,
            "batch size: batches of 718 of 1437 .* BatchNorm in ResNet cannot normalise",
        ),
        ("test_resnet", Request(sp.Target(ratio=0.001)), PruningError, "removes no unit"),
        ("test_resnet", Request(sp.Target(macs=0.001)), PruningError, "cannot be reached"),
    ],
)
def test_what_cannot_work_leaves_no_folder(
    digits: DataSet,
    tmp_path: Path,
    name: str,
    request_: Request,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        work(name, digits, tmp_path / "o", request_)
    assert not (tmp_path / "o").exists()


def test_fine_tuning_is_under_the_prior_of_the_decay(
    digits: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spamprune.engine import prune as module

    precisions = []

    def spam(*arguments: Any, **settings: Any) -> sp.SpaM:
        precisions.append(settings["precision"])
        return sp.SpaM(*arguments, **settings)

    monkeypatch.setattr(module, "SpaM", spam)
    for decay in (None, 0.01):
        request = Request(sp.Target(ratio=0.5), calibration=10_000, epochs=1, decay=decay)
        work("test_resnet", digits, tmp_path / f"{decay}", request)
    assert precisions == [1.0, pytest.approx(0.01 * len(digits.train))]
    assert read_config(tmp_path / "None").extra["calibration samples"] == len(digits.train)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"criterion": "opdd"}, PruningError, "unknown criterion 'opdd': did you mean 'opd'"),
        ({"ranking": "globl"}, PruningError, "unknown ranking 'globl': did you mean 'global'"),
        ({"kinds": ("head",)}, PruningError, "unknown kind of units 'head': did you mean 'heads'"),
        ({"augment": "crop"}, PruningError, "unknown augmentation 'crop'"),
        ({"lr": 0.0}, TrainingError, "learning rate 0.0 is out of range"),
        ({"lr": float("nan")}, TrainingError, "learning rate nan is out of range"),
    ],
)
def test_requests_are_checked(
    fields: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Request(sp.Target(ratio=0.5), **fields)  # type: ignore[arg-type]


def test_the_network_given_is_left_as_it_is(digits: DataSet, tmp_path: Path) -> None:
    found = network.find("test_resnet", digits, random=True)
    before = {key: tensor.clone() for key, tensor in found.model.state_dict().items()}
    request = Request(sp.Target(ratio=0.5), calibration=100, epochs=1)
    prune(found, digits, request, tmp_path / "o", Stages(Console(file=io.StringIO())))
    for key, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, before[key])
