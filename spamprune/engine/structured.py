"""The structured experiments of a recipe: units removed from a trained network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from spamprune import artifact
from spamprune.engine.bench import Bench, create_model
from spamprune.engine.subject import Subject, train_on
from spamprune.files import write_text
from spamprune.pruning import compaction, plan
from spamprune.pruning.block import BlockOPD
from spamprune.pruning.compensation import compensate
from spamprune.pruning.units import Scores
from spamprune.recipe.schema import BLOCK_OPD, FineTune, Structured, Target
from spamprune.report.results import Compacted, Quality

#: Inputs on which a compacted network is compared with its masked original.
VERIFY_BATCH = 128


def run(subject: Subject) -> Iterator[Compacted]:
    """Run the recipe's structured experiments; its network is left as it is."""
    bench = subject.bench
    for index, experiment in subject.experiments(Structured):
        for criterion in experiment.criteria:
            step = _Step(subject, experiment, criterion)
            for wanted in experiment.targets:
                target = _target(subject, wanted)
                if step.last is not None and step.reached(target):
                    yield _reached(step.last, target)
                    continue
                name = "prune{}-{}-{}-{}{}".format(
                    index, criterion, experiment.ranking, *target.named()
                )
                leads_on = experiment.iterative and wanted != experiment.targets[-1]
                make = partial(_compact, step, index, target, name, leads_on=leads_on)
                record = bench.once(name, Compacted, make)
                yield record
                if leads_on:
                    step = step.next(name, record)


@dataclass(frozen=True)
class _Step:
    """Where pruning stands.

    Attributes:
        subject: The network to prune.
        experiment: How.
        criterion: What its units are ranked by.
        plans: What was removed from the trained network before, in steps.
        last: What the step before came to, if there was one.
    """

    subject: Subject
    experiment: Structured
    criterion: str
    plans: tuple[compaction.Plan, ...] = ()
    last: Compacted | None = None

    @cached_property
    def scores(self) -> Scores:
        """What units are ranked by."""
        if self.criterion == BLOCK_OPD:
            return BlockOPD(self.subject.model, self.subject.posterior)
        return self.subject.scores(self.criterion, self.experiment.batches)

    @property
    def left(self) -> dict[str, float]:
        """Which fractions of the trained network's costs are left, where that is known."""
        return {} if self.last is None else self.last.achieved

    def reached(self, target: plan.Target) -> bool:
        """Return whether the network is as small already: units are coarse."""
        key, value = target.named()
        return key in self.left and value >= self.left[key]

    def remaining(self, target: plan.Target) -> plan.Target:
        """Return a target, which is of the trained network, relative to this one."""
        key, value = target.named()
        if key not in self.left:
            return target
        relative: dict[str, Any] = {key: value / self.left[key]}
        return plan.Target(**relative)

    def next(self, name: str, record: Compacted) -> _Step:
        """Return where pruning stands after the stage ``name``."""
        path = self.subject.bench.folder / f"{name}.plan.json"
        chosen = compaction.Plan.from_json(path.read_text(encoding="utf-8"))
        assert self.experiment.finetune is not None  # steps do not go without
        subject = self.subject.after(name, self.experiment.finetune)
        return replace(self, subject=subject, plans=(*self.plans, chosen), last=record)


def _reached(record: Compacted, target: plan.Target) -> Compacted:
    """Return a network as that of a further target, which it meets already."""
    note = "a step before had met this target already: units are coarse"
    notes = [*(n for n in record.notes if n != note), note]
    return record.model_copy(update={"target": dict([target.named()]), "notes": notes})


def _target(subject: Subject, wanted: Target) -> plan.Target:
    if wanted.evidence is not None:
        return plan.Target(evidence=subject.evidence)
    return plan.Target(**wanted.model_dump())


def _compact(
    step: _Step,
    index: int,
    target: plan.Target,
    name: str,
    *,
    leads_on: bool,
) -> Compacted:
    subject, experiment = step.subject, step.experiment
    bench, model = subject.bench, subject.model
    wanted = step.remaining(target)
    chosen = plan.plan(model, bench.example(), step.scores, wanted, **experiment.choices())
    plans = [*step.plans, chosen]
    full = compensate(model, chosen, subject.posterior) if experiment.compensate else model
    small = compaction.apply(full, chosen)
    residual = compaction.verify(full, small, chosen, bench.example(VERIFY_BATCH))
    before = subject.just_pruned(small, experiment)
    after, scratch = None, None
    if experiment.finetune is not None:
        if experiment.scratch is not None:
            epochs = experiment.scratch_epochs(bench.config, len(plans))
            # a fresh network has no statistics to freeze
            anew = experiment.finetune.model_copy(
                update={"optimiser": experiment.scratch, "epochs": epochs, "norms": "train"}
            )
            scratch = bench.once(
                f"{name}.scratch", Quality, partial(_from_scratch, bench, plans, anew, name)
            )
        held = subject.held and {
            n: compaction.cut_tensor(chosen, n, mask) for n, mask in subject.held.items()
        }
        subject.tune(small, experiment.finetune, name, held, leads_on=leads_on)
        after = bench.quality(small, bench.data.test)
    folder = bench.folder / name
    about = {"plans": [p.summary() for p in plans]} if plans[1:] else {"plan": chosen.summary()}
    artifact.save(small, folder, preprocessing=bench.data.preprocessing, extra=about)
    if experiment.iterative:
        write_text(bench.folder / f"{name}.plan.json", chosen.to_json())
    size = bench.size(small).model_copy(update={"artifact_bytes": artifact.artifact_bytes(folder)})
    return Compacted(
        experiment=index,
        schedule=experiment.schedule,
        criterion=step.criterion,
        compensated=experiment.compensate,
        ranking=experiment.ranking,
        target=dict([target.named()]),
        achieved={key: step.left.get(key, 1.0) * left for key, left in chosen.achieved.items()},
        notes=[f"of the step before: {n}" if step.last else n for n in chosen.notes],
        # a plan tells nothing of layers that cannot be cut further
        widths=(step.last.widths if step.last else {}) | chosen.widths(),
        residual=residual,
        size=size,
        pruned=before,
        finetuned=after,
        scratch=scratch,
        artifact=f"{bench.relative}/{name}",
    )


def _from_scratch(
    bench: Bench, plans: Sequence[compaction.Plan], training: FineTune, name: str
) -> Quality:
    """Train the architecture that plans lead to from fresh weights and measure it."""
    shaped = fresh = create_model(bench.recipe, bench.seed).to(bench.example().device)
    for chosen in plans:
        shaped = compaction.apply(shaped, chosen)
    torch.manual_seed(bench.seed)
    reinitialise(shaped, fresh)
    train_on(bench, shaped, training, f"{name}.scratch")
    return bench.quality(shaped, bench.data.test)


@torch.no_grad()
def reinitialise(small: nn.Module, fresh: nn.Module) -> None:
    """Draw the weights of a network that was cut from a fresh one as for its own sizes.

    A slice of a larger layer has that layer's scale, so layers draw anew as torch does. What the
    architecture sets to one number stays: residual branches that start at zero, gains. Parameters
    that are no layer's own, such as positions, stay slices.
    """
    for module in small.modules():
        attention = isinstance(module, nn.MultiheadAttention)
        reset = getattr(module, "_reset_parameters" if attention else "reset_parameters", None)
        if callable(reset):
            reset()
    parameters = dict(small.named_parameters())
    for name, whole in fresh.named_parameters():
        first = whole.flatten()[0]
        if whole.numel() > 1 and bool((whole == first).all()):
            parameters[name].fill_(first)
