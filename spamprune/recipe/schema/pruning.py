"""What is pruned, and how far."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from spamprune.recipe.schema.section import (
    Distinct,
    Fraction,
    Section,
    distinct,
    fault,
    idle,
    known,
)
from spamprune.recipe.schema.selection import Criterion, Target, Units
from spamprune.recipe.schema.training import (
    Curvature,
    FineTune,
    Optimiser,
    Train,
    check_prior_step,
)

#: Scores whole units only, not weights one by one.
BLOCK_OPD = "block_opd"
#: Criteria that see no training data themselves.
_BLIND = {"opd", "obd", "bmr", "magnitude", "random", "synflow", BLOCK_OPD}
UnitCriterion = Annotated[str, known("criterion", BLOCK_OPD)]


def _leaves_out_masked(finetune: FineTune) -> FineTune:
    if finetune.curvature.structure == "kron":
        raise fault(
            "Kronecker factors cannot leave out masked weights: use 'diag'",
            *("curvature", "structure"),
        )
    return finetune


MaskedFineTune = Annotated[FineTune, AfterValidator(_leaves_out_masked)]


class Selective(Section):
    """An experiment on some of the trainings."""

    trainings: list[str] | None = Field(
        None,
        min_length=1,
        description="Names of the trainings this applies to; all by default.",
    )
    recalibrate: bool = Field(
        False,
        description="Take the running statistics of BatchNorm anew, on the training data, before "
        "the pruned network is measured.",
    )
    batches: int | None = Field(
        None,
        ge=1,
        description="Batches of training data, drawn by the seed and as large as those that the "
        "network was trained on last, that snip, grasp, taylor and fisher see; all by default.",
    )

    def concerns(self, training: str) -> bool:
        """Return whether the experiment is made on a training."""
        return self.trainings is None or training in self.trainings

    @property
    def iterative(self) -> bool:
        """Whether each network is pruned from the fine-tuned one before it."""
        return False

    def check_used(self, criteria: list[str], finetune: FineTune | None) -> None:
        """Refuse batches that no criterion sees, and a curvature that nothing is scored by."""
        if _BLIND.issuperset(criteria):
            idle(self, f"{', '.join(criteria)} see no training data", "batches")
        if finetune is None or finetune.method == "spam" or self.iterative:
            return
        if finetune.curvature != Curvature():
            raise fault(
                "it is for method 'spam' or schedule 'iterative': leave it out",
                *("finetune", "curvature"),
            )


class Scheduled(Selective):
    """An experiment that may go step by step."""

    schedule: Literal["one_shot", "iterative"] = Field(
        "one_shot",
        description="one_shot: each network is pruned from the trained one; iterative: from the "
        "one before it, once that is fine-tuned and scored anew, with the fine-tuning's prior, "
        "temperature and curvature.",
    )

    @property
    def iterative(self) -> bool:
        """Whether each network is pruned from the fine-tuned one before it."""
        return self.schedule == "iterative"

    def check_tuned(self, finetune: FineTune | None) -> None:
        """Refuse steps without fine-tuning."""
        if self.iterative and finetune is None:
            raise fault("'iterative' fine-tunes after each step: give finetune", "schedule")


class Masking(Selective):
    """An experiment that sets weights to zero and leaves shapes as they are."""

    criteria: Distinct[Criterion] = Field(["opd"], description="Scores to prune by.")
    finetune: MaskedFineTune | None = Field(
        None, description="Training after pruning; none by default."
    )

    @model_validator(mode="after")
    def _settings_are_used(self) -> Masking:
        self.check_used(self.criteria, self.finetune)
        return self


#: Criteria that give other scores once some weights are gone.
_CHANGING = ("snip", "grasp", "taylor", "synflow")
#: Criteria whose scores may be negative.
_SIGNED = ("bmr",)


class Unstructured(Scheduled, Masking):
    """Global masks over all parameters."""

    kind: Literal["unstructured"] = Field(description="Which kind of pruning this is.")
    sparsities: Annotated[list[Fraction], AfterValidator(distinct)] = Field(
        [0.2, 0.4, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99],
        description="Fractions of weights set to zero.",
    )
    target: Literal["evidence"] | None = Field(
        None,
        description="evidence: also the sparsity of most evidence, found for each network; the "
        "sparsities may then be [].",
    )
    threshold: Literal["global", "lamp"] = Field(
        "global",
        description="global: scores as they are; lamp: relative to the larger of their tensor (Lee "
        "et al. 2021), magnitudes squared first.",
    )
    rounds: int = Field(
        1,
        ge=1,
        le=1000,
        description="How often weights are scored on the way to a sparsity; synflow's paper: 100.",
    )

    @model_validator(mode="after")
    def _threshold_takes_the_scores(self) -> Unstructured:
        signed = [c for c in self.criteria if c in _SIGNED]
        if self.threshold == "lamp" and signed:
            raise fault(
                f"'lamp' divides by sums of scores, and those of {', '.join(signed)} may be "
                "negative: use 'global'",
                "threshold",
            )
        return self

    @model_validator(mode="after")
    def _some_sparsity(self) -> Unstructured:
        if not self.sparsities and self.target is None:
            raise fault("give at least one, or target: evidence", "sparsities")
        if self.target is not None and self.rounds > 1:
            raise fault("rounds lead to a sparsity that is given: leave target out", "target")
        same = [c for c in self.criteria if c not in _CHANGING]
        if self.rounds > 1 and same:
            raise fault(
                f"{', '.join(same)} would give the same masks at once: a posterior is fitted once, "
                f"so rounds are for {', '.join(_CHANGING)}",
                "rounds",
            )
        return self

    @model_validator(mode="after")
    def _steps_lead_on(self) -> Unstructured:
        self.check_tuned(self.finetune)
        if not self.iterative:
            return self
        if self.target is not None:
            raise fault(
                "the evidence is of the network that training left, so that it chooses for "
                "'one_shot' only: leave target out",
                "target",
            )
        if self.sparsities != sorted(self.sparsities):
            raise fault(
                "'iterative' goes from one to the next: order them from low to high", "sparsities"
            )
        return self


class SemiStructured(Masking):
    """N:M masks: of each M weights along the input dimension the N best stay."""

    kind: Literal["semi_structured"] = Field(description="Which kind of pruning this is.")
    n: int = Field(2, ge=1, description="N, the weights of each M that stay.")
    m: int = Field(4, ge=2, description="M, the size of a group; GPUs compute with 2 of 4.")

    @model_validator(mode="after")
    def _something_goes(self) -> SemiStructured:
        if self.n >= self.m:
            raise fault(f"{self.n} of {self.m} leave nothing out: choose a smaller one", "n")
        return self


class Scratch(Optimiser):
    """How a pruned architecture is trained from fresh weights."""

    budget: Literal["finetune", "total"] = Field(
        "finetune",
        description="finetune: as many epochs as the fine-tuning, of all steps so far; total: as "
        "many as the training and the fine-tuning together.",
    )


#: Budgets that later steps can be told relative to the network before them.
_COSTS = ("macs", "params", "bytes")


class Structured(Units, Scheduled):
    """Units removed for real, coupled layers together."""

    kind: Literal["structured"] = Field(description="Which kind of pruning this is.")
    criteria: Distinct[UnitCriterion] = Field(
        ["opd"],
        description="Scores to prune by, summed over units; block_opd: OPD of whole units, for "
        "trainings with Kronecker factors.",
    )
    ratios: dict[str, Fraction] = Field(
        default_factory=dict,
        description="Fractions that go from layers of these names or patterns in any case.",
    )
    targets: Distinct[Target] = Field(description="How small the network becomes.")
    finetune: FineTune | None = Field(None, description="Training after pruning; none by default.")
    scratch: Scratch | None = Field(
        None,
        description="Also train the pruned architecture from fresh weights and without a teacher: "
        "the honest baseline.",
    )
    compensate: bool = Field(
        False,
        description="Let the weights that stay make up for those that go, as the posterior says; "
        "for trainings with Kronecker factors.",
    )

    def choices(self) -> dict[str, Any]:
        """Return what ``spamprune.plan`` is told besides scores and target."""
        return {**super().choices(), "ratios": self.ratios}

    @model_validator(mode="after")
    def _settings_are_used(self) -> Structured:
        self.check_used(self.criteria, self.finetune)
        return self

    @model_validator(mode="after")
    def _ranking_has_a_cost(self) -> Structured:
        for i, target in enumerate(self.targets):
            if self.ranking == "per_cost" and target.ratio is not None:
                raise fault(
                    "a ratio names no cost for ranking 'per_cost': use 'global', or give macs, "
                    "params or bytes",
                    *("targets", i, "ratio"),
                )
        return self

    @model_validator(mode="after")
    def _scratch_needs_finetune(self) -> Structured:
        if self.scratch is not None and self.finetune is None:
            raise fault("it is compared with fine-tuning: give finetune too", "scratch")
        if self.scratch is not None and self.finetune is not None:
            check_prior_step(self.scratch, "scratch")
            epochs = self.finetune.epochs
            if self.scratch.budget == "finetune" and self.scratch.warmup >= epochs:
                raise fault(
                    f"{self.scratch.warmup} of {epochs} epochs leave none at full rate",
                    *("scratch", "warmup"),
                )
        return self

    @model_validator(mode="after")
    def _steps_lead_on(self) -> Structured:
        self.check_tuned(self.finetune)
        if not self.iterative or self.finetune is None:
            return self
        if self.ratios:
            raise fault("each step would remove them again: leave ratios out", "ratios")
        given = [(k, v) for t in self.targets for k, v in t.model_dump(exclude_none=True).items()]
        keys, budgets = {key for key, _ in given}, [budget for _, budget in given]
        if len(keys) > 1 or not keys <= set(_COSTS):
            raise fault(
                f"'iterative' goes from budget to budget: give all of one of {', '.join(_COSTS)}",
                "targets",
            )
        if budgets != sorted(budgets, reverse=True):
            raise fault(
                "'iterative' goes from one to the next: order them from large to small", "targets"
            )
        field = self.needs_factors()
        if field is not None and self.finetune.curvature.structure != "kron":
            raise fault(
                "steps after the first need Kronecker factors of the fine-tuned network: give "
                "finetune.curvature.structure 'kron'",
                *field,
            )
        return self

    def scratch_epochs(self, training: Train, tunings: int) -> int:
        """Return how long a pruned architecture is trained from fresh weights.

        Args:
            training: What the pruned network comes from.
            tunings: How often that was fine-tuned.
        """
        if self.scratch is None or self.finetune is None:
            return 0
        before = training.epochs if self.scratch.budget == "total" else 0
        return before + self.finetune.epochs * tunings

    def needs_factors(self) -> tuple[str | int, ...] | None:
        """Return the field that asks for Kronecker factors of the posterior, if one does."""
        if self.compensate:
            return ("compensate",)
        if BLOCK_OPD in self.criteria:
            return ("criteria", self.criteria.index(BLOCK_OPD))
        return None


Experiment = Annotated[Unstructured | SemiStructured | Structured, Field(discriminator="kind")]
