from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spamprune.errors import RecipeError
from spamprune.recipe import document, dump, extend, library, load
from spamprune.recipe.document import Document
from spamprune.recipe.load import check, describe
from spamprune.recipe.schema import RecipeFile, Unstructured

Write = Callable[..., str]


def heir(text: str, name: str = "h.yaml") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


# ---- extends -----------------------------------------------------------------------------------


def test_mappings_are_merged_and_all_else_is_replaced(write: Write) -> None:
    base = load(write())
    recipe = load(
        heir(
            "extends: r.yaml\nname: heir\nseeds: [7]\n"
            "train: {spam: {optimiser: {lr: 0.5}}, more: {method: map}}\n"
            "prune:\n  - {kind: unstructured}\n"
        )
    )
    assert recipe.name == "heir"
    assert recipe.seeds == [7]
    assert list(recipe.train) == ["map", "spam", "more"]
    assert recipe.train["map"] == base.train["map"]
    assert (recipe.train["spam"].optimiser.name, recipe.train["spam"].optimiser.lr) == ("adam", 0.5)
    assert recipe.train["spam"].prior.structure == "unitwise"
    assert len(recipe.prune) == 1
    assert isinstance(recipe.prune[0], Unstructured)
    assert recipe.prune[0].criteria == ["opd"]


def test_null_takes_away_what_the_base_gives(write: Write) -> None:
    write()
    recipe = load(heir("extends: r.yaml\ntrain: {map: null, spam: {prior: null}}\n"))
    assert list(recipe.train) == ["spam"]
    assert recipe.train["spam"].prior.structure == "parameterwise"


def test_null_is_kept_where_it_is_a_value(write: Write) -> None:
    write(("    prior:\n", "    curvature: {samples: 5}\n    prior:\n"))
    recipe = load(heir("extends: r.yaml\ntrain: {spam: {curvature: {samples: null}}}\n"))
    assert recipe.train["spam"].curvature.samples is None  # all samples, not the default


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {spma: null}", "h.yaml:2: train.spma: null is not valid: "),
        ("trian: null", "h.yaml:2: trian: unknown key, did you mean 'train'"),
        ("threads: null", "h.yaml:2: threads: null is not valid: "),
    ],
)
def test_null_with_nothing_to_take_away_is_an_error(write: Write, text: str, message: str) -> None:
    write()
    with pytest.raises(RecipeError) as caught:
        load(heir(f"extends: r.yaml\n{text}\n"))
    assert str(caught.value).startswith(message)


def test_chains_are_relative_to_each_file(write: Write) -> None:
    Path("deep/er").mkdir(parents=True)
    write()
    heir("extends: ../r.yaml\nthreads: 2\nseeds: [1]\n", "deep/a.yaml")
    heir("extends: ../a.yaml\nseeds: [2]\n", "deep/er/b.yaml")
    recipe = load(heir("extends: deep/er/b.yaml\nname: c\n"))
    assert (recipe.name, recipe.seeds, recipe.threads) == ("c", [2], 2)


def test_a_bundled_recipe_is_a_base_and_a_file_comes_first(write: Write) -> None:
    name = heir("extends: fc_cancer\nseeds: [9]\n")
    recipe = load(name)
    assert recipe.seeds == [9]
    assert recipe.train == load("fc_cancer").train
    assert describe(Path(name)) == load("fc_cancer").description
    Path(write()).rename("fc_cancer")
    assert load(name).name == "small"


def test_the_resolved_recipe_says_nothing_of_its_origin(write: Write, tmp_path: Path) -> None:
    write()
    recipe = load(heir("extends: r.yaml\nseeds: [3]\nvariants: {smoke: {seeds: [4]}}\n"))
    text = dump(recipe)
    assert "extends" not in text
    assert "variants" not in text
    copy = tmp_path / "copy" / "recipe.yaml"
    copy.parent.mkdir()
    copy.write_text(text, encoding="utf-8")
    assert load(copy) == recipe


