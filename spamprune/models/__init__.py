"""Models by name: the papers' architectures and every one that timm knows."""

from __future__ import annotations

from spamprune.models.build import (
    Source,
    check_fits,
    check_name,
    create,
    register_all,
    source_of,
)

__all__ = ["Source", "check_fits", "check_name", "create", "register_all", "source_of"]
