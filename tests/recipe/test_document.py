from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spamprune.errors import RecipeError
from spamprune.recipe.document import Document, parse, write


def read(text: str) -> Document:
    return parse(text, lambda line: f"a.yaml:{line}")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
    | st.from_regex(r"[-+]?[0-9.]{1,3}[eE:_][-+]?[0-9]{1,2}", fullmatch=True),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab1.-e~y"), inner),
    max_leaves=6,
)


@given(VALUES)
@example("\x85")
@example("a\u2028b\u2029")
def test_what_is_written_reads_back_with_the_same_types(value: Any) -> None:
    data = read(write(value)).data
    assert data == value
    assert repr(data) == repr(value)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "+1e-3", "10.e-4", ".1e-2"])
def test_numbers_with_exponents_need_no_point_or_sign(text: str) -> None:
    assert read(f"a: {text}").data == {"a": 0.001}


def test_every_part_has_its_line() -> None:
    text = "# note\na:\n  b: 1\n  c:\n    - 2\n    -\n      d: 3\ne: [1,\n  2]\n"
    assert read(text).where == {
        (): "a.yaml:2",
        ("a",): "a.yaml:2",
        ("a", "b"): "a.yaml:3",
        ("a", "c"): "a.yaml:4",
        ("a", "c", 0): "a.yaml:5",
        ("a", "c", 1): "a.yaml:7",
        ("a", "c", 1, "d"): "a.yaml:7",
        ("e",): "a.yaml:8",
        ("e", 0): "a.yaml:8",
        ("e", 1): "a.yaml:9",
    }
    assert read(text).place(("a", "c", 1, "missing", 3)) == "a.yaml:7"


def test_merge_keys_fill_in_and_keep_the_lines_of_what_they_bring() -> None:
    text = "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc:\n  <<: [*a, *b]\n  x: 3\n"
    recipe = read(text)
    assert recipe.data["c"] == {"x": 3, "y": 1, "z": 2}
    assert [recipe.where["c", key] for key in "xyz"] == ["a.yaml:5", "a.yaml:1", "a.yaml:2"]


def test_aliases_are_copies() -> None:
    data = read("a: &a {x: [1]}\nb: *a\n").data
    data["a"]["x"].append(2)
    assert data["b"] == {"x": [1]}


def test_keys_are_strings_as_they_are_spelt() -> None:
    assert read("on: 1\n2: 2\n~: 3\n").data == {"on": 1, "2": 2, "~": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n\t- 2\n", "a.yaml:3: not valid YAML: found character '\\t'"),
        ("a: 1\nb: [1\nc: 2\n", "a.yaml:3: not valid YAML: "),
        ("a: 1\n b: 2\n", "a.yaml:2: not valid YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 1\n", "a.yaml:2: not valid YAML: but found another document"),
        ("a: 1\nb: *c\n", "a.yaml:2: not valid YAML: found undefined alias 'c'"),
        ("a: 1\nb: '\x01'\n", "a.yaml:2: not valid YAML: special characters are not allowed"),
        ("a: 1\nb: !!python/name:os.system x\n", "a.yaml:2: not valid YAML: could not determine"),
        ("a: 1\nb: !!python/object:x {}\n", "a.yaml:2: b: the tag 'python/object:x' is not"),
        ("a: 1\nb: !!set {c}\n", "a.yaml:2: b: the tag 'set' is not supported"),
        ("a: 1\nb: 2024-13-45\n", "a.yaml:2: b: '2024-13-45' is not a valid timestamp"),
        ("a: 1\nb: !!bool perhaps\n", "a.yaml:2: b: 'perhaps' is not a valid bool"),
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 1\n", "a.yaml:5: b.c: given twice, first on line 3"),
        ("a: 1\n? [b]\n: 2\n", "a.yaml:2: a key must be a plain word"),
        ("a: 1\nb:\n  <<: 3\n", "a.yaml:3: b: '<<' takes a mapping or a list of mappings"),
        ("a: &a\n  b: *a\n", "a.yaml:1: nested too deeply, or an anchor that contains itself"),
        ("a: &a\n  <<: *a\n", "a.yaml:1: nested too deeply, or an anchor that contains itself"),
        ("[" * 2000, "a.yaml:1: nested too deeply, or an anchor that contains itself"),
    ],
)
def test_what_is_not_plain_yaml_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(text)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