def test_an_error_names_the_file_that_holds_the_value(write: Write) -> None:
    write(("epochs: 5", "epochs: -5"))
    found = check(heir("extends: r.yaml\nname: heir\nthreads: 0\n"))
    assert isinstance(found, list)
    assert [problem.partition(" is")[0] for problem in found] == [
        "r.yaml:13: train.spam.epochs: -5",
        "h.yaml:3: threads: 0",
    ]


def test_a_list_that_was_replaced_is_in_the_heir(write: Write) -> None:
    write()
    with pytest.raises(RecipeError, match=r"^h\.yaml:2: prune\.0\.criteria\.0: unknown criterion"):
        load(heir("extends: r.yaml\nprune: [{kind: unstructured, criteria: [x]}]\n"), ["threads=1"])


def test_what_is_missing_is_missing_in_the_heir(write: Write) -> None:
    write(("  name: fc_cancer\n", "  kwargs: {}\n"))
    with pytest.raises(RecipeError, match=r"^h\.yaml:2: model\.name: missing"):
        load(heir("extends: r.yaml\nmodel: {kwargs: {a: 1}}\n"), ["threads=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: x.yaml", "h.yaml:1: extends: no recipe 'x.yaml', neither a file nor a bundled"),
        ("extends: fc_cancr", "h.yaml:1: extends: no recipe 'fc_cancr', neither a file nor a"),
        ("extends: .", "h.yaml:1: extends: no recipe '.', neither"),
        ("extends: ''", "h.yaml:1: extends: no recipe '', neither"),
        ("name: a\nextends: [r.yaml]", "h.yaml:2: extends: give one path relative to this file"),
        ("extends:", "h.yaml:1: extends: give one path"),
        ("extends: 1", "h.yaml:1: extends: give one path"),
        ("extends: list.yaml", "list.yaml:1: a recipe is a mapping of keys to values"),
        ("extends: empty.yaml", "empty.yaml:1: a recipe is a mapping of keys to values"),
        ("extends: bad.yaml", "bad.yaml:2: not valid YAML: "),
        ("extends: binary.yaml", "binary.yaml: not a text file in UTF-8"),
        ("extends: h.yaml", "h.yaml:1: extends: goes round in a circle: h.yaml extends h.yaml"),
        ("extends: ./h.yaml", "h.yaml:1: extends: goes round in a circle: h.yaml extends h.yaml"),
        ("extends: a.yaml", "b.yaml:1: extends: goes round in a circle: h.yaml extends a.yaml e"),
    ],
)
def test_hostile_bases(write: Write, text: str, message: str) -> None:
    write()
    heir("- 1\n", "list.yaml")
    heir("", "empty.yaml")
    heir("a: [\n", "bad.yaml")
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    heir("extends: b.yaml\n", "a.yaml")
    heir("extends: h.yaml\n", "b.yaml")
    with pytest.raises(RecipeError) as caught:
        load(heir(text + "\n"))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_circle_through_a_link_is_found(write: Write) -> None:
    heir("extends: link.yaml\n")
    Path("link.yaml").symlink_to("h.yaml")
    with pytest.raises(RecipeError, match=r"circle: h\.yaml extends link\.yaml$"):
        load("h.yaml")


def test_a_base_may_be_used_twice_in_different_chains(write: Write) -> None:
    write()
    heir("extends: r.yaml\nseeds: [1]\n", "a.yaml")
    heir("extends: r.yaml\nseeds: [2]\n", "b.yaml")
    assert load("a.yaml").seeds == [1]
    assert load("b.yaml").seeds == [2]


# ---- variants ----------------------------------------------------------------------------------

VARIANTS = """\
variants:
  smoke:
    train:
      map: {epochs: 1}
      spam: null
    prune: [{kind: unstructured, sparsities: [0.5]}]
  named: {name: other, seeds: [5]}
"""


