"""Masks whose sparsity the evidence chooses."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from spamprune.bayes.reduction import pruned_of
from spamprune.copies import copied
from spamprune.engine.subject import Subject
from spamprune.pruning.evidence import STEPS, choose
from spamprune.pruning.masks import Masks, apply_masks, global_masks
from spamprune.report.results import ByEvidence


def masks_by_evidence(subject: Subject, scores: Mapping[str, Tensor]) -> tuple[Masks, ByEvidence]:
    """Return the masks of most evidence along the order of the scores, and what they were."""
    evidence = subject.evidence
    total = sum(score.numel() for score in scores.values())
    most = min(max(total - math.ceil(evidence.effective), 0), total - 1)
    # what remains falls by the same factor from step to step
    steps = [round(total - total * (1 - most / total) ** (j / STEPS)) for j in range(STEPS + 1)]

    def masks(step: int) -> Masks:
        return global_masks(scores, step / total)

    def prune(step: int) -> tuple[nn.Module, Masks]:
        pruned, chosen = copied(subject.model), masks(step)
        apply_masks(pruned, chosen)
        return pruned, chosen

    choice = choose(evidence, list(dict.fromkeys(steps)), prune)
    chosen = subject.with_held(masks(choice.step))
    return chosen, ByEvidence(
        effective=evidence.effective,
        before=evidence.log_evidence,
        after=evidence.log_evidence + choice.change,
        pruned=pruned_of(chosen),
        notes=list(choice.notes),
    )
