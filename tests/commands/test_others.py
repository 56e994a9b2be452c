"""zoo, push and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import spamprune as sp
from spamprune import artifact, models, zoo
from spamprune.cli import app


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> zoo.Card:
    made = zoo.Card(
        model="net",
        family="nets",
        outcome="full",
        command="spamprune zoo check net",
        ratio=0.5,
        kinds=["hidden"],
        parameters=zoo.Size(dense=4, pruned=1, remain=0.25),
        left_whole=["a: why"],
        difference=0.3,
        must_agree=False,
        inner_difference=1e-7,
    )
    monkeypatch.setattr(zoo, "check", lambda name, *, ratio, kinds: made)
    monkeypatch.setattr(zoo, "cards", lambda: [made])
    return made


def test_cards_are_listed(card: zoo.Card) -> None:
    status, printed, _ = call("zoo")
    assert status == 0
    row = ["net", "nets", "full", "0.5", "25.0%", "-", "-", "1e-07", "1"]
    assert row in [line.split() for line in printed.splitlines()]


def test_a_card_is_printed_or_written(card: zoo.Card, tmp_path: Path) -> None:
    status, printed, said = call("zoo", "check", "net")
    assert status == 0
    assert zoo.Card.model_validate(yaml.safe_load(printed)) == card
    assert said.startswith("net at ratio 0.5 … ")
    path = tmp_path / "net.yaml"
    assert call("zoo", "check", "net", "--out", path)[1] == f"card: {path}\n"
    assert zoo.Card.model_validate(yaml.safe_load(path.read_text())) == card


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    for arguments, message in (
        (["zoo", "check", "resnett"], "error: unknown model 'resnett'"),
        (["zoo", "check", "test_vit", "--kinds", "head"], "error: unknown kind of units 'head'"),
        (["zoo", "check", "test_vit", "--ratio", "1"], "error: target ratio=1.0 is out of range"),
        (["push", tmp_path, "owner/name"], f"error: {tmp_path / 'config.json'} is missing"),
        (["export", tmp_path, "x.onnx"], f"error: {tmp_path / 'config.json'} is missing"),
        (["export", tmp_path, "x.tflite"], "error: x.tflite would hold onnx: let its name end in"),
    ):
        status, _, said = call(*arguments)
        assert status == 2
        assert said.splitlines()[-1].startswith(message)


def test_push_passes_on_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def push(folder: Path, repository: str, **options: Any) -> str:
        asked.append((folder, repository, options))
        return "https://there"

    monkeypatch.setattr(artifact, "push", push)
    status, printed, _ = call("push", "dir", "owner/name", "--private", "--revision", "small")
    assert (status, printed) == (0, "https://there\n")
    assert asked == [(Path("dir"), "owner/name", {"private": True, "revision": "small"})]


def test_export_writes_the_file(tmp_path: Path) -> None:
    sp.save(models.create("test_resnet", num_classes=3), tmp_path / "a")
    file = tmp_path / "net.pt2"
    status, printed, _ = call("export", tmp_path / "a", file)
    assert status == 0
    assert printed.startswith(f"{file}: differs from the network by ")
    assert file.exists()
