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


def split_variant(source: str | Path) -> tuple[str, str | None]:
    """Return the recipe and the variant that ``source`` names: "fc_cancer@smoke" has both."""
    recipe, at, variant = str(source).rpartition("@")
    return (recipe, variant) if at and not Path(source).is_file() else (str(source), None)


def find(source: str | Path, heir: Path | None = None) -> Path:
    """Return the file of a recipe, given as a path or as the name of a bundled one.

    Args:
        source: The path or name.
        heir: The recipe that extends it, which paths are relative to.

    Raises:
        RecipeError: There is no such file and no such name.
    """
    path = Path(source) if heir is None else heir.parent / source
    if path.is_file():
        return path
    bundled = recipes()
    if str(source) in bundled:
        return bundled[str(source)]
    near = {str(Path(source).parent / file.name): file for file in path.parent.glob("*.yaml")}
    own = None if heir is None else heir.resolve()
    choices = [name for name, file in (bundled | near).items() if file.resolve() != own]
    hint = nearest(str(source), choices) if choices else "`spamprune recipes` lists those"
    raise RecipeError(f"no recipe {str(source)!r}, neither a file nor a bundled one: {hint}")
