"""``spamprune prune``: the shortest way for a trained network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from spamprune.commands.output import console
from spamprune.errors import DataError, PruningError

if TYPE_CHECKING:
    from spamprune.engine.prune import Outcome

_BUDGET = "Budget (exactly one)"
_TUNE = "Fine-tuning"


def prune(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model of timm with its published weights, the folder of an artifact, or "
            "hf-hub:OWNER/NAME.",
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="NAME|DIR",
            help="A data set (`spamprune data` lists them), or a folder with train and test or "
            "val, each with a folder of images for each class.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="New folder for the artifact and plan.json.")
    ],
    ratio: Annotated[
        float | None,
        typer.Option(help="Fraction of units that go.", rich_help_panel=_BUDGET),
    ] = None,
    macs: Annotated[
        float | None,
        typer.Option(help="Fraction of multiply-accumulates that remain.", rich_help_panel=_BUDGET),
    ] = None,
    params: Annotated[
        float | None,
        typer.Option(help="Fraction of parameters that remain.", rich_help_panel=_BUDGET),
    ] = None,
    bytes_: Annotated[
        float | None,
        typer.Option("--bytes", help="Fraction of bytes that remain.", rich_help_panel=_BUDGET),
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option(
            help="Fraction of the measured time of a forward pass of one sample that remains.",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    evidence: Annotated[
        bool,
        typer.Option(
            "--evidence",
            help="None: as small as the evidence of the Laplace posterior says.",
            rich_help_panel=_BUDGET,
        ),
    ] = False,
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Weights of the model, a safetensors file."),
    ] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Leave the model untrained, to try things out.")
    ] = False,
    root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with the files of a data set.")
    ] = None,
    criterion: Annotated[
        str, typer.Option(help="What scores weights: opd, obd, taylor, magnitude, random …")
    ] = "opd",
    ranking: Annotated[
        str, typer.Option(help="How units are compared: uniform, global, per_cost, isomorphic.")
    ] = "uniform",
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            help="Units that may go, once for each kind: heads, head_dims, groups, group_dims, "
            "width, hidden.",
            show_default="all but head_dims and group_dims",
        ),
    ] = None,
    round_to: Annotated[
        int, typer.Option(min=1, help="Channels that remain are a multiple of this.")
    ] = 1,
    calibration: Annotated[
        int,
        typer.Option(min=1, help="Training samples for the posterior and for BatchNorm."),
    ] = 2000,
    decay: Annotated[
        float | None,
        typer.Option(
            help="Weight decay that the network was trained with, which makes the prior, of "
            "fine-tuning too; with --evidence the choice depends on it.",
            show_default="a prior of N(0, 1)",
        ),
    ] = None,
    epochs: Annotated[
        int, typer.Option(min=0, help="Passes over the training data.", rich_help_panel=_TUNE)
    ] = 0,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.", rich_help_panel=_TUNE)] = 3e-4,
    augment: Annotated[
        str,
        typer.Option(
            help="Of the images: none, flip or flip_crop.",
            rich_help_panel=_TUNE,
        ),
    ] = "none",
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a batch.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything random.")] = 0,
) -> None:
    """Prune a trained network: score, remove, recalibrate, fine-tune, measure, save."""
    from spamprune import data as data_sets
    from spamprune.engine import network
    from spamprune.engine import prune as engine
    from spamprune.engine.stages import Stages
    from spamprune.pruning.plan import Target
    from spamprune.pruning.units import DEFAULT_KINDS

    chosen: Any = {"ranking": ranking, "kinds": tuple(kinds or DEFAULT_KINDS), "augment": augment}
    budgets = {"ratio": ratio, "macs": macs, "params": params, "bytes": bytes_, "latency": latency}
    given: dict[str, Any] = {name: v for name, v in budgets.items() if v is not None}
    if len(given) + evidence != 1:
        valid = ", ".join(f"--{name}" for name in (*budgets, "evidence"))
        raise PruningError(f"give exactly one of {valid}")
    request = engine.Request(
        None if evidence else Target(**given),
        criterion=criterion,
        round_to=round_to,
        calibration=calibration,
        decay=decay,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        seed=seed,
        **chosen,  # which the request checks
    )
    stages = Stages()
    with stages.stage(f"data: {data}"):
        if data not in data_sets.DATA_SETS and Path(data).is_dir():
            if root is not None:
                raise DataError(f"{data} is the folder of the images itself: leave out --root")
            data, root = "image_folder", Path(data)
        samples = data_sets.load(data, root=root, validation=0, seed=seed)
    with stages.stage(f"network: {model}"):
        found = network.find(model, samples, weights=weights, random=random, seed=seed)
    outcome = engine.prune(found, samples, request, out, stages)
    screen = console()
    for table in tables(outcome):
        screen.print(table)
    for note in grouped_notes(outcome):
        typer.echo(f"note: {note}")
    typer.echo(f"artifact: {out}")


def tables(outcome: Outcome) -> list[Table]:
    """Return what the network costs, dense and pruned, and its accuracy by stage."""
    dense, pruned = outcome.sizes["dense"], outcome.sizes["pruned"]
    costs = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    costs.add_column("")
    for heading in ("dense", "pruned", "remain"):
        costs.add_column(heading, justify="right")

    def row(name: str, before: float, after: float, form: str = ",") -> None:
        costs.add_row(name, f"{before:{form}}", f"{after:{form}}", f"{after / before:.1%}")

    row("parameters", dense.params, pruned.params)
    row("bytes of parameters", dense.bytes, pruned.bytes)
    row("MACs of a sample", dense.macs, pruned.macs)
    for batch in dense.latency:
        milliseconds = 1000 * dense.latency[batch], 1000 * pruned.latency[batch]
        row(f"latency of a batch of {batch}, ms", *milliseconds, form=".2f")
    accuracy = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    accuracy.add_column("accuracy, %")
    for stage in outcome.accuracy:
        accuracy.add_column(stage, justify="right")
    accuracy.add_row("test", *(f"{value:.2f}" for value in outcome.accuracy.values()))
    return [costs, accuracy]


def grouped_notes(outcome: Outcome) -> list[str]:
    """Return what was left whole and why, and how far the mask and the compacted network agree."""
    from spamprune.pruning.notes import grouped

    agreement = f"difference from the masked network: {outcome.residual:.1e} of the largest output"
    if not outcome.plan.comparable:
        agreement += ", by right: normalisation over pruned units sees the mask's zeros"
    return [agreement, *grouped(outcome.plan.notes)]
