"""Which positions of which tensors belong together, found in one forward pass.

``axis`` says what an axis is and how two are tied, ``operations`` what each tensor operation does
with the axes of its inputs, ``sizes`` where the numbers in a module's code come from, and ``trace``
runs a network and collects all of it.
"""

from __future__ import annotations
