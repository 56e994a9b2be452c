"""The README's examples, run as they stand."""

import re
import shlex
from pathlib import Path

import click
import pytest
import torch
import typer
from typer.testing import CliRunner

import spamprune as sp
from spamprune.cli import app
from spamprune.models.classic import lenet
from spamprune.pruning import cost

README = Path(__file__).parents[1] / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


class Loader(list):
    dataset = range(256)


@pytest.mark.parametrize(
    "code",
    blocks("python"),
    ids=["torch-pruning", "training loop", "plan", "evidence", "curvature"],
)
def test_python_examples_run_and_prune(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = lenet()
    loader = Loader((torch.randn(128, 1, 28, 28), torch.randint(0, 10, (128,))) for _ in range(2))
    names = {
        "model": model,
        "loader": loader,
        "example": torch.randn(1, 1, 28, 28),
        "in_order": loader,
        "decay": 1e-3,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    }
    exec(code, names)
    if "coverage" in code:
        assert "'conv1.weight': 'kron: conv2d'" in capsys.readouterr().out
        return
    if "text" in names:
        plan = sp.Plan.from_json(names["text"])
        assert cost.macs(sp.apply(model, plan), names["example"]) <= 0.6 * cost.macs(
            model, names["example"]
        )
        return
    if "evidence" in names:  # random labels: what the data determine is all that may decide
        assert names["plan"].target == {"evidence": True}
        assert names["plan"].widths()
        return
    small = names.get("small", model)
    assert sum(p.numel() for p in small.parameters()) < 0.6 * 60_170
    if "small" in names:
        again = sp.load(tmp_path / "small", factory=lenet)
        assert torch.equal(again(names["example"]), small.eval()(names["example"]))


def test_the_torch_pruning_example_has_five_lines():
    lines = [line for line in blocks("python")[0].splitlines() if line]
    assert len([line for line in lines if not line.startswith("import ")]) <= 5


def commands():
    for block in blocks("sh"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "spamprune":
                yield words[1:]


#: Commands that work on networks and data that are not here: only their form is checked.
ELSEWHERE = {"prune", "push", "export", "compare"}


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_commands_are_valid(words, monkeypatch):
    monkeypatch.chdir(README.parent)
    if words[0] in ELSEWHERE or words[:2] == ["zoo", "check"]:
        command = typer.main.get_command(app)
        while isinstance(command, click.Group):
            command, words = command.commands[words[0]], words[1:]
        command.make_context(command.name, list(words))
        return
    if ">" in words:
        words = words[: words.index(">")]
    if words[0] == "run":  # checked without running it
        options = [w for w in words[1:] if "=" in w or "/" in w or "@" in w or w.isidentifier()]
        out = words.index("--out") + 1 if "--out" in words else None
        options = [w for w in options if out is None or w != words[out]]
        words = ["validate", *options]
    assert CliRunner().invoke(app, words).exit_code == 0
