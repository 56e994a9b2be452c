"""Recipes from YAML: every problem is one line that names the place, the field and the way out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from spamprune.errors import RecipeError, nearest
from spamprune.recipe import document, extend, fields, library
from spamprune.recipe.document import Document, FieldPath, dotted
from spamprune.recipe.schema import Recipe, RecipeFile

_MAPPINGS = {"dict_type", "model_type", "model_attributes_type"}
_SHOWN = 60  # characters of an offending value


def load(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        source: A YAML file, or the name of a bundled recipe; "fc_cancer@smoke" is its variant
            ``smoke``.
        overrides: Changes like ``"train.spam.epochs=3"``; values are YAML, ``prune.0`` is the
            first entry of a list.

    Raises:
        RecipeError: The recipe or an override is not valid; the message is of the first problem.
    """
    outcome = check(source, overrides)
    if isinstance(outcome, Recipe):
        return outcome
    first, *others = outcome
    more = f" (and {len(others)} more: run `spamprune validate`)" if others else ""
    raise RecipeError(first + more)


def check(source: str | Path, overrides: Sequence[str] = ()) -> Recipe | list[str]:
    """Read a recipe as :func:`load` does, but return all problems if there are any.

    Without overrides, which may not apply to all of them, its other variants are checked too.

    Raises:
        RecipeError: There is no such recipe or variant, or a file is not YAML or no recipe.
    """
    file, variant = library.split_variant(source)
    recipe = extend.read(library.find(file))
    outcome = _validate(extend.choose(recipe, variant), overrides)
    if overrides:
        return outcome
    problems: list[str] = []
    for other in (None, *extend.variants(recipe)):
        also = outcome if other == variant else _validate(extend.choose(recipe, other))
        if not isinstance(also, Recipe):
            name = f" (variant {other!r})" if other else ""
            problems += [problem + name for problem in also if problem not in problems]
    return problems or outcome


def describe(path: Path) -> str:
    """Return the description in a recipe's file, which is not checked further."""
    return str(extend.read(path).data.get("description", ""))


def dump(recipe: Recipe) -> str:
    """Return the resolved recipe, defaults included, as YAML that :func:`load` reads back."""
    return document.write(recipe.model_dump(mode="json"))


def fingerprint(recipe: Recipe) -> str:
    """Return a SHA-256 of the recipe's values, to tell results of different recipes apart."""
    canonical = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _validate(recipe: Document, overrides: Sequence[str] = ()) -> Recipe | list[str]:
    """Apply overrides to ``recipe``, in place, and return it checked, or all problems."""
    problems = []
    for override in overrides:
        try:
            _override(recipe, override)
        except RecipeError as e:
            problems.append(str(e))
    try:
        valid = Recipe.model_validate(recipe.data, context=_look_ups())
    except ValidationError as e:
        errors = sorted(e.errors(include_url=False), key=lambda error: _order(recipe, error))
        return problems + [_problem(recipe, error) for error in errors]
    return problems or valid


def _look_ups() -> dict[str, Callable[..., object]]:
    """Return functions that raise if a name in a recipe is unknown or choices disagree."""
    # Only a recipe that is being checked needs these, and they bring in all of torch.
    from spamprune.bayes.curvature import CurvatureMethod
    from spamprune.data import DATA_SETS
    from spamprune.models import check_name
    from spamprune.scores import CRITERIA

    return {
        "data set": DATA_SETS.__getitem__,
        "model": check_name,
        "criterion": CRITERIA.__getitem__,
        "curvature": CurvatureMethod,
    }


def _override(recipe: Document, override: str) -> None:
    """Set the field that ``override`` names, creating optional sections on the way to it."""
    key, equals, text = override.partition("=")
    label = f"override {override}"
    if not (key and equals):
        raise RecipeError(f"{label}: write it as key=value, such as train.spam.epochs=3")
    value = document.parse(text, lambda _: label).data
    path: FieldPath = ()
    holder, node = recipe.data, fields.ROOT
    *sections, last = key.split(".")
    for name in sections:
        step = _step(holder, node, path, name, label)
        path, node = (*path, step), fields.child(node, step)
        if isinstance(holder, dict) and holder.get(name) is None:
            holder[step] = [] if node.get("type") == "array" else {}
            recipe.where[path] = label
        holder = holder[step]
        node = fields.tagged(node, holder)
    step = _step(holder, node, path, last, label, new=True)
    path = (*path, step)
    for replaced in [p for p in recipe.where if p[: len(path)] == path]:
        del recipe.where[replaced]
    holder[step] = value
    recipe.where[path] = label


def _step(
    holder: Any, node: fields.Node, path: FieldPath, name: str, label: str, *, new: bool = False
) -> str | int:
    """Return ``name`` as a key or index of ``holder``, which is at ``path`` and means ``node``.

    A mapping without fixed fields may gain a key if it is ``new``.
    """
    field = dotted(path)
    if isinstance(holder, list):
        if name.isdecimal() and int(name) < len(holder):
            return int(name)
        valid = ", ".join(map(str, range(len(holder)))) or "none, it is empty"
        raise RecipeError(f"{label}: {field} has no entry {name!r}, valid: {valid}")
    if not isinstance(holder, dict):
        raise RecipeError(f"{label}: {field} is {_show(holder)}, with no {name!r} inside")
    known = node.get("properties") or holder
    if name in known or (new and "properties" not in node):
        return name
    hint = nearest(name, known) if known else f"{field} is empty"
    raise RecipeError(f"{label}: {dotted((*path, name))}: unknown key, {hint}")


def _order(recipe: Document, error: ErrorDetails) -> tuple[bool, int]:
    """Sort errors as the recipe is read, but what is missing last: it may be there, misspelt."""
    path, _, _ = fields.follow(error["loc"])
    return error["type"] == "missing", list(recipe.where.values()).index(recipe.place(path))


def _problem(recipe: Document, error: ErrorDetails) -> str:
    """Say in one line what pydantic found wrong."""
    path, parent, node = fields.follow(error["loc"])
    kind, value, message = error["type"], error["input"], error["msg"]
    context = error.get("ctx", {})
    if kind == "rule":
        path = (*path, *context["path"])
    elif kind == "value_error":
        message = str(context["error"])
    elif kind == "missing":
        message = f"missing ({node['description'].rstrip('.')})"
    elif kind == "extra_forbidden":
        valid = RecipeFile.model_fields if len(path) == 1 else parent["properties"]
        message = f"unknown key, {nearest(str(path[-1]), valid)}"
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        name = node["discriminator"]["propertyName"]
        path = (*path, name)
        tag = value.get(name)
        said = "missing" if tag is None else f"{_show(tag)} is not valid"
        message = f"{said}, {nearest(str(tag), fields.tags(node))}"
    elif kind == "literal_error":
        valid = node.get("enum") or [node["const"]]
        choices = [choice if isinstance(choice, str) else _show(choice) for choice in valid]
        message = f"{_show(value)} is not valid, {nearest(str(value), choices)}"
    elif kind == "string_type" and isinstance(value, bool | int | float):
        message = f"{_show(value)} is not valid: quote it, YAML reads it as no string"
    else:
        wanted = "input should be a mapping of keys to values" if kind in _MAPPINGS else message
        message = f"{_show(value)} is not valid: {wanted[0].lower()}{wanted[1:]}"
    return f"{recipe.place(path)}: {dotted(path)}: {message}"


def _show(value: object) -> str:
    """Return a value about as YAML spells it, not too long."""
    shown = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 1] + "…"
