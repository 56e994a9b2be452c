from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from spamprune.errors import RecipeError
from spamprune.recipe import Recipe, dump, fingerprint, load
from spamprune.recipe.load import check
from spamprune.recipe.schema import Structured, Unstructured

Write = Callable[..., str]


def problems(source: str, *overrides: str) -> list[str]:
    outcome = check(source, overrides)
    assert isinstance(outcome, list)
    return outcome


def test_a_recipe_is_read_with_its_defaults(write: Write) -> None:
    recipe = load(write())
    assert recipe.train["spam"].optimiser.lr == 1e-3
    assert recipe.train["spam"].optimiser.min_lr == 1e-6
    assert isinstance(recipe.prune[0], Unstructured)
    assert recipe.prune[0].criteria == ["opd", "random"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # wrong values
        (
            "epochs: 5\n    prior",
            "epochs: -3\n    prior",
            "r.yaml:13: train.spam.epochs: -3 is not valid: "
            "input should be greater than or equal to 1",
        ),
        (
            "seeds: [0, 1]",
            "seeds: [0,\n  -1]",
            "r.yaml:3: seeds.1: -1 is not valid: input should be greater than or equal to 0",
        ),
        ("lr: 1e-3", "lr: .inf", "r.yaml:16: train.spam.optimiser.lr: Infinity is not valid: "),
        ("seeds: [0, 1]", "seeds: 'no'", "r.yaml:2: seeds: 'no' is not valid: input should be a"),
        ("seeds: [0, 1]", "threads: true\nseeds: [0]", "r.yaml:2: threads: true is not valid: "),
        ("seeds: [0, 1]", "threads: '1'\nseeds: [0]", "r.yaml:2: threads: '1' is not valid: "),
        (
            "name: small",
            "name: on",
            "r.yaml:1: name: true is not valid: quote it, YAML reads it as",
        ),
        (
            "ratio: 0.5",
            "evidence: false",
            "r.yaml:22: prune.1.targets.0.evidence: false is not valid, valid: true",
        ),
        ("name: small", "name: Small", "r.yaml:1: name: 'Small' is not valid: string should match"),
        (
            "  name: fc_cancer",
            "  name: fc_cancer\n  kwargs: {a: 2024-01-01}",
            'r.yaml:8: model.kwargs.a: "2024-01-01" is not valid: input was not a valid JSON value',
        ),
        (
            "    prior:\n      structure: unitwise",
            "    prior: 1.0",
            "r.yaml:14: train.spam.prior: 1.0 is not valid: "
            "input should be a mapping of keys to values",
        ),
        (
            "ratio: 0.5",
            "ratio: 2.5",
            "r.yaml:22: prune.1.targets.0.ratio: 2.5 is not valid: input should be less than 1",
        ),
        # unknown, missing and misspelt
        (
            "augment: none",
            "augmnt: none",
            "r.yaml:5: data.augmnt: unknown key, did you mean 'augment'?",
        ),
        (
            "targets:",
            "target:",
            "r.yaml:21: prune.1.target: unknown key, did you mean 'targets'? (",
        ),
        ("seeds:", "sede:", "r.yaml:2: sede: unknown key, did you mean 'seeds'?"),
        (
            "  name: cancer\n",
            "",
            "r.yaml:3: data.name: missing (Name of the data set: `spamprune data` lists them)",
        ),
        (
            "augment: none",
            "augment: flp",
            "r.yaml:5: data.augment: 'flp' is not valid, did you mean ",
        ),
        (
            "kind: structured",
            "kind: structurd",
            "r.yaml:20: prune.1.kind: 'structurd' is not valid, did you mean 'structured' or ",
        ),
        (
            "kind: structured\n    targets",
            "targets",
            "r.yaml:20: prune.1.kind: missing, valid: semi_structured, ",
        ),
        (
            "criteria: [opd, random]",
            "criteria: [opd, random]\n    batches: 3",
            "r.yaml:20: prune.0.batches: opd, random see no training data: leave it out",
        ),
        # names that other parts of spamprune know
        (
            "name: cancer",
            "name: cancr",
            "r.yaml:4: data.name: unknown data set 'cancr': did you mean 'cancer'",
        ),
        (
            "name: fc_cancer",
            "name: fc_cancr",
            "r.yaml:7: model.name: unknown model 'fc_cancr': did you mean 'fc_cancer'",
        ),
        (
            "[opd, random]",
            "[opd,\n  opdd]",
            "r.yaml:20: prune.0.criteria.1: unknown criterion 'opdd': did you mean 'opd'",
        ),
        # rules between fields
        (
            "structure: unitwise",
            "structure: unitwise\n    evidence:\n      update: exact",
            "r.yaml:17: train.spam.evidence.update: 'exact' needs prior.structure 'parameterwise', "
            "not 'unitwise': use 'adam'",
        ),
        (
            "structure: unitwise",
            "structure: unitwise\n    evidence:\n      burn_in: 100",
            "r.yaml:16: train.spam.evidence.every: with every 5, burn_in 100 and",
        ),
        (
            "criteria: [opd, random]",
            "criteria: [opd, bmr]\n    threshold: lamp",
            "r.yaml:20: prune.0.threshold: 'lamp' divides by sums of scores, and those of bmr may",
        ),
        (
            "ratio: 0.5",
            "ratio: 0.5\n        macs: 0.5",
            "r.yaml:22: prune.1.targets.0: give exactly one of ratio, macs, params, bytes",
        ),
        (
            "trainings: [spam]",
            "scratch: {lr: 0.1}",
            "r.yaml:23: prune.1.scratch: it is compared with fine-tuning: give finetune too",
        ),
        (
            "trainings: [spam]",
            "trainings:\n      - map\n      - spma",
            "r.yaml:25: prune.1.trainings.1: no training is called 'spma': did you mean 'spam'",
        ),
        # settings without effect
        (
            "structure: unitwise",
            "structure: unitwise\n    evidence: {damping: 0.5}",
            "r.yaml:16: train.spam.evidence.damping: update 'adam' has no use for it: leave it "
            "out, or at 0.0",
        ),
        (
            "structure: unitwise",
            "structure: unitwise\n    evidence: {update: mackay, lr: 0.2}",
            "r.yaml:16: train.spam.evidence.lr: update 'mackay' has no use for it",
        ),
        (
            "structure: unitwise",
            "structure: parameterwise\n    evidence: {update: exact, lr: 0.2}",
            "r.yaml:16: train.spam.evidence.lr: update 'exact' has no use for it",
        ),
        (
            "name: adam, lr: 1e-3}",
            "name: adam}",
            "r.yaml:16: train.spam.optimiser.lr: 0.1 by default is for 'sgd': give 'adam' its rate",
        ),
        (
            "lr: 1e-3}",
            "lr: 1e-3, momentum: 0.5}",
            "r.yaml:16: train.spam.optimiser.momentum: 'adam' has betas of its own",
        ),
        (
            "lr: 1e-3}",
            "lr: 1e-3, schedule: constant, min_lr: 0.0}",
            "r.yaml:16: train.spam.optimiser.min_lr: a constant schedule does not fall",
        ),
        (
            "trainings: [spam]",
            "finetune: {curvature: {labels: ggn}}",
            "r.yaml:23: prune.1.finetune.curvature: it is for method 'spam' or schedule ",
        ),
        (
            "trainings: [spam]",
            "finetune: {evidence: {steps: 7}}",
            "r.yaml:23: prune.1.finetune.evidence: it is for method 'spam': leave it out",
        ),
        (
            "trainings: [spam]",
            "finetune: {prior: {structure: scalar}}",
            "r.yaml:23: prune.1.finetune.prior.structure: it is for method 'spam': leave it out",
        ),
        (
            "trainings: [spam]",
            "ranking: per_cost",
            "r.yaml:22: prune.1.targets.0.ratio: a ratio names no cost for ranking 'per_cost'",
        ),
        ("[0, 1]", "[0, 0]", "r.yaml:2: seeds: [0, 0] are not distinct"),
        ("  spam:\n", "  sp/am:\n", "r.yaml:12: train.sp/am: 'sp/am' cannot name a training: use "),
        # YAML itself
        ("name: small", "name: small\nname: other", "r.yaml:2: name: given twice, first on line 1"),
        ("seeds: [0, 1]", "seeds: [0, 1", "r.yaml:3: not valid YAML: "),
    ],
)
def test_a_problem_is_one_line_with_its_place(
    write: Write, old: str, new: str, message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load(write((old, new)))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_training_by_map_may_share_the_settings_of_another(write: Write) -> None:
    source = write(
        (
            "    method: map\n    epochs: 3",
            "    method: map\n    epochs: 3\n    evidence: {steps: 7}\n    curvature: {samples: 9}",
        )
    )
    assert load(source).train["map"].evidence.steps == 7


def test_all_problems_are_found_and_the_first_is_reported_with_their_number(write: Write) -> None:
    source = write(("seeds:", "sede:"), ("[opd, random]", "[obd, x]"), ("ratio: 0.5", "ratio: 2"))
    found = problems(source)
    assert [problem.split(": ")[:2] for problem in found] == [
        ["r.yaml:2", "sede"],
        ["r.yaml:19", "prune.0.criteria.1"],
        ["r.yaml:22", "prune.1.targets.0.ratio"],
    ]
    with pytest.raises(RecipeError) as caught:
        load(source)
    assert str(caught.value) == f"{found[0]} (and 2 more: run `spamprune validate`)"


def test_a_misspelt_key_comes_before_what_is_missing_for_it(write: Write) -> None:
    found = problems(write(("model:", "modle:")))
    assert found[0] == "r.yaml:6: modle: unknown key, did you mean 'model'?"
    assert found[1].startswith("r.yaml:1: model: missing (Which network: ")
    assert len(found) == 2


@pytest.mark.parametrize("text", ["", "# nothing\n", "- 1\n", "word\n"])
def test_a_recipe_is_a_mapping(write: Write, text: str) -> None:
    Path(write()).write_text(text)
    with pytest.raises(RecipeError, match=r"^r\.yaml:1: a recipe is a mapping of keys to values$"):
        check("r.yaml")


def test_a_binary_file_is_no_recipe(write: Write) -> None:
    Path(write()).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"^r\.yaml: not a text file in UTF-8$"):
        load("r.yaml")


