"""The fields of a recipe as a tree to walk, from its JSON Schema: which names are valid where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spamprune.recipe.document import FieldPath
from spamprune.recipe.schema import Recipe, RecipeFile

Node = dict[str, Any]  # a JSON Schema; {} where everything goes

ROOT: Node = Recipe.model_json_schema()
#: Sections with required fields that no list holds.
_MERGED = ("Data", "Model", "Online", "Gradual", "Reduction")


def of_files() -> Node:
    """Return the schema of recipes' files, of which those that extend others may leave things out.

    Mappings are merged with the other recipe's, so nothing in them has to be there; lists are
    replaced, so their entries are whole.
    """
    schema = RecipeFile.model_json_schema()
    sections = schema["$defs"]
    train = schema["properties"]["train"]
    train["additionalProperties"] = {"anyOf": [train["additionalProperties"], {"type": "null"}]}
    required = {name: sections[name].pop("required") for name in _MERGED}
    whole = {
        "required": schema.pop("required"),
        "properties": {
            "data": {"required": required["Data"]},
            "model": {"required": required["Model"]},
        },
    }
    schema["anyOf"] = [{"required": ["extends"]}, whole]
    return schema


def plain(node: Node) -> Node:
    """Follow references, and drop the null of an optional field."""
    while True:
        if "$ref" in node:
            node = ROOT["$defs"][node["$ref"].rpartition("/")[2]]
        elif options := node.get("anyOf") or node.get("allOf"):
            node = next(option for option in options if option.get("type") != "null")
        else:
            return node


def tags(node: Node) -> dict[str, str]:
    """Return the sections that ``node`` chooses from, by the tag that chooses; else nothing."""
    mapping: dict[str, str] = node.get("discriminator", {}).get("mapping", {})
    return mapping


def tagged(node: Node, data: object) -> Node:
    """Return the section that the tag in ``data`` chooses; ``node`` itself without a choice."""
    node = plain(node)
    if not tags(node):
        return node
    tag = data.get(node["discriminator"]["propertyName"]) if isinstance(data, dict) else None
    return plain({"$ref": tags(node)[tag]}) if tag in tags(node) else {}


def child(node: Node, step: str | int) -> Node:
    """Return what ``node`` says of its entry ``step``; {} if nothing."""
    inner = node.get("properties", {}).get(step)
    if inner is None:
        inner = node.get("items") or node.get("additionalProperties") or {}
    return plain(inner) if isinstance(inner, dict) else {}


def follow(location: Sequence[str | int]) -> tuple[FieldPath, Node, Node]:
    """Turn pydantic's location of an error into the user's.

    Returns:
        The field's path without the tags that pydantic puts in, what the schema says of the
        section around the field, and of the field.
    """
    path: FieldPath = ()
    parent, node = {}, ROOT
    for step in location:
        if tags(node):
            node = plain({"$ref": tags(node)[str(step)]})
        elif node:
            path, parent, node = (*path, step), node, child(node, step)
    return path, parent, node


def takes_null(path: FieldPath) -> bool:
    """Return whether the field at ``path``, which leads through mappings only, may be null."""
    if not path:
        return False
    node = ROOT
    for step in path[:-1]:
        node = child(node, step)
    options = node.get("properties", {}).get(path[-1], {}).get("anyOf", ())
    return any(option.get("type") == "null" for option in options)
