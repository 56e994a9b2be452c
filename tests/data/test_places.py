from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from spamprune.data.places import FileSet, locate
from spamprune.errors import DataError


def no_download(parent: Path) -> None:
    raise AssertionError("nothing may be downloaded here")


FILES = FileSet("toy", "Toy/raw", ("a", "b"), "http://example.org", no_download)


def fill(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a").write_bytes(b"a")
    (folder / "b.gz").write_bytes(b"b")
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test an empty home and no data folder."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SPAMPRUNE_DATA", raising=False)
    return home


def test_root_is_the_folder_itself_or_its_parent(tmp_path: Path) -> None:
    folder = fill(tmp_path / "parent" / "Toy" / "raw")
    expected = {"a": folder / "a", "b": folder / "b.gz"}
    assert locate(FILES, folder) == expected
    assert locate(FILES, tmp_path / "parent") == expected


def test_incomplete_root_names_folder_and_file_and_falls_through_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPAMPRUNE_DATA", str(tmp_path / "good"))
    fill(tmp_path / "good" / "Toy" / "raw")
    with pytest.raises(DataError, match=r"data\.root: no folder .*missing"):
        locate(FILES, tmp_path / "missing")
    (tmp_path / "bad").mkdir()
    with pytest.raises(DataError, match=r"data\.root: folder .*bad has no file a "):
        locate(FILES, tmp_path / "bad")
    partial = fill(tmp_path / "partial" / "Toy" / "raw")
    (partial / "b.gz").unlink()
    with pytest.raises(DataError, match=r"data\.root: folder .*Toy/raw has no file b "):
        locate(FILES, tmp_path / "partial")


def test_usual_places_in_order(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = tmp_path / "system"
    files = replace(FILES, system=system)
    cached = fill(home / ".cache" / "spamprune" / "Toy" / "raw")
    assert locate(files, None)["a"] == cached / "a"
    fill(system)
    assert locate(files, None)["a"] == system / "a"
    monkeypatch.setenv("SPAMPRUNE_DATA", str(tmp_path / "data"))
    own = fill(tmp_path / "data" / "Toy" / "raw")
    assert locate(files, None)["a"] == own / "a"
    (own / "a").unlink()
    with pytest.raises(DataError, match=r"data/Toy/raw has no file a"):
        locate(files, None)


def test_data_folder_without_this_set_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPAMPRUNE_DATA", str(tmp_path))
    system = fill(tmp_path / "system")
    assert locate(replace(FILES, system=system), None)["a"] == system / "a"
    monkeypatch.setenv("SPAMPRUNE_DATA", str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"SPAMPRUNE_DATA: no folder .*gone"):
        locate(FILES, None)


def test_download_is_cached(home: Path) -> None:
    files = replace(FILES, download=lambda parent: fill(parent / "Toy" / "raw"))
    found = locate(files, None)
    assert found["a"] == home / ".cache" / "spamprune" / "Toy" / "raw" / "a"
    assert locate(FILES, None) == found  # FILES cannot download
    assert [path.name for path in (home / ".cache" / "spamprune").iterdir()] == ["Toy"]


def test_failed_download_says_what_was_tried_and_leaves_nothing(tmp_path: Path, home: Path) -> None:
    def fail(parent: Path) -> None:
        (parent / "Toy" / "raw").mkdir(parents=True)
        (parent / "Toy" / "raw" / "a").write_bytes(b"half")
        raise RuntimeError("Error downloading b:\nno route to host")

    files = replace(FILES, download=fail, system=tmp_path / "sys", way_out="apt install toys")
    with pytest.raises(DataError) as caught:
        locate(files, None)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("toy", str(tmp_path / "sys"), ".cache/spamprune/Toy/raw", "http://example.org"):
        assert part in message
    assert message.endswith("(Error downloading b: no route to host): apt install toys")
    assert list((home / ".cache" / "spamprune").iterdir()) == []
