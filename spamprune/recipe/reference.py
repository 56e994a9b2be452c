"""Every field of a recipe in words, as Markdown: what ``docs/recipes.md`` ends with."""

from __future__ import annotations

import json
from collections.abc import Iterator

from spamprune.recipe.fields import Node
from spamprune.recipe.schema import Recipe, RecipeFile

_SCHEMA: Node = {**RecipeFile.model_json_schema(), "description": Recipe.__doc__}
_SECTIONS: dict[str, Node] = {
    name: section for name, section in _SCHEMA["$defs"].items() if "properties" in section
}
_BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


def markdown() -> str:
    """Return a table of fields for each section, sections in the order in which they are met."""
    order = dict.fromkeys(_met(_SCHEMA))
    tables = [_table("A recipe", _SCHEMA), *(_table(name, _SECTIONS[name]) for name in order)]
    return "\n\n".join(tables) + "\n"


def _met(section: Node) -> Iterator[str]:
    """Yield the sections below a section, each before its own."""
    for field in section["properties"].values():
        for name in _names(field):
            yield name
            yield from _met(_SECTIONS[name])


def _names(node: Node) -> list[str]:
    """Return the sections that a field may hold."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return [name] if name in _SECTIONS else []
    inner = [*node.get("anyOf", ()), *node.get("oneOf", ()), node.get("items")]
    inner.append(node.get("additionalProperties"))
    return [name for option in inner if isinstance(option, dict) for name in _names(option)]


def _table(title: str, section: Node) -> str:
    rows = [
        f"| `{name}` | {_values(field)} | {_default(section, name)} | {_said(field)} |"
        for name, field in section["properties"].items()
    ]
    said = " ".join(section["description"].split())
    head = ["| field | values | default | |", "|---|---|---|---|"]
    return "\n".join([f"### {title}", said, "", *head, *rows])


def _said(field: Node) -> str:
    """Return what is said of a field, which pydantic drops where its section says the same."""
    return field.get("description") or _SECTIONS[_names(field)[0]]["description"]


def _values(node: Node) -> str:
    """Return in words what a field takes."""
    if "items" in node:
        return f"list: {_values(node['items'])}"
    if names := _names(node):
        links = " or ".join(f"[{name}](#{name.lower()})" for name in names)
        return f"by name: {links}" if node.get("type") == "object" else links
    if options := [option for option in node.get("anyOf", ()) if option.get("type") != "null"]:
        return " or ".join(map(_values, options))
    kind = {"string": "text", "object": "mapping"}.get(node.get("type", ""), node.get("type"))
    choices = [True, False] if kind == "boolean" else node.get("enum", ())
    if "const" in node:
        choices = [node["const"]]
    if choices:
        return ", ".join(map(_code, choices))
    bounds = [f"{sign} {node[name]}" for name, sign in _BOUNDS.items() if name in node]
    return " ".join([str(kind), ", ".join(bounds)]).strip()


def _default(section: Node, name: str) -> str:
    if name in section.get("required", ()):
        return "**required**"
    default = section["properties"][name].get("default")
    return "" if default in (None, "") else _code(default)  # None: left to other fields


def _code(value: object) -> str:
    return f"`{json.dumps(value, ensure_ascii=False)}`".replace('"', "")
