"""Curvature of the loss; every estimator returns a :class:`Curvature`."""

from spamprune.bayes.curvature.base import Curvature
from spamprune.bayes.curvature.sketch import cross_entropies, sketch

__all__ = ["Curvature", "cross_entropies", "sketch"]
