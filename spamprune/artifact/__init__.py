"""Saved models: a folder with ``model.safetensors`` and ``config.json``, never a pickle."""

from __future__ import annotations

from spamprune.artifact.format import Config, artifact_bytes, read_config
from spamprune.artifact.load import load
from spamprune.artifact.save import save

__all__ = ["Config", "artifact_bytes", "load", "read_config", "save"]