def with_variants(write: Write, variants: str = VARIANTS) -> str:
    return write(("name: small\n", f"name: small\n{variants}"))


def test_a_variant_changes_the_recipe(write: Write) -> None:
    source = with_variants(write)
    plain, smoke = load(source), load(f"{source}@smoke")
    assert list(plain.train) == ["map", "spam"]
    assert list(smoke.train) == ["map"]
    assert smoke.train["map"].epochs == 1
    assert smoke.data == plain.data
    assert len(smoke.prune) == 1
    assert load(f"{source}@smoke", ["seeds=[3]"]).seeds == [3]


def test_runs_of_a_variant_have_a_name_of_their_own(write: Write) -> None:
    source = with_variants(write)
    assert load(source).name == "small"
    assert load(f"{source}@smoke").name == "small-smoke"
    assert load(f"{source}@named").name == "other"


def test_variants_are_inherited_and_changed(write: Write) -> None:
    with_variants(write)
    name = heir(
        "extends: r.yaml\nname: heir\nvariants:\n"
        "  smoke: {train: {map: {batch_size: 7}}}\n  named: null\n"
    )
    smoke = load(f"{name}@smoke")
    assert smoke.name == "heir-smoke"
    assert (smoke.train["map"].epochs, smoke.train["map"].batch_size) == (1, 7)
    assert list(smoke.train) == ["map"]  # the base's variant still takes the other one away
    with pytest.raises(RecipeError, match="no variant 'named': valid: smoke"):
        load(f"{name}@named")


def test_null_takes_away_what_the_base_variant_changes(write: Write) -> None:
    with_variants(write, "variants: {smoke: {model: {kwargs: {a: 1}}, threads: 2, seeds: [5]}}\n")
    name = heir(
        "extends: r.yaml\nmodel: {kwargs: {b: 2}}\n"
        "variants: {smoke: {model: {kwargs: {a: null, b: null}}, threads: null}}\n"
    )
    smoke = load(f"{name}@smoke")
    assert smoke.model.kwargs == {}
    assert (smoke.threads, smoke.seeds) == (1, [5])


def test_null_as_a_value_of_a_variant_reaches_the_recipe(write: Write) -> None:
    curvature = "{train: {spam: {curvature: {samples: %s}}}}"
    with_variants(write, f"variants: {{smoke: {curvature % 5}}}\n")
    name = heir(f"extends: r.yaml\nvariants: {{smoke: {curvature % 'null'}}}\n")
    assert load("r.yaml@smoke").train["spam"].curvature.samples == 5
    assert load(f"{name}@smoke").train["spam"].curvature.samples is None


def test_all_variants_are_checked_with_the_recipe(write: Write) -> None:
    source = with_variants(write, "variants:\n  a: {threads: 0}\n  b: {trian: {}}\n")
    found = check(source)
    assert found == [
        "r.yaml:3: threads: 0 is not valid: input should be greater than or equal to 1 "
        "(variant 'a')",
        "r.yaml:4: trian: unknown key, did you mean 'train' or 'variants' or 'threads'? "
        "(variant 'b')",
    ]
    assert load(source, ["seeds=[3]"]).seeds == [3]  # only what runs is checked with overrides


