"""The hub, with a cache laid out as its client does and a stand-in for its server."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import huggingface_hub
import pytest

from spamprune.artifact import load, push, save
from spamprune.errors import ArtifactError
from tests.artifact.cases import GREY, Net, assert_same, edit

FIRST, SECOND = "a" * 40, "b" * 40  # commits


def publish(cache: Path, folder: Path, commit: str, names: list[str], *refs: str) -> None:
    """Put files into the hub client's cache: links from a snapshot to blobs named by content."""
    repository = cache / "models--someone--small"
    snapshot = repository / "snapshots" / commit
    for directory in (snapshot, repository / "blobs", repository / "refs"):
        directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        blob = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        shutil.copy(folder / name, repository / "blobs" / blob)
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    for ref in refs:
        (repository / "refs" / ref).write_text(commit)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The client's cache, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


FILES = ["config.json", "model.safetensors"]


def test_load_from_the_hub(small: Path, cache: Path) -> None:
    publish(cache, small, FIRST, FILES, "main", "v1")
    expected = load(small)
    for revision in ("", "@v1", f"@{FIRST}"):
        assert_same(expected, load(f"hf-hub:someone/small{revision}"), GREY)


def test_files_come_from_one_commit(
    small: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(cache, small, FIRST, FILES, "main")
    expected = load(small)
    download = huggingface_hub.hf_hub_download
    asked = []

    def move_on(repository: str, name: str, **kwargs: Any) -> str:
        path = download(repository, name, **kwargs)
        asked.append((name, kwargs["revision"]))
        if len(asked) == 1:  # another push, between the two downloads
            publish(cache, save(Net(), tmp_path / "other"), SECOND, FILES, "main")
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", move_on)
    assert_same(expected, load("hf-hub:someone/small"), GREY)
    assert asked == [("config.json", None), ("model.safetensors", FIRST)]


def test_hostile_repository(small: Path, cache: Path) -> None:
    edit(small, lambda config: config["attributes"].update({"conv1": {"forward": 1}}))
    publish(cache, small, FIRST, FILES, "main")
    with pytest.raises(ArtifactError, match=r"models--someone--small.*'forward'"):
        load("hf-hub:someone/small")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("hf-hub:", "''"),
        ("hf-hub:small", "owner/name"),
        ("hf-hub:../small", r"'\.\./small'"),
        ("hf-hub:a/b/c", "'a/b/c'"),
        ("hf-hub:someone/small@", "ends in '@'"),
        ("hf-hub:someone/none", r"config.json of 'hf-hub:someone/none' cannot be downloaded"),
        ("hf-hub:someone/small@../../x", "cannot be downloaded"),
    ],
)
def test_wrong_address(address: str, words: str, cache: Path) -> None:
    with pytest.raises(ArtifactError, match=words) as caught:
        load(address)
    assert "\n" not in str(caught.value)


class Server:
    """Stands in for the hub's API and remembers what it was asked."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    refusal: Exception | None = None

    def __init__(self, **_: Any):
        pass

    def create_repo(self, repository: str, **kwargs: Any) -> None:
        self.calls.append(("create_repo", {"repository": repository, **kwargs}))

    def create_branch(self, repository: str, **kwargs: Any) -> None:
        self.calls.append(("create_branch", {"repository": repository, **kwargs}))

    def upload_folder(self, **kwargs: Any) -> SimpleNamespace:
        if self.refusal is not None:
            raise self.refusal
        self.calls.append(("upload_folder", kwargs))
        return SimpleNamespace(commit_url="https://hub/someone/small/commit/1")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> type[Server]:
    monkeypatch.setattr(huggingface_hub, "HfApi", Server)
    monkeypatch.setattr(Server, "calls", [])
    return Server


def test_push_sends_the_artifact_and_nothing_else(small: Path, server: type[Server]) -> None:
    (small / "notes.txt").write_text("private")
    url = push(small, "someone/small", private=True, revision="v2")
    assert url == "https://hub/someone/small/commit/1"
    names, arguments = zip(*server.calls, strict=True)
    assert names == ("create_repo", "create_branch", "upload_folder")
    assert arguments[0] == {"repository": "someone/small", "private": True, "exist_ok": True}
    assert arguments[2]["allow_patterns"] == ["config.json", "model.safetensors", "README.md"]
    assert arguments[2]["revision"] == "v2"
    # as the client reads those patterns
    sent = huggingface_hub.utils.filter_repo_objects(
        [p.relative_to(small).as_posix() for p in small.rglob("*")],
        allow_patterns=arguments[2]["allow_patterns"],
    )
    assert sorted(sent) == ["README.md", "config.json", "model.safetensors"]


def test_push_of_a_users_class(tmp_path: Path, server: type[Server]) -> None:
    folder = save(Net(), tmp_path / "net")
    (folder / "README.md").unlink()
    push(folder, "someone/small")
    assert server.calls[-1][1]["allow_patterns"] == FILES
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="is damaged"):
        push(folder, "someone/small")


def test_push_checks_first(small: Path, server: type[Server], tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    card = small / "README.md"
    card.unlink()
    card.symlink_to(secret)
    with pytest.raises(ArtifactError, match="is a link"):
        push(small, "someone/small")
    card.unlink()
    with pytest.raises(ArtifactError, match="owner/name"):
        push(small, "small")
    edit(small, lambda config: config["shapes"].update({"conv1.weight": [1]}))
    with pytest.raises(ArtifactError, match=r"conv1.weight"):
        push(small, "someone/small")
    assert server.calls == []


def test_push_names_the_refusal(
    small: Path, server: type[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "refusal", ConnectionError("403 Forbidden\nmore"))
    with pytest.raises(ArtifactError, match=r"'someone/small' \(403 Forbidden\): check"):
        push(small, "someone/small")
