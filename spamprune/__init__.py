"""spamprune: make PyTorch networks sparsifiable with Bayesian priors, then prune them for real."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spamprune import scores
    from spamprune.artifact.export import export
    from spamprune.artifact.load import load
    from spamprune.artifact.push import push
    from spamprune.artifact.save import save
    from spamprune.bayes.curvature import CurvatureMethod, preflight
    from spamprune.bayes.likelihood import Classification, Regression
    from spamprune.bayes.posterior import Posterior, fit_posterior, load_posterior
    from spamprune.bayes.prior import Prior
    from spamprune.bayes.reduction import Reduction
    from spamprune.bayes.spam import SpaM
    from spamprune.bayes.variational import MeanField
    from spamprune.engine.run import run
    from spamprune.pruning.block import BlockOPD
    from spamprune.pruning.compaction import Plan, apply, verify
    from spamprune.pruning.compensation import compensate
    from spamprune.pruning.evidence import Evidence
    from spamprune.pruning.importance import OPDImportance, ScoreImportance
    from spamprune.pruning.plan import Target, plan
    from spamprune.pruning.recalibrate import recalibrate

__all__ = [
    "BlockOPD",
    "Classification",
    "CurvatureMethod",
    "Evidence",
    "MeanField",
    "OPDImportance",
    "Plan",
    "Posterior",
    "Prior",
    "Reduction",
    "Regression",
    "ScoreImportance",
    "SpaM",
    "Target",
    "apply",
    "compensate",
    "export",
    "fit_posterior",
    "load",
    "load_posterior",
    "plan",
    "preflight",
    "push",
    "recalibrate",
    "run",
    "save",
    "scores",
    "verify",
]

# Names are loaded when they are first used: torch, timm and torch-pruning take seconds.
_HOMES = {
    "BlockOPD": "spamprune.pruning.block",
    "Classification": "spamprune.bayes.likelihood",
    "CurvatureMethod": "spamprune.bayes.curvature",
    "Evidence": "spamprune.pruning.evidence",
    "MeanField": "spamprune.bayes.variational",
    "OPDImportance": "spamprune.pruning.importance",
    "Plan": "spamprune.pruning.compaction",
    "Posterior": "spamprune.bayes.posterior",
    "Prior": "spamprune.bayes.prior",
    "Reduction": "spamprune.bayes.reduction",
    "Regression": "spamprune.bayes.likelihood",
    "ScoreImportance": "spamprune.pruning.importance",
    "SpaM": "spamprune.bayes.spam",
    "Target": "spamprune.pruning.plan",
    "apply": "spamprune.pruning.compaction",
    "compensate": "spamprune.pruning.compensation",
    "export": "spamprune.artifact",
    "fit_posterior": "spamprune.bayes.posterior",
    "load": "spamprune.artifact",
    "load_posterior": "spamprune.bayes.posterior",
    "plan": "spamprune.pruning.plan",
    "preflight": "spamprune.bayes.curvature",
    "push": "spamprune.artifact",
    "recalibrate": "spamprune.pruning.recalibrate",
    "run": "spamprune.engine.run",
    "save": "spamprune.artifact",
    "verify": "spamprune.pruning.compaction",
}


def __getattr__(name: str) -> Any:
    if name == "scores":
        return importlib.import_module("spamprune.scores")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'spamprune' has no attribute {name!r}")
