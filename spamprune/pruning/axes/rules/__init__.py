"""What each tensor operation does with the axes of its inputs; importing this files all rules."""

from spamprune.pruning.axes.rules import (  # noqa: F401
    elementwise,
    indexing,
    layout,
    products,
    reductions,
    space,
)
