"""Saved models: a folder with weights, a configuration and a model card, never a pickle."""

from __future__ import annotations

from spamprune.artifact.export import export
from spamprune.artifact.format import Config, artifact_bytes, read_config
from spamprune.artifact.load import load
from spamprune.artifact.push import push
from spamprune.artifact.save import save

__all__ = ["Config", "artifact_bytes", "export", "load", "push", "read_config", "save"]
