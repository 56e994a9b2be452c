"""YAML with a memory: plain data, and where each part of it was written."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from spamprune.errors import RecipeError

FieldPath = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_COLLECTIONS = {_TAG + "map", _TAG + "seq"}
_EXPONENT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """The safe loader, except that ``1e-3`` is a number, as in YAML 1.2, and not a string."""


class _Dumper(yaml.SafeDumper):
    """Writes what :class:`_Loader` reads back as the same values."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _string(dumper: _Dumper, value: str) -> yaml.Node:
    r"""Quote and escape line breaks other than \\n, which a reader would fold into spaces."""
    style = '"' if any(c in value for c in "\x85\u2028\u2029") else None
    return dumper.represent_scalar(_TAG + "str", value, style)


_Dumper.add_representer(str, _string)
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(_TAG + "float", _EXPONENT, list("-+.0123456789"))


@dataclass(frozen=True)
class Document:
    """Data from YAML.

    Attributes:
        data: Dictionaries with string keys, lists and scalars.
        where: For the path of each part, the words with which an error starts ("a.yaml:3").
    """

    data: Any
    where: dict[FieldPath, str]

    def place(self, path: FieldPath) -> str:
        """Return where ``path`` is written, or the innermost part around it that is."""
        while path not in self.where:
            path = path[:-1]
        return self.where[path]


def dotted(path: FieldPath) -> str:
    """Return a path as errors and overrides write it."""
    return ".".join(map(str, path))


def parse(text: str, label: Callable[[int], str]) -> Document:
    """Read YAML: merge keys work, keys are strings as they are spelt and never given twice.

    Args:
        text: One YAML document.
        label: Names a line, counted from 1, as the start of an error.

    Raises:
        RecipeError: The text is not YAML, or not plain data.
    """
    where: dict[FieldPath, str] = {}
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return Document(None, {(): label(1)})
        data = _build(root, (), loader, label, where)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        line = mark.line + 1 if mark else 1
        raise RecipeError(f"{label(line)}: not valid YAML: {e.problem or e.context}") from None
    except yaml.reader.ReaderError as e:
        line = text.count("\n", 0, e.position) + 1
        raise RecipeError(f"{label(line)}: not valid YAML: {e.reason}") from None
    except RecursionError:
        raise RecipeError(
            f"{label(1)}: nested too deeply, or an anchor that contains itself"
        ) from None
    where[()] = label(root.start_mark.line + 1)
    return Document(data, where)


def write(data: Any) -> str:
    """Return ``data`` as YAML that :func:`parse` reads back; innermost lists on one line."""
    text: str = yaml.dump(
        data,
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=None,
        allow_unicode=True,
        width=100,
    )
    return text


def _build(
    node: yaml.Node,
    path: FieldPath,
    loader: _Loader,
    label: Callable[[int], str],
    where: dict[FieldPath, str],
) -> Any:
    """Return the data of ``node``, noting in ``where`` the lines of all that is inside it."""
    if isinstance(node, yaml.ScalarNode):
        try:
            return loader.construct_object(node)
        except (ValueError, LookupError):  # such as the 45th of a month
            kind = node.tag.removeprefix(_TAG)
            raise _error(node, label, path, f"{node.value!r} is not a valid {kind}") from None
    if node.tag not in _COLLECTIONS:
        raise _error(node, label, path, f"the tag {node.tag.removeprefix(_TAG)!r} is not supported")
    if isinstance(node, yaml.MappingNode):
        data = {}
        for name, (key, value) in _entries(node, path, label).items():
            where[(*path, name)] = label(key.start_mark.line + 1)
            data[name] = _build(value, (*path, name), loader, label, where)
        return data
    items = []
    for i, value in enumerate(node.value):
        where[(*path, i)] = label(value.start_mark.line + 1)
        items.append(_build(value, (*path, i), loader, label, where))
    return items


def _entries(
    node: yaml.Node, path: FieldPath, label: Callable[[int], str]
) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """Return key and value nodes by name; ``<<`` brings in those of the mappings it names."""
    if not isinstance(node, yaml.MappingNode):
        raise _error(node, label, path, "'<<' takes a mapping or a list of mappings")
    own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in node.value:
        if key.tag == _TAG + "merge":
            sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for source in sources:  # the first of several mappings wins
                merged = _entries(source, path, label) | merged
        elif not isinstance(key, yaml.ScalarNode):
            raise _error(key, label, path, "a key must be a plain word")
        elif key.value in own:
            first = own[key.value][0].start_mark.line + 1
            problem = f"given twice, first on line {first}"
            raise _error(key, label, (*path, key.value), problem)
        else:
            own[key.value] = (key, value)
    return merged | own


def _error(
    node: yaml.Node, label: Callable[[int], str], path: FieldPath, problem: str
) -> RecipeError:
    field = f"{dotted(path)}: " if path else ""
    return RecipeError(f"{label(node.start_mark.line + 1)}: {field}{problem}")