def test_a_merged_error_is_at_the_line_that_is_to_be_mended(write: Write) -> None:
    source = write(
        ("  map:\n    method: map\n    epochs: 3", "  map: &m\n    method: map\n    epochs: 0"),
        ("    epochs: 5\n    prior", "    <<: *m\n    prior"),
    )
    assert [problem.partition(" is")[0] for problem in problems(source)] == [
        "r.yaml:11: train.map.epochs: 0",
        "r.yaml:11: train.spam.epochs: 0",
    ]


@pytest.mark.parametrize(
    "holding",
    [
        "train.spam.online={final: 0.5, every: 1}",
        "train.spam={method: variational, optimiser: {name: adabelief, lr: 0.01}, epochs: 2, "
        "variational: {reduction: {warm_up: 1, blocks: 1}}}",
    ],
)
def test_kronecker_factors_are_refused_where_training_holds_masks(
    write: Write, holding: str
) -> None:
    tune = "prune.1.finetune={method: spam, curvature: {structure: kron}}"
    (found,) = problems(write(), holding, tune)
    assert "prune.1.finetune.curvature.structure: 'spam' holds weights at zero" in found
    regrowing = "train.spam.online={final: 0.5, every: 1, hold: false}"
    assert isinstance(check(write(), [regrowing, tune]), Recipe)


