"""The errors of spamprune: each says what is wrong, where, and what to do.

The command line prints ``str(error)`` on one line and exits with status 2, so a message must
stand on its own: name the recipe line, layer or file, the offending value, and the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SpampruneError(Exception):
    """Base of everything that a user's input or surroundings can cause."""


class RecipeError(SpampruneError):
    """A recipe, or an override of one, that cannot be understood."""


class DataError(SpampruneError):
    """A data set that is missing, damaged or does not fit the model."""


class ModelError(SpampruneError):
    """A model that is unknown or cannot be built as asked."""


class TrainingError(SpampruneError):
    """Training that cannot go on, such as a loss that is no longer a number."""


class PosteriorError(SpampruneError):
    """Curvature, priors or posteriors that do not belong to the model at hand."""


class PruningError(SpampruneError):
    """A mask, plan or target that cannot be met."""


class ArtifactError(SpampruneError):
    """A saved model that is damaged, foreign or does not fit."""


class OutputError(SpampruneError):
    """A place for results that cannot be used."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint naming the closest valid spellings of ``name``.

    Returns:
        ``"did you mean 'a' or 'b'?"``, or the list of choices where none is close.
    """
    choices = sorted(set(valid))
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "valid: " + ", ".join(choices[:12]) + (", …" if len(choices) > 12 else "")
