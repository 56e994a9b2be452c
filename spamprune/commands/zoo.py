"""``spamprune zoo``: how well networks of timm can be pruned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from spamprune.commands.output import console
from spamprune.errors import PruningError, nearest

if TYPE_CHECKING:
    from spamprune.zoo import Card, Size

app = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})


@app.callback(invoke_without_command=True)
def zoo(context: typer.Context) -> None:
    """List the cards of networks that were pruned; `spamprune zoo check MODEL` makes one."""
    if context.invoked_subcommand is not None:
        return
    from spamprune.zoo import cards

    console().print(table(cards()))


@app.command()
def check(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model that timm knows.")],
    ratio: Annotated[float, typer.Option(help="Fraction of units that go.")] = 0.5,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            help="Units that may go, once for each kind.",
            show_default="all but head_dims and group_dims",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the card goes.", show_default="screen"),
    ] = None,
) -> None:
    """Prune a model with random weights, measure everything, and write a card of it."""
    from spamprune import zoo as cards
    from spamprune.engine.stages import Stages
    from spamprune.pruning.units import DEFAULT_KINDS, KINDS

    for kind in kinds or ():
        if kind not in KINDS:
            raise PruningError(f"unknown kind of units {kind!r}: {nearest(kind, KINDS)}")
    chosen: Any = kinds or DEFAULT_KINDS
    with Stages().stage(f"{model} at ratio {ratio:g}"):
        card = cards.check(model, ratio=ratio, kinds=chosen)
    if out is None:
        typer.echo(cards.as_text(card), nl=False)
    else:
        cards.write(card, out)
        typer.echo(f"card: {out}")


def table(found: list[Card]) -> Table:
    """Return one row for each card."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("model", "family", "outcome"):
        shown.add_column(heading)
    for heading in ("ratio", "parameters", "MACs", "latency", "difference", "left whole"):
        shown.add_column(heading, justify="right")
    for card in found:
        apart = card.difference if card.must_agree else card.inner_difference
        shown.add_row(
            card.model,
            card.family,
            card.outcome,
            f"{card.ratio:g}",
            *(_remaining(size) for size in (card.parameters, card.macs, card.latency_ms)),
            "-" if apart is None else f"{apart:.0e}",
            str(len(card.left_whole)),
        )
    return shown


def _remaining(size: Size | None) -> str:
    return "-" if size is None else f"{size.remain:.1%}"
