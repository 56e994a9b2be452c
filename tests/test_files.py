import pytest
import torch
from safetensors.torch import load_file

from spamprune import files
from spamprune.errors import OutputError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    files.write_text(path, "old")

    def fail():
        with files.replacing(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_tensors_of_any_layout_are_written_and_shared(tmp_path):
    shared = torch.arange(6.0)
    tensors = {"a": shared.view(2, 3).T, "b": shared, "c": torch.ones(()).expand(4)}
    files.write_tensors(tmp_path / "deep/t.safetensors", tensors, {"x": "y"})
    loaded = load_file(tmp_path / "deep/t.safetensors")
    assert all(torch.equal(loaded[k], t) for k, t in tensors.items())
    assert (tmp_path / "deep/t.safetensors").stat().st_mode & 0o044


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise files.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OutputError, match=r"t\.safetensors.*No space left"):
        files.write_tensors(tmp_path / "t.safetensors", {"a": torch.ones(1)}, {})
    assert list(tmp_path.iterdir()) == []
