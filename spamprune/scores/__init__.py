"""Criteria: functions that give every parameter of a model a score; the lowest goes first.

Every criterion serves every kind of pruning: masks threshold its scores, structured pruning sums
them over coupled units. A new one is one function under the :func:`criterion` decorator.
"""

from spamprune.scores.curvature import bmr, fisher, obd, opd
from spamprune.scores.flow import synflow
from spamprune.scores.gradients import grasp, snip, taylor
from spamprune.scores.plain import magnitude, random
from spamprune.scores.registry import CRITERIA, Batches, Criterion, Scores, criterion

__all__ = [
    "CRITERIA",
    "Batches",
    "Criterion",
    "Scores",
    "bmr",
    "criterion",
    "fisher",
    "grasp",
    "magnitude",
    "obd",
    "opd",
    "random",
    "snip",
    "synflow",
    "taylor",
]