def test_a_problem_of_the_recipe_is_said_once(write: Write) -> None:
    source = write(("name: small\n", "name: small\nvariants: {a: {}, b: {}}\nthreads: 0\n"))
    found = check(source)
    assert isinstance(found, list)
    assert [problem.partition(":")[0] for problem in found] == ["r.yaml"]
    assert check(f"{source}@a") == found


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ("variants: [1]\n", "r.yaml:2: variants: a mapping of names to changes is wanted"),
        ("variants:\n", "r.yaml:2: variants: a mapping of names"),
        ("variants: {a: 1}\n", "r.yaml:2: variants.a: a variant is a mapping of keys to values"),
        ("variants:\n  a: null\n", "r.yaml:3: variants.a: a variant is a mapping"),
        ("variants: {A@b: {}}\n", "r.yaml:2: variants.A@b: use small letters, digits"),
        ("variants: {a: {extends: b}}\n", "r.yaml:2: variants.a.extends: stands at the top of a"),
        ("variants: {a: {variants: {}}}\n", "r.yaml:2: variants.a.variants: stands at the top"),
    ],
)
def test_hostile_variants(write: Write, variants: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(with_variants(write, variants))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("r.yaml@smok", r"^r\.yaml:2: no variant 'smok': did you mean 'smoke'"),
        ("r.yaml@", r"^r\.yaml:2: no variant '': valid: named, smoke$"),
        ("r.yaml@a@smoke", r"^no recipe 'r\.yaml@a', neither"),
        ("@smoke", r"^no recipe '', neither"),
    ],
)
def test_an_unknown_variant_is_an_error(write: Write, source: str, message: str) -> None:
    with_variants(write)
    with pytest.raises(RecipeError, match=message):
        load(source)


def test_a_recipe_without_variants_says_so(write: Write) -> None:
    with pytest.raises(RecipeError, match=r"^r\.yaml:1: no variant 'smoke': the recipe has none$"):
        load(f"{write()}@smoke")


def test_a_file_with_an_at_in_its_name_is_found(write: Write) -> None:
    Path(write()).rename("a@b.yaml")
    assert library.split_variant("a@b.yaml") == ("a@b.yaml", None)
    assert load("a@b.yaml").name == "small"


def test_a_misspelt_variants_is_found(write: Write) -> None:
    with pytest.raises(RecipeError, match=r"varints: unknown key, did you mean 'variants'"):
        load(write(("name: small\n", "name: small\nvarints: {}\n")))


def test_an_override_cannot_name_them(write: Write) -> None:
    for key in ("extends", "variants"):
        with pytest.raises(RecipeError, match=rf"^override {key}=x: {key}: unknown key"):
            load(with_variants(write), [f"{key}=x"])


def test_the_schema_describes_both() -> None:
    described = RecipeFile.model_json_schema()["properties"]
    assert "relative to this file" in described["extends"]["description"]
    assert "@smoke" in described["variants"]["description"]


# ---- merging -----------------------------------------------------------------------------------

MAPPINGS = st.recursive(
    st.dictionaries(st.sampled_from("abc"), st.none() | st.integers(0, 3)),
    lambda inner: st.dictionaries(st.sampled_from("abc"), st.none() | st.integers(0, 3) | inner),
    max_leaves=8,
)


def patched(base: Any, patch: Any) -> Any:
    """Apply a JSON merge patch as RFC 7396, section 2, writes it down; null adds itself."""
    result = dict(base)
    for key, value in patch.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = patched(result[key], value)
        elif value is None and result.get(key) is not None:
            del result[key]
        else:
            result[key] = value
    return result


def as_document(data: Any, name: str) -> Document:
    """Return ``data`` as it were read from a file of this name."""
    return document.parse(document.write(data), lambda line: f"{name}:{line}")


@given(MAPPINGS, MAPPINGS)
def test_merging_is_a_merge_patch_with_every_part_in_its_file(base: Any, patch: Any) -> None:
    one, two = as_document(base, "one"), as_document(patch, "two")
    merged = extend.merge(one, two)
    assert merged.data == patched(base, patch)
    assert (one.data, two.data) == (base, patch)

    def walk(part: Any, path: tuple[str, ...]) -> None:
        written, inner = merged.place(path).partition(":")[0], patch
        for key in path:
            inner = inner.get(key, ...) if isinstance(inner, dict) else ...
        assert written == ("one" if inner is ... else "two")
        if isinstance(part, dict):
            for key, value in part.items():
                walk(value, (*path, key))

    walk(merged.data, ())
