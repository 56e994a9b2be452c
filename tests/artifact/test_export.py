"""Exported networks compute what the network computes, for any batch size."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spamprune.artifact import export, save
from spamprune.artifact.export import _difference
from spamprune.errors import ArtifactError, OutputError
from spamprune.models import Source, create
from tests.artifact.cases import COLOUR, halve

onnxruntime = pytest.importorskip("onnxruntime")
TOLERANCE = 1e-5


def pruned(name: str) -> nn.Module:
    """Return a small network whose sizes differ from those that its name stands for."""
    if name == "test_vit":
        return create(name, num_classes=5, img_size=32, embed_dim=32, num_heads=1)
    model = create(name, num_classes=5)
    return halve(model, COLOUR, model.get_classifier())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_onnx(name: str, tmp_path: Path) -> None:
    model = pruned(name).train()
    path = tmp_path / "deep" / "net.onnx"
    assert export(model, path, torch.randn(COLOUR)) < TOLERANCE
    assert model.training
    assert [file.name for file in path.parent.iterdir()] == ["net.onnx"]
    session = onnxruntime.InferenceSession(path)
    x = torch.randn(5, *COLOUR[1:])
    (y,) = session.run(None, {"input": x.numpy()})
    assert torch.allclose(torch.from_numpy(y), model.eval()(x), atol=1e-5)
    assert session.get_inputs()[0].shape[0] == "batch"
    assert str(Path(torch.__file__).parent).encode() not in path.read_bytes()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_torch(name: str, tmp_path: Path) -> None:
    model = pruned(name)
    path = tmp_path / "net.pt2"
    secret = torch.full((1, *COLOUR[1:]), 0.123456)
    assert export(model, path, secret, format="torch") < TOLERANCE
    x = torch.randn(5, *COLOUR[1:])
    loaded = torch.export.load(path)
    assert torch.allclose(loaded.module()(x), model.eval()(x), atol=1e-6)
    assert not loaded.example_inputs[0][0].any()  # the example does not leave with the file


def test_folder_needs_no_example(tmp_path: Path) -> None:
    source = Source("test_vit", {"num_classes": 5, "img_size": 32})
    folder = save(pruned("test_vit"), tmp_path / "net", source=source)
    assert export(folder, tmp_path / "net.pt2", format="torch") < TOLERANCE
    with pytest.raises(ArtifactError, match="pass an example"):
        export(create("lenet"), tmp_path / "lenet.onnx")


def test_vectors_need_no_example(tmp_path: Path) -> None:
    assert export(create("fc_cancer"), tmp_path / "net.pt2", format="torch") < TOLERANCE


class Branching(nn.Module):
    """What it computes depends on the values, which a trace cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Fixed(nn.Module):
    """Takes batches of two only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1) if x.shape[0] == 2 else x


class Unknown(nn.Module):
    """An operation that ONNX lacks."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x).real


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Branching(), "Branching cannot be exported with a free batch size"),
        (Fixed(), "Fixed cannot be exported with a free batch size"),
        (Unknown(), "ONNX cannot express the model"),
    ],
)
def test_refusals(model: nn.Module, words: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=words) as caught:
        export(model, tmp_path / "net.onnx", torch.ones(1, 3, 3))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_difference_is_an_error(tmp_path: Path) -> None:
    model, x = nn.Linear(2, 2), torch.ones(1, 2)
    with pytest.raises(ArtifactError, match=r"Linear exported as torch differs .* not written"):
        export(model, tmp_path / "a.pt2", x, format="torch", tolerance=-1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_missing_package(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ArtifactError, match=rf"{package} is missing: pip install"):
        export(nn.Linear(2, 2), tmp_path / "net.onnx", torch.ones(1, 2))


def test_measure_of_difference() -> None:
    a = torch.tensor([1.0, 4.0])
    assert _difference([[a]], [[torch.tensor([1.0, 4.5])]]) == 0.125
    assert _difference([[a]], [[a[:1]]]) == float("inf")
    assert _difference([[a]], [[a * float("nan")]]) == float("inf")


def test_names_and_formats(tmp_path: Path) -> None:
    model, x = nn.Linear(2, 2), torch.ones(1, 2)
    with pytest.raises(OutputError, match=r"let its name end in \.onnx"):
        export(model, tmp_path / "net.pt2", x)
    with pytest.raises(ArtifactError, match="unknown format"):
        export(model, tmp_path / "net.pt2", x, format="tflite")  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        export(model, tmp_path / "file" / "net.pt2", x, format="torch")
