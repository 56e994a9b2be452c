"""The semi-structured experiments of a recipe: N:M masks on a trained network."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from spamprune import scores
from spamprune.copies import copied
from spamprune.engine.bench import Bench
from spamprune.engine.subject import Subject
from spamprune.errors import PruningError
from spamprune.pruning import cost, masks
from spamprune.pruning.semi_structured import compressed, semi_structured_masks
from spamprune.recipe.schema import SemiStructured
from spamprune.report import measure
from spamprune.report.results import Patterned


def run(subject: Subject) -> Iterator[Patterned]:
    """Run the recipe's semi-structured experiments; its network is left as it is."""
    bench = subject.bench
    for index, experiment in subject.experiments(SemiStructured):
        for criterion in experiment.criteria:
            values = subject.scores(criterion, experiment.batches)
            name = f"prune{index}-{criterion}-{experiment.n}of{experiment.m}"
            yield bench.once(
                name, Patterned, partial(_mask, subject, experiment, index, criterion, values, name)
            )


def _mask(
    subject: Subject,
    experiment: SemiStructured,
    index: int,
    criterion: str,
    values: scores.Scores,
    name: str,
) -> Patterned:
    bench, n, m = subject.bench, experiment.n, experiment.m
    first = subject.held_first(values)
    chosen, notes = semi_structured_masks(subject.model, first, n=n, m=m)
    chosen = subject.with_held(chosen)
    about = {"pattern": f"{n}:{m}", "criterion": criterion}
    pruned, before, after = subject.masked(chosen, experiment, name, about)
    half, sparse, more = _latencies(bench, pruned)
    return Patterned(
        experiment=index,
        criterion=criterion,
        pattern=f"{n}:{m}",
        achieved=masks.sparsity_of(chosen),
        nonzero=cost.nonzero(pruned),
        notes=[*notes, *more],
        pruned=before,
        finetuned=after,
        half_latency=half,
        compressed_latency=sparse,
        artifact=f"{bench.relative}/{name}",
    )


def _latencies(
    bench: Bench, model: nn.Module
) -> tuple[dict[int, float], dict[int, float], list[str]]:
    """Return the seconds by batch size in half precision, with plain and with compressed weights.

    Notes say which weights could not be compressed; where none could there are no times.
    """
    if bench.accelerator.device.type != "cuda":
        return {}, {}, ["no time is saved here: torch computes with 2:4 on NVIDIA GPUs only"]
    half = copied(model).to(torch.float16)
    try:
        sparse, notes = compressed(half)
    except PruningError as error:
        return {}, {}, [f"no time is saved here: {error}"]
    evaluate = bench.recipe.evaluate

    def seconds(network: nn.Module) -> dict[int, float]:
        example = bench.example().to(torch.float16)
        return measure.latencies(
            network, example, evaluate.latency_batches, evaluate.latency_repeats
        )

    return seconds(half), seconds(sparse), notes
