"""docs/recipes.md: its tables are the schema's own, its example is a recipe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from spamprune.recipe import load
from spamprune.recipe.reference import markdown
from spamprune.recipe.schema import RecipeFile

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_the_page_ends_with_every_field() -> None:
    assert PAGE.endswith("\n\n" + markdown()), "run: spamprune schema --markdown, and paste it"


def test_every_section_and_field_is_said_once() -> None:
    schema = RecipeFile.model_json_schema()
    sections = {n: s for n, s in schema["$defs"].items() if "properties" in s}
    parts = re.split(r"^### ", markdown(), flags=re.MULTILINE)[1:]
    found = {part.partition("\n")[0]: part for part in parts}
    assert found.keys() == {"A recipe", *sections}
    for title, part in found.items():
        fields = sections.get(title, schema)["properties"]
        rows = re.findall(r"^\| `(\w+)` \|.*\| (.+) \|$", part, flags=re.MULTILINE)
        assert [name for name, _ in rows] == list(fields)
        assert all(said.strip() for _, said in rows)


def test_links_lead_to_sections() -> None:
    for title, anchor in re.findall(r"\[(\w+)\]\(#(\w+)\)", markdown()):
        assert anchor == title.lower()
        assert f"### {title}\n" in PAGE


@pytest.mark.parametrize(
    ("row"),
    [
        "| `epochs` | integer ≥ 1 | `100` | Passes over the training data. |",
        "| `threshold` | `global`, `lamp` | `global` |",
        "| `kind` | `structured` | **required** |",
        "| `targets` | list: [Target](#target) | **required** |",
        "| `train` | by name: [Train](#train) | **required** |",
        "| `hold` | `true`, `false` | `true` |",
        "| `finetune` | [FineTune](#finetune) |  |",
        "| `latency_batches` | list: integer ≥ 1, ≤ 65536 | `[1, 128]` |",
        "| `ramp` | `linear`, `cubic`, `stairs` | `cubic` |",
    ],
)
def test_values_and_defaults_are_in_words(row: str) -> None:
    assert row in markdown()


def test_the_example_is_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "example.yaml"
    path.write_text(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0], encoding="utf-8")
    assert list(load(path).train) == ["map", "spam"]
