"""Which positions of which tensors belong together, found in one forward pass.

``axis`` says what an axis is and how two are tied, ``rules`` what each tensor operation does with
the axes of its inputs, ``sizes`` where the numbers in a module's code come from. ``recorder`` and
``code`` see the operations and the code as they run, and ``trace`` collects all of it.
"""

from __future__ import annotations