@pytest.mark.parametrize("optimiser", ["{}", "{schedule: constant}", "{warmup: 1}"])
def test_fine_tuning_keeps_its_rate_whatever_else_is_said(write: Write, optimiser: str) -> None:
    recipe = load(write(), [f"prune.1.finetune={{optimiser: {optimiser}}}"])
    assert recipe.prune[1].finetune is not None
    assert recipe.prune[1].finetune.optimiser.lr == 0.01
    assert recipe.train["map"].optimiser.lr == 0.1


def test_overrides_change_any_field(write: Write) -> None:
    recipe = load(
        write(),
        [
            "train.spam.epochs=7",
            "seeds=[3]",
            "seeds.0=4",
            "train.spam.evidence.lr=1e-2",
            "prune.0.sparsities=[0.5]",
            "prune.0.finetune.epochs=2",
            "model.kwargs.depth=3",
            "train.long={epochs: 9}",
            "data.root=a=b",
        ],
    )
    assert recipe.train["spam"].epochs == 7
    assert recipe.train["map"].epochs == 3
    assert recipe.seeds == [4]
    assert recipe.train["spam"].evidence.lr == 0.01
    experiment = recipe.prune[0]
    assert isinstance(experiment, Unstructured)
    assert experiment.sparsities == [0.5]
    assert experiment.finetune is not None
    assert experiment.finetune.epochs == 2
    assert recipe.model.kwargs == {"depth": 3}
    assert recipe.train["long"].epochs == 9
    assert recipe.data.root == "a=b"


