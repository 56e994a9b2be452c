"""Curvature of the loss; every estimator returns a :class:`Curvature`."""

from spamprune.bayes.curvature.base import Curvature
from spamprune.bayes.curvature.exact import exact
from spamprune.bayes.curvature.kron import kron
from spamprune.bayes.curvature.method import CurvatureMethod, fit_curvature
from spamprune.bayes.curvature.preflight import Preflight, preflight
from spamprune.bayes.curvature.sketch import sketch

__all__ = [
    "Curvature",
    "CurvatureMethod",
    "Preflight",
    "exact",
    "fit_curvature",
    "kron",
    "preflight",
    "sketch",
]
