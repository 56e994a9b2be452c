"""Recipes made from others: ``extends`` names a base, ``variants`` hold named sets of changes.

Both are JSON merge patches (RFC 7396): mappings are merged, all else is replaced, and null takes
away what the base gives, its variants' changes included. Null stays where it is a value that the
field can have, and where there is nothing to take away.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

from spamprune.errors import RecipeError, nearest
from spamprune.recipe import document, fields, library
from spamprune.recipe.document import Document, FieldPath

_EXTENDS, _VARIANTS = "extends", "variants"


def read(path: Path, _extending: tuple[Path, ...] = ()) -> Document:
    """Read a recipe's file with its bases worked in; ``extends`` is gone, ``variants`` are not.

    Raises:
        RecipeError: A file is not YAML, or a base is missing, no recipe, or extends its heir.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not a text file in UTF-8") from None
    recipe = document.parse(text, lambda line: f"{path}:{line}")
    if not isinstance(recipe.data, dict):
        raise RecipeError(f"{recipe.place(())}: a recipe is a mapping of keys to values")
    if _EXTENDS not in recipe.data:
        return recipe
    label = f"{recipe.place((_EXTENDS,))}: {_EXTENDS}"
    source = recipe.data.pop(_EXTENDS)
    if not isinstance(source, str):
        raise RecipeError(f"{label}: give one path relative to this file, or a bundled recipe")
    try:
        base = library.find(source, heir=path)
    except RecipeError as error:
        raise RecipeError(f"{label}: {error}") from None
    chain = (*_extending, path)
    if base.resolve() in [heir.resolve() for heir in chain]:
        circle = " extends ".join(map(str, (*chain, base)))
        raise RecipeError(f"{label}: goes round in a circle: {circle}")
    return merge(read(base, chain), recipe)


def variants(recipe: Document) -> list[str]:
    """Return the names of a recipe's variants.

    Raises:
        RecipeError: They are not written as named mappings.
    """
    found = recipe.data.get(_VARIANTS, {})
    if not isinstance(found, dict):
        raise _error(recipe, (_VARIANTS,), "a mapping of names to changes is wanted")
    for name, changes in found.items():
        path = (_VARIANTS, name)
        if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", name):
            raise _error(recipe, path, "use small letters, digits, and _.- inside")
        if not isinstance(changes, dict):
            raise _error(recipe, path, "a variant is a mapping of keys to values")
        for key in (_EXTENDS, _VARIANTS):
            if key in changes:
                raise _error(recipe, (*path, key), "stands at the top of a recipe only")
    return list(found)


def choose(recipe: Document, variant: str | None) -> Document:
    """Return a recipe without its variants, with the changes of one of them if it is named.

    The variant's name is added to the recipe's, so that its runs have a folder of their own.

    Raises:
        RecipeError: The recipe has no such variant.
    """
    names = variants(recipe)
    data = {key: value for key, value in recipe.data.items() if key != _VARIANTS}
    plain = Document(copy.deepcopy(data), dict(recipe.where))
    if variant is None:
        return plain
    if variant not in names:
        hint = nearest(variant, names) if names else "the recipe has none"
        raise RecipeError(f"{recipe.place((_VARIANTS,))}: no variant {variant!r}: {hint}")
    prefix = (_VARIANTS, variant)
    where = {path[2:]: place for path, place in recipe.where.items() if path[:2] == prefix}
    chosen = merge(plain, Document(recipe.data[_VARIANTS][variant], where))
    name = chosen.data.get("name")
    if isinstance(name, str) and name == data.get("name"):
        chosen.data["name"] = f"{name}-{variant}"
    return chosen


def merge(base: Document, patch: Document) -> Document:
    """Return ``base`` with ``patch`` worked in; each part keeps the place it was written at."""
    merged = Document(copy.deepcopy(base.data), dict(base.where))
    _merge(merged, merged.data, patch, patch.data, ())
    return merged


def _merge(
    merged: Document,
    holder: dict[str, Any],
    patch: Document,
    changes: dict[str, Any],
    at: FieldPath,
) -> None:
    """Work ``changes``, which stand at the path ``at`` of ``patch``, into ``holder`` in place."""
    merged.where[at] = patch.place(at)
    for key, value in changes.items():
        path = (*at, key)
        old = holder.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            _merge(merged, old, patch, value, path)
            continue
        for replaced in _inside(merged, path):
            del merged.where[replaced]
        field = path[2:] if path[0] == _VARIANTS else path
        if value is None and old is not None and not fields.takes_null(field):
            del holder[key]
            continue
        holder[key] = copy.deepcopy(value)
        merged.where.update({inner: patch.where[inner] for inner in _inside(patch, path)})


def _inside(recipe: Document, path: FieldPath) -> list[FieldPath]:
    """Return the paths whose places are known at ``path`` and within."""
    return [inner for inner in recipe.where if inner[: len(path)] == path]


def _error(recipe: Document, path: FieldPath, problem: str) -> RecipeError:
    return RecipeError(f"{recipe.place(path)}: {document.dotted(path)}: {problem}")
