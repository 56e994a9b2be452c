from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

import spamprune as sp
from spamprune.cli import app
from spamprune.data.base import Augment
from spamprune.pruning.compaction import Ranking
from spamprune.pruning.units import KINDS
from tests.data.conftest import image_root  # noqa: F401  a fixture


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["prune", *map(str, arguments)], terminal_width=200)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_a_data_set_by_name(tmp_path: Path) -> None:
    out = tmp_path / "o"
    status, printed, progress = call(
        "test_resnet", "--random", "--data", "digits", "--ratio", 0.5, "--out", out,
        "--calibration", 100,
    )  # fmt: skip
    assert status == 0
    rows = {line.split("  ")[0].strip(): line.split() for line in printed.splitlines()}
    dense, pruned, remain = rows["parameters"][1:]
    small = sum(p.numel() for p in sp.load(out).parameters())
    assert int(pruned.replace(",", "")) == small
    assert remain == f"{small / int(dense.replace(',', '')):.1%}"
    assert rows["accuracy, %"][2:] == ["dense", "pruned", "recalibrated"]
    assert all(0 <= float(value) <= 100 for value in rows["test"][1:])
    assert "note: difference from the masked network: " in printed
    assert printed.splitlines()[-1] == f"artifact: {out}"
    assert [line.partition(" … ")[0] for line in progress.splitlines()][:3] == [
        "data: digits",
        "network: test_resnet",
        "accuracy of the dense network on 360 test samples",
    ]


def test_a_folder_of_images(image_root: Path, tmp_path: Path) -> None:  # noqa: F811
    status, printed, _ = call(
        "test_vit", "--random", "--data", image_root, "--macs", 0.5, "--out", tmp_path / "o",
        "--kinds", "heads", "--kinds", "hidden", "--ranking", "global",
    )  # fmt: skip
    assert status == 0
    assert "blocks.*.attn.qkv:heads" in printed  # a note for all of its layers
    assert sp.load(tmp_path / "o").num_classes == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "",
            "error: give exactly one of --ratio, --macs, --params, --bytes, --latency, --evidence",
        ),
        ("--ratio 0.5 --evidence", "error: give exactly one of --ratio, --macs"),
        ("--ratio 0.5 --macs 0.5", "error: give exactly one of --ratio, --macs"),
        ("--ratio 0.5 --criterion opdd", "error: unknown criterion 'opdd': did you mean 'opd'"),
        ("--ratio 0.5 --kinds head", "error: unknown kind of units 'head'"),
        ("--ratio 0.5 --data nowhere", "error: unknown data set 'nowhere': "),
        ("--ratio 0.5 --data . --root .", "error: . is the folder of the images itself"),
        ("--ratio 0.5 --weights x --random", "error: model 'test_resnet' is to be random"),
        ("--ratio 0.001 --random", "error: ratio 0.001 removes no unit: ask for more"),
    ],
)
def test_mistakes_are_one_line(arguments: str, message: str, tmp_path: Path) -> None:
    given = ["test_resnet", "--out", tmp_path / "o", "--data", "digits", *arguments.split()]
    status, _, said = call(*given)
    assert status == 2
    assert said.splitlines()[-1].startswith(message)
    assert sum(line.startswith("error: ") for line in said.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_a_seed_beyond_what_generators_take_is_refused(tmp_path: Path) -> None:
    status, _, said = call(
        *("test_resnet", "--random", "--data", "digits", "--ratio", 0.5),
        *("--out", tmp_path / "o", "--seed", 2**32),
    )
    assert status == 2
    assert "--seed" in said


def test_help_names_every_choice() -> None:
    _, text, _ = call("--help")
    for choice in (*get_args(Ranking), *KINDS, *get_args(Augment)):
        assert choice in text
