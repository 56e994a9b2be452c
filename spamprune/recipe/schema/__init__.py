"""What a recipe may say: pydantic models, one per section, defaults those of the paper's code.

Every field is described here and nowhere else: ``spamprune schema`` prints these descriptions, and
unknown keys are errors.
"""

from spamprune.recipe.schema.data import Data, Model
from spamprune.recipe.schema.pruning import (
    BLOCK_OPD,
    Experiment,
    SemiStructured,
    Structured,
    Unstructured,
)
from spamprune.recipe.schema.recipe import Arithmetic, Evaluate, Recipe, RecipeFile
from spamprune.recipe.schema.schedules import Gradual, Online
from spamprune.recipe.schema.selection import Target
from spamprune.recipe.schema.training import (
    Curvature,
    Distil,
    Evidence,
    FineTune,
    Loss,
    Optimiser,
    Prior,
    Train,
    Training,
)
from spamprune.recipe.schema.variational import Reduction, Variational

__all__ = [
    "BLOCK_OPD",
    "Arithmetic",
    "Curvature",
    "Data",
    "Distil",
    "Evaluate",
    "Evidence",
    "Experiment",
    "FineTune",
    "Gradual",
    "Loss",
    "Model",
    "Online",
    "Optimiser",
    "Prior",
    "Recipe",
    "RecipeFile",
    "Reduction",
    "SemiStructured",
    "Structured",
    "Target",
    "Train",
    "Training",
    "Unstructured",
    "Variational",
]
