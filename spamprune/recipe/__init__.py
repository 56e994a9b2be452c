"""Recipes: what an experiment does, as data."""

from spamprune.recipe.load import dump, fingerprint, load
from spamprune.recipe.schema import Recipe

__all__ = ["Recipe", "dump", "fingerprint", "load"]
