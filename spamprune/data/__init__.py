"""Data sets by name: bundled with scikit-learn, standard files, folders of images."""

from spamprune.data.base import DataSet, Loader, Split
from spamprune.data.sets import DATA_SETS, load

__all__ = ["DATA_SETS", "DataSet", "Loader", "Split", "load"]
