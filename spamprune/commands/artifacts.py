"""``spamprune push`` and ``spamprune export``: what can be done with an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of an artifact.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Where to.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="The branch.", show_default="the main one")
    ] = None,
) -> None:
    """Publish an artifact on the Hugging Face hub, as who `hf auth login` says."""
    from spamprune import artifact

    typer.echo(artifact.push(folder, repository, private=private, revision=revision))


def export(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="The folder of an artifact, or hf-hub:OWNER/NAME."),
    ],
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="What to write: .onnx, or .pt2 for torch.export.load."),
    ],
) -> None:
    """Write a saved network for other runtimes, and compare what they compute with it."""
    from spamprune import artifact

    form = "torch" if file.suffix == ".pt2" else "onnx"
    difference = artifact.export(model, file, format=form)  # type: ignore[arg-type]
    typer.echo(f"{file}: differs from the network by {difference:.1e} of the largest output")
