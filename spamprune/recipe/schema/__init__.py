"""What a recipe may say: pydantic models, one per section, defaults those of the paper's code.

Every field is described here and nowhere else: ``spamprune schema`` prints these descriptions, and
unknown keys are errors.
"""

from spamprune.recipe.schema.data import Data, Model
from spamprune.recipe.schema.pruning import Experiment, Structured, Target, Unstructured
from spamprune.recipe.schema.recipe import Evaluate, Recipe, RecipeFile
from spamprune.recipe.schema.training import (
    Curvature,
    Evidence,
    FineTune,
    Optimiser,
    Prior,
    Train,
)

__all__ = [
    "Curvature",
    "Data",
    "Evaluate",
    "Evidence",
    "Experiment",
    "FineTune",
    "Model",
    "Optimiser",
    "Prior",
    "Recipe",
    "RecipeFile",
    "Structured",
    "Target",
    "Train",
    "Unstructured",
]