def test_an_override_mends_a_wrong_file(write: Write) -> None:
    source = write(("    prior:\n      structure: unitwise", "    prior:\n      structure: x"))
    assert load(source, ["train.spam.prior={precision: 2}"]).train["spam"].prior.precision == 2


def test_an_override_of_a_merged_section_leaves_the_original(write: Write) -> None:
    source = write(
        ("method: map\n", "method: map\n    prior: &p {precision: 2}\n"),
        ("prior:\n      structure: unitwise", "prior: *p"),
    )
    recipe = load(source, ["train.spam.prior.precision=5"])
    assert recipe.train["map"].prior.precision == 2
    assert recipe.train["spam"].prior.precision == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.spam.epochs=-3", "train.spam.epochs: -3 is not valid: input should be greater"),
        ("train.spam={epochs: -3}", "train.spam.epochs: -3 is not valid: input should be greater"),
        ("data.augment=flp", "data.augment: 'flp' is not valid, did you mean 'flip'"),
        ("train.spam.prior.precision=", "train.spam.prior.precision: null is not valid: "),
        ("seed=1", "seed: unknown key, did you mean 'seeds'?"),
        ("train.spam.epoch=1", "train.spam.epoch: unknown key, did you mean 'epochs'?"),
        ("train.spma.epochs=1", "train.spma: unknown key, did you mean 'spam'"),
        ("prune.1.finetune.epoch=1", "prune.1.finetune.epoch: unknown key, did you mean 'epochs'?"),
        ("prune.1.target=[]", "prune.1.target: unknown key, did you mean 'targets'?"),
        ("model.kwargs.a.b=1", "model.kwargs.a: unknown key, model.kwargs is empty"),
        ("prune.2.kind=x", "prune has no entry '2', valid: 0, 1"),
        ("prune.x.kind=x", "prune has no entry 'x', valid: 0, 1"),
        ("prune.-1.kind=x", "prune has no entry '-1', valid: 0, 1"),
        ("evaluate.latency_batches.0=1", "evaluate.latency_batches has no entry '0', valid: none"),
        ("name.x=1", "name is 'small', with no 'x' inside"),
        ("seeds=[1", "not valid YAML: "),
        ("seeds", "write it as key=value, such as train.spam.epochs=3"),
        ("=3", "write it as key=value, such as train.spam.epochs=3"),
    ],
)
def test_a_wrong_override_is_named_instead_of_a_line(
    write: Write, override: str, message: str
) -> None:
    found = problems(write(), override)
    assert len(found) == 1
    assert found[0].startswith(f"override {override}: {message}")


def test_wrong_overrides_and_wrong_lines_are_reported_together(write: Write) -> None:
    found = problems(write(("[0, 1]", "[-1]")), "seed=1", "threads=0")
    assert [problem.split(": ")[0] for problem in found] == [
        "override seed=1",
        "r.yaml:2",
        "override threads=0",
    ]


def test_a_resolved_recipe_reads_back_equal(write: Write, tmp_path: Path) -> None:
    overrides = [
        "prune.1.finetune.optimiser.lr=1e-5",
        "prune.1.scratch={}",
        "description='yes: 1e-3 #\n\n é'",
        "model.kwargs={a: '1e-3', b: [1, 1.0, null], c: {d: 'on'}}",
    ]
    recipe = load(write(), overrides)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump(recipe), encoding="utf-8")
    again = load(copy)
    assert again == recipe
    assert dump(again) == dump(recipe)
    assert fingerprint(again) == fingerprint(recipe)


def test_a_fingerprint_depends_on_values_and_not_on_how_they_are_written(write: Write) -> None:
    plain = fingerprint(load(write()))
    spelt_out = fingerprint(load(write(("  augment: none\n", ""), ("1e-3", "0.001"))))
    other = fingerprint(load(write(("1e-3", "2e-3"))))
    assert plain == spelt_out
    assert plain != other
    assert len(plain) == 64


def test_a_recipe_made_in_python_is_checked_by_the_same_rules() -> None:
    with pytest.raises(ValueError, match="no training is called 'x'"):
        Recipe.model_validate(
            {
                "name": "a",
                "data": {"name": "d"},
                "model": {"name": "m"},
                "train": {"map": {}},
                "prune": [{"kind": "structured", "targets": [{"ratio": 0.5}], "trainings": ["x"]}],
            }
        )


def test_structured_targets_are_typed(write: Write) -> None:
    experiment = load(write()).prune[1]
    assert isinstance(experiment, Structured)
    assert experiment.targets[0].ratio == 0.5
