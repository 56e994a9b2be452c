"""The recipes that come with spamprune."""

from __future__ import annotations

from pathlib import Path

from spamprune.errors import RecipeError, nearest

_PACKAGE = Path(__file__).parents[1]


def folder(name: str) -> Path:
    """Return the bundled folder ``name`` ("recipes" or "zoo"): of the wheel, or the checkout."""
    installed = _PACKAGE / f"_{name}"
    return installed if installed.is_dir() else _PACKAGE.parent / name


def recipes() -> dict[str, Path]:
    """Return the files of the bundled recipes, by name."""
    return {path.stem: path for path in sorted(folder("recipes").glob("*.yaml"))}


def find(source: str | Path) -> Path:
    """Return the file of a recipe, given as a path or as the name of a bundled one.

    Raises:
        RecipeError: There is no such file and no such name.
    """
    path = Path(source)
    if path.is_file():
        return path
    bundled = recipes()
    if str(source) in bundled:
        return bundled[str(source)]
    choices = [*bundled, *map(str, path.parent.glob("*.yaml"))]
    hint = nearest(str(source), choices) if choices else "`spamprune recipes` lists those"
    raise RecipeError(f"no recipe {str(source)!r}, neither a file nor a bundled one: {hint}")
