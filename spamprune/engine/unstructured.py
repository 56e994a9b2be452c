"""The unstructured experiments of a recipe: masks on a trained network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

from spamprune import scores
from spamprune.engine.automatic import masks_by_evidence
from spamprune.engine.subject import Subject
from spamprune.pruning import cost, masks
from spamprune.recipe.schema import Unstructured
from spamprune.report.results import Masked


def run(subject: Subject) -> Iterator[Masked]:
    """Run the recipe's unstructured experiments; its network is left as it is."""
    bench = subject.bench
    for index, experiment in subject.experiments(Unstructured):
        for criterion in experiment.criteria:
            start, scored = subject, _scored(subject, experiment, criterion)
            by_evidence = [None] if experiment.target == "evidence" else []
            goals = [*experiment.sparsities, *by_evidence]
            for sparsity in goals:
                goal = "evidence" if sparsity is None else sparsity
                name = f"prune{index}-{criterion}-{goal}"
                leads_on = experiment.iterative and sparsity != goals[-1]
                make = partial(_mask, start, experiment, index, criterion, scored, sparsity, name)
                yield bench.once(name, Masked, partial(make, leads_on=leads_on))
                if leads_on and experiment.finetune is not None:
                    start = start.after(name, experiment.finetune)
                    scored = _scored(start, experiment, criterion)


def _scored(
    subject: Subject, experiment: Unstructured, criterion: str
) -> Callable[[], scores.Scores]:
    """Return what scores the network, once and when it is wanted."""
    return cache(partial(subject.scores, criterion, experiment.batches))


def _mask(
    subject: Subject,
    experiment: Unstructured,
    index: int,
    criterion: str,
    scored: Callable[[], scores.Scores],
    sparsity: float | None,
    name: str,
    *,
    leads_on: bool,
) -> Masked:
    """Prune to a sparsity, or where there is none, to that of most evidence."""
    found = None
    if sparsity is None:
        comparable = _comparable(subject, experiment, criterion, scored())
        chosen, found = masks_by_evidence(subject, comparable)
    else:
        chosen = subject.with_held(_choose(subject, experiment, criterion, scored, sparsity))
    achieved = masks.sparsity_of(chosen)
    about = {"sparsity": achieved, "criterion": criterion}
    pruned, before, after = subject.masked(chosen, experiment, name, about, leads_on=leads_on)
    return Masked(
        experiment=index,
        schedule=experiment.schedule,
        criterion=criterion,
        rounds=experiment.rounds,
        requested=achieved if sparsity is None else sparsity,
        achieved=achieved,
        chosen=found,
        nonzero=cost.nonzero(pruned),
        pruned=before,
        finetuned=after,
        artifact=f"{subject.bench.relative}/{name}",
    )


def _choose(
    subject: Subject,
    experiment: Unstructured,
    criterion: str,
    scored: Callable[[], scores.Scores],
    sparsity: float,
) -> masks.Masks:
    """Return masks of the sparsity, at once or in rounds."""
    if experiment.rounds == 1:
        return masks.global_masks(_comparable(subject, experiment, criterion, scored()), sparsity)
    return masks.iterative_masks(
        subject.model,
        lambda model: _comparable(
            subject,
            experiment,
            criterion,
            subject.scores(criterion, experiment.batches, model),
        ),
        sparsity,
        rounds=experiment.rounds,
        start=subject.held,
    )


def _comparable(
    subject: Subject, experiment: Unstructured, criterion: str, scored: scores.Scores
) -> scores.Scores:
    """Return scores that can be compared over the whole network."""
    if experiment.threshold == "lamp":
        if criterion == "magnitude":  # whose squares are the damages that LAMP divides
            scored = {name: score.double().square() for name, score in scored.items()}
        scored = masks.lamp(scored)
    return subject.held_first(scored)
