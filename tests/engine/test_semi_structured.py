"""N:M masks as an experiment of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import spamprune as sp
from spamprune.engine import semi_structured
from spamprune.engine.run import run
from spamprune.errors import PruningError, RecipeError
from spamprune.pruning.semi_structured import is_semi_structured
from spamprune.recipe import dump, load
from spamprune.recipe.schema import Recipe
from spamprune.report import terminal
from spamprune.report.compare import compare
from spamprune.report.results import Results

ADAM = {"name": "adam", "lr": 0.003, "schedule": "constant"}


def recipe(**changes: Any) -> Recipe:
    """Two patterns on the cancer data; the first layer has 30 inputs, in no groups of four."""
    train = {"method": "map", "epochs": 2, "batch_size": 64, "optimiser": ADAM}
    two_of_four = {
        "kind": "semi_structured",
        "criteria": ["opd", "magnitude"],
        "finetune": {"epochs": 3, "optimiser": ADAM},
    }
    base: dict[str, Any] = {
        "name": "tiny",
        "data": {"name": "cancer"},
        "model": {"name": "fc_cancer", "kwargs": {"widths": [30, 12, 8]}},
        "train": {"map": train, "other": train},
        "prune": [
            two_of_four,
            {"kind": "semi_structured", "n": 1, "m": 3, "trainings": ["map"]},
        ],
        "evaluate": {"latency_repeats": 2, "latency_batches": [1]},
    }
    return Recipe.model_validate(base | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return folder, run(recipe(), folder)


def test_masks_hold_through_fine_tuning_and_in_the_artifact(
    finished: tuple[Path, Results],
) -> None:
    folder, results = finished
    first, other = results.cells
    assert [p.pattern for p in first.patterned] == ["2:4", "2:4", "1:3"]
    assert [p.pattern for p in other.patterned] == ["2:4", "2:4"]
    for record in first.patterned[:2]:
        assert record.finetuned is not None
        assert record.finetuned != record.pruned
        small = sp.load(folder / record.artifact)
        assert is_semi_structured(small.fc2.weight)
        assert is_semi_structured(small.head.weight)
        assert small.fc1.weight.count_nonzero() == 30 * 12
        zeros = (12 * 8 + 8 * 2) / 2
        params = sum(p.numel() for p in small.parameters())
        assert record.achieved == pytest.approx(zeros / params)
        assert record.nonzero <= params - zeros  # biases may be zero too
        assert record.notes[0] == "fc1.weight: left whole: 30 inputs are no multiple of 4"
    third = first.patterned[2]
    assert third.finetuned is None
    weight = sp.load(folder / third.artifact).fc1.weight
    assert ((weight.reshape(-1, 3) != 0).sum(1) == 1).all()


def test_without_a_gpu_it_says_that_no_time_is_saved(finished: tuple[Path, Results]) -> None:
    folder, results = finished
    record = results.cells[0].patterned[0]
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert record.compressed_latency == record.half_latency == {}
    assert "no time is saved here" in record.notes[-1]
    assert "no time is saved here" in (folder / "report.html").read_text()
    titles = [str(table.title) for table in terminal.tables(results)]
    assert "prune.0: mean accuracy by pattern" in titles


class _OnGPU:
    """A bench that says its device is a GPU."""

    class accelerator:  # noqa: N801
        device = torch.device("cuda")

    recipe = recipe()

    @staticmethod
    def example() -> torch.Tensor:
        return torch.randn(1, 8)


def test_what_a_gpu_cannot_compress_is_noted() -> None:
    bench: Any = _OnGPU
    half, sparse, (note,) = semi_structured._latencies(bench, nn.Sequential(nn.Linear(8, 4)))
    assert half == sparse == {}
    assert note.startswith("no time is saved here: nothing of Sequential can be compressed")


class _Packed(torch.Tensor):
    """Weights that, like those that torch compresses, can be multiplied by and not be counted."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.count_nonzero:
            raise NotImplementedError
        return super().__torch_function__(func, types, args, kwargs)


def test_a_gpus_latencies_are_of_plain_and_compressed_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What torch compresses is stood in for: it does so on a GPU only."""
    model = nn.Sequential(nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    seen: set[tuple[Any, ...]] = set()
    model[0].register_forward_pre_hook(
        lambda layer, x: seen.add((type(layer.weight), layer.weight.dtype, x[0].dtype))
    )
    monkeypatch.setattr(
        torch.sparse, "to_sparse_semi_structured", lambda weight: weight.as_subclass(_Packed)
    )
    bench: Any = _OnGPU
    half, sparse, notes = semi_structured._latencies(bench, model)
    assert list(half) == list(sparse) == bench.recipe.evaluate.latency_batches
    assert notes == []
    assert seen == {(kind, torch.float16, torch.float16) for kind in (nn.Parameter, _Packed)}
    assert model[0].weight.dtype == torch.float32


@pytest.mark.usefixtures("blank_figures")
def test_a_killed_run_goes_on_and_ends_bit_identical(
    finished: tuple[Path, Results], kill: Callable[[Path, Path, int], None], tmp_path: Path
) -> None:
    """Killed in the first fine-tuning."""
    folder, results = finished
    out = tmp_path / "killed"
    kill(folder / "recipe.yaml", out, 4)
    again = run(recipe(), out, resume=True)
    for cell, resumed in zip(results.cells, again.cells, strict=True):
        assert cell.patterned == resumed.patterned


def test_runs_are_compared_pattern_by_pattern(
    finished: tuple[Path, Results], tmp_path: Path
) -> None:
    folder, results = finished
    text = compare([folder], tmp_path / "out").read_text()
    assert "| 2:4 | magnitude | other |" in text
    accuracy = results.cells[0].patterned[2].pruned.accuracy
    assert (
        f"| 1:3 | opd | map | Diag | MAP | 1 | {100 * results.cells[0].patterned[2].achieved:.1f}"
        in text
    )
    assert f"{accuracy:.2f}" in text
    lines = (tmp_path / "out/comparison.csv").read_text().splitlines()
    assert sum(",semi_structured," in line and ",accuracy," in line for line in lines) == 9


@pytest.mark.parametrize(("n", "m"), [(4, 4), (0, 4), (1, 1)])
def test_patterns_that_are_none_are_refused(n: int, m: int) -> None:
    with pytest.raises(ValidationError):
        recipe(prune=[{"kind": "semi_structured", "n": n, "m": m}])


def test_what_has_no_groups_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    narrow = {"name": "fc_cancer", "kwargs": {"widths": [30, 9, 9]}}
    with pytest.raises(PruningError, match="nothing of MLP can be made 2:4 sparse"):
        run(recipe(model=narrow), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_block_opd_scores_no_single_weights(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(dump(recipe()).replace("criteria: [opd, magnitude]", "criteria: [block_opd]"))
    with pytest.raises(RecipeError, match="unknown criterion 'block_opd'"):
        load(path)
