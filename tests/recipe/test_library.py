from __future__ import annotations

from pathlib import Path

import pytest

from spamprune.errors import RecipeError
from spamprune.recipe import library


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a package whose checkout has one recipe, and enter an empty folder."""
    package = tmp_path / "repo" / "spamprune"
    (tmp_path / "repo" / "recipes").mkdir(parents=True)
    (tmp_path / "repo" / "recipes" / "small.yaml").touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(library, "_PACKAGE", package)
    return package


def test_a_checkout_uses_the_folder_next_to_the_package(package: Path) -> None:
    assert library.recipes() == {"small": package.parent / "recipes" / "small.yaml"}


def test_a_wheel_uses_its_own_folder(package: Path) -> None:
    inside = package / "_recipes"
    inside.mkdir(parents=True)
    (inside / "b.yaml").touch()
    (inside / "a.yaml").touch()
    (inside / "notes.md").touch()
    assert library.recipes() == {"a": inside / "a.yaml", "b": inside / "b.yaml"}


def test_a_file_comes_before_a_bundled_recipe(package: Path) -> None:
    assert library.find("small") == package.parent / "recipes" / "small.yaml"
    Path("small").touch()
    assert library.find("small") == Path("small")


def test_an_unknown_recipe_is_an_error_with_near_names(package: Path) -> None:
    with pytest.raises(RecipeError, match=r"^no recipe 'smal', .*: did you mean 'small'\?$"):
        library.find("smal")
    Path("other.yaml").touch()
    with pytest.raises(RecipeError, match=r"'othr\.yaml', .*: did you mean 'other\.yaml'\?$"):
        library.find(Path("othr.yaml"))
    with pytest.raises(RecipeError, match=r"'\./othr\.yaml', .*: valid: small$"):
        library.find("./othr.yaml", heir=Path("other.yaml"))
