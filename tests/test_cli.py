from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from spamprune.cli import app
from spamprune.errors import OutputError
from spamprune.recipe import library, reference
from spamprune.recipe.schema import Recipe, RecipeFile
from spamprune.report.results import Cell, Compacted, Masked, Quality, Results, Size

RECIPE = """\
name: small
description: |
  What it shows.
  And more.
seeds: [0, 1]
data: {name: cancer}
model: {name: fc_cancer}
train:
  map: {method: map}
  spam: {}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    return "r.yaml"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Results]], None]:
    """Return a function that puts another function in the place of ``engine.run.run``."""

    def install(run: Callable[..., Results]) -> None:
        module = ModuleType("spamprune.engine.run")
        module.__dict__["run"] = run
        monkeypatch.setitem(sys.modules, "spamprune.engine.run", module)

    return install


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def quality(accuracy: float) -> Quality:
    return Quality(accuracy=accuracy, nll=0.1, ece=0.01, brier=0.1)


def results() -> Results:
    size = Size(params=10, nonzero=10, macs=10, bytes=40)
    small: dict[str, Any] = {"notes": [], "widths": {}, "residual": 0.0, "size": size}

    def cell(seed: int, accuracy: float) -> Cell:
        return Cell(
            training="spam",
            method="spam",
            seed=seed,
            folder=f"spam/{seed}",
            dense=quality(accuracy),
            validation=None,
            size=size,
            log_evidence=-100.0 - seed,
            train_seconds=1.0,
            history=[],
            masked=[
                Masked(
                    experiment=0,
                    criterion="opd",
                    requested=0.95,
                    achieved=0.95,
                    nonzero=670,
                    artifact="m",
                    pruned=quality(accuracy - 40),
                    finetuned=quality(accuracy - 10),
                )
            ],
            compacted=[
                Compacted(
                    experiment=1,
                    criterion="obd",
                    ranking="uniform",
                    target={"macs": 0.1},
                    achieved={"macs": 0.1},
                    pruned=quality(accuracy - 20),
                    artifact="a",
                    **small,
                )
            ],
        )

    return Results(
        name="small",
        description="",
        data={},
        environment={},
        train_seconds=1.0,
        cells=[cell(0, 90.0), cell(1, 92.0)],
    )


def test_run_passes_on_what_was_asked_and_prints_a_summary(
    recipe: str, engine: Callable[..., None]
) -> None:
    calls: list[tuple[Recipe, Path, bool, int]] = []

    def run(recipe: Recipe, out: Path, *, resume: bool, jobs: int) -> Results:
        calls.append((recipe, out, resume, jobs))
        return results()

    engine(run)
    status, out, _ = call("run", recipe, "seeds=[7]", "--out", "o", "--resume", "--jobs", "2")
    assert status == 0
    assert [(c[0].seeds, *c[1:]) for c in calls] == [([7], Path("o"), True, 2)]
    rows = [line.split() for line in out.splitlines()]
    assert ["spam", "2", "91.00", "±", "1.00", "-100.5"] in rows
    assert ["spam", "opd", "81.0"] in rows
    assert ["spam", "obd", "71.0"] in rows
    assert out.splitlines()[-1] == f"report: {Path('o') / 'report.html'}"


def test_results_go_to_a_folder_of_the_recipe_s_name(
    recipe: str, engine: Callable[..., None]
) -> None:
    def run(recipe: Recipe, out: Path, *, resume: bool, jobs: int) -> Results:
        assert (out, resume, jobs) == (Path("runs/small"), False, 1)
        return results()

    engine(run)
    assert call("run", recipe)[0] == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("map: {", "map: {epochs: -3, ", "r.yaml:9: train.map.epochs: -3 is not valid: input"),
        ("name: cancer", "name: cancr", "r.yaml:6: data.name: unknown data set 'cancr': did you"),
        ("name: fc_cancer", "name: fc_cancr", "r.yaml:7: model.name: unknown model 'fc_cancr': "),
        ("seeds: [0, 1]", "seeds: [0, 1", "r.yaml:6: not valid YAML: "),
    ],
)
def test_a_wrong_recipe_is_one_line_and_leaves_nothing(
    recipe: str, old: str, new: str, message: str
) -> None:
    Path(recipe).write_text(RECIPE.replace(old, new))
    for command in ("run", "validate"):
        status, out, err = call(command, recipe)
        assert (status, out) == (2, "")
        assert err.startswith(f"error: {message}")
        assert len(err.splitlines()) == 1
    assert os.listdir() == ["r.yaml"]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (OutputError("o is\ntaken"), 2, "error: o is taken\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device\n"),
        (OSError(errno.EROFS, "Read-only", "o/x"), 2, "error: o/x: Read-only\n"),
        (PermissionError(errno.EACCES, "Permission denied", "o"), 2, "error: o: Permission den"),
        (KeyboardInterrupt(), 130, "stopped; go on with --resume\n"),
    ],
)
def test_what_stops_a_run_is_one_line(
    recipe: str, engine: Callable[..., None], error: BaseException, status: int, message: str
) -> None:
    def run(*_: Any, **__: Any) -> Results:
        raise error

    engine(run)
    found, _, err = call("run", recipe)
    assert found == status
    assert err.startswith(message)
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError(errno.EBADF, "a bug")])
def test_bugs_keep_their_traceback(
    recipe: str, engine: Callable[..., None], error: Exception
) -> None:
    def run(*_: Any, **__: Any) -> Results:
        raise error

    engine(run)
    with pytest.raises(type(error)):
        call("run", recipe)


def test_validate_says_what_would_run(recipe: str) -> None:
    status, out, _ = call("validate", recipe, "seeds=[5]")
    assert status == 0
    assert out == (
        "ok: small, fc_cancer on cancer; trainings: map, spam; seeds: 5; pruning experiments: 0\n"
    )


def test_validate_prints_every_problem(recipe: str) -> None:
    status, _, err = call("validate", recipe, "threads=0", "nam=x", "seeds=[-1]")
    assert status == 2
    assert [line.split(": ")[:2] for line in err.splitlines()] == [
        ["error", "override nam=x"],
        ["error", "override threads=0"],
        ["error", "override seeds=[-1]"],
    ]


@pytest.mark.parametrize("arguments", [["run"], ["frobnicate"], ["run", "r.yaml", "--jobs", "0"]])
def test_wrong_usage_exits_with_2(recipe: str, arguments: list[str]) -> None:
    assert call(*arguments)[0] == 2


def test_an_unknown_recipe_exits_with_2(recipe: str) -> None:
    status, _, err = call("run", "r.yml")
    assert status == 2
    assert err.startswith(
        "error: no recipe 'r.yml', neither a file nor a bundled one: did you mean"
    )
    assert "'r.yaml'" in err


def test_the_schema_is_json_schema() -> None:
    status, out, _ = call("schema")
    assert status == 0
    schema = json.loads(out)
    assert schema["properties"].keys() == RecipeFile.model_json_schema()["properties"].keys()
    # a recipe that extends another may leave out what that one says, in its sections too
    extending, whole = schema["anyOf"]
    assert "required" not in schema
    assert extending == {"required": ["extends"]}
    assert whole["required"] == ["name", "data", "model", "train"]
    assert whole["properties"]["data"] == {"required": ["name"]}
    needing = {name for name, section in schema["$defs"].items() if "required" in section}
    assert needing == {"Unstructured", "SemiStructured", "Structured"}  # entries of a list


def test_the_schema_is_tables_to_read() -> None:
    status, out, _ = call("schema", "--markdown")
    assert status == 0
    assert out == reference.markdown()


def test_recipes_are_listed_with_the_first_line_of_their_description(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "recipes", lambda: {"small": Path("r.yaml")})
    assert call("recipes") == (0, "small  What it shows.\n", "")


def test_data_sets_are_listed() -> None:
    status, out, _ = call("data")
    assert status == 0
    assert any(line.startswith("cancer ") and "breast" in line for line in out.splitlines())


def test_the_version_is_printed() -> None:
    status, out, _ = call("--version")
    assert status == 0
    assert out.startswith("spamprune 0.")


def test_a_report_of_no_run_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("spamprune.report.page")
    status, _, err = call("report", str(tmp_path))
    assert status == 2
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


def test_as_a_process(recipe: str) -> None:
    Path(recipe).write_text("name: small\nseeds: [0\nthreads: 1\n")
    command = [sys.executable, "-m", "spamprune", "run", recipe]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: r.yaml:3: not valid YAML: ")
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir() == ["r.yaml"]


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, spamprune.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    status, _, err = call("compare", str(tmp_path), "--out", str(tmp_path / "out"))
    assert status == 2
    assert str(tmp_path) in err
