"""The command line: parse, call, print."""

from __future__ import annotations

import errno
import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from spamprune.commands import artifacts, prune, zoo
from spamprune.commands.output import console
from spamprune.errors import RecipeError, SpampruneError
from spamprune.recipe import fields, library
from spamprune.recipe.load import check, describe, load
from spamprune.recipe.schema import Recipe

_FAILED = 2
_INTERRUPTED = 130
_SURROUNDINGS = {  # what the machine refuses; other OSErrors are bugs and keep their traceback
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EFBIG,
    errno.EIO,
    errno.EISDIR,
    errno.EMFILE,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


class _Commands(TyperGroup):
    """Turns what a user can cause into one line on stderr and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except SpampruneError as e:
            _fail(str(e))
        except OSError as e:
            if e.errno not in _SURROUNDINGS:
                raise
            _fail(f"{e.filename}: {e.strerror}" if e.filename else str(e.strerror))
        except KeyboardInterrupt:
            hint = "; go on with --resume" if ctx.invoked_subcommand == "run" else ""
            typer.echo(f"stopped{hint}", err=True)
            raise typer.Exit(_INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A YAML file or a bundled recipe's name; @VARIANT picks one."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Changes to the recipe, such as train.spam.epochs=3 or prune.0.sparsities=[0.5].",
        show_default=False,
    ),
]


def main() -> None:
    """Run the command line; exit with 2 after a mistake of the user's, 130 when interrupted."""
    app()


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"spamprune {version('spamprune')}")
        raise typer.Exit


@app.callback()
def _common(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_show_version
        ),
    ] = False,
) -> None:
    """Make PyTorch networks sparsifiable with Bayesian priors, then prune them for real."""


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results.", show_default="runs/NAME OF THE RECIPE"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what the folder holds.")
    ] = False,
    jobs: Annotated[
        int, typer.Option(min=1, help="Processes that work on trainings and seeds side by side.")
    ] = 1,
) -> None:
    """Train, prune, fine-tune, evaluate and report, as a recipe says."""
    checked = load(recipe, overrides or ())
    from spamprune.engine.run import run as run_recipe
    from spamprune.report.terminal import tables

    folder = out if out is not None else Path("runs") / checked.name
    results = run_recipe(checked, folder, resume=resume, jobs=jobs)
    screen = console()
    for table in tables(results):
        screen.print(table)
    typer.echo(f"report: {folder / 'report.html'}")


@app.command()
def validate(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Check a recipe without running it; print what it would run, or every problem."""
    outcome = check(recipe, overrides or ())
    if isinstance(outcome, Recipe):
        typer.echo(f"ok: {_plan(outcome)}")
        return
    for problem in outcome:
        _complain(problem)
    raise typer.Exit(_FAILED)


@app.command()
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="As tables to read, those of docs/recipes.md.")
    ] = False,
) -> None:
    """Print what recipes may say: a JSON Schema for editors, or tables for reading."""
    if markdown:
        from spamprune.recipe import reference

        typer.echo(reference.markdown(), nl=False)
        return
    typer.echo(json.dumps(fields.of_files(), indent=2, ensure_ascii=False))


@app.command()
def recipes() -> None:
    """List the bundled recipes."""
    found = library.recipes()
    if not found:
        raise RecipeError(f"no recipes in {library.folder('recipes')}: is spamprune damaged?")
    _list({name: describe(path) for name, path in found.items()})


@app.command()
def data() -> None:
    """List the data sets."""
    from spamprune.data import DATA_SETS

    _list({name: DATA_SETS[name].__doc__ or "" for name in DATA_SETS})


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a finished run.")],
) -> None:
    """Write report.html anew from a run's results.json."""
    from spamprune.report.page import write

    typer.echo(f"report: {write(folder)}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs.")],
    out: Annotated[Path, typer.Option(help="Folder for tables and figures.")] = Path("comparison"),
) -> None:
    """Merge finished runs on the same data into tables and figures with standard errors."""
    from spamprune.report.compare import compare as compare_runs

    typer.echo(f"comparison: {compare_runs(runs, out)}")


app.command()(prune.prune)
app.command()(artifacts.push)
app.command()(artifacts.export)
app.add_typer(zoo.app, name="zoo")


def _plan(recipe: Recipe) -> str:
    """Say in one line what a recipe runs."""
    trainings, seeds = ", ".join(recipe.train), ", ".join(map(str, recipe.seeds))
    return (
        f"{recipe.name}, {recipe.model.name} on {recipe.data.name}; trainings: {trainings}; "
        f"seeds: {seeds}; pruning experiments: {len(recipe.prune)}"
    )


def _list(descriptions: dict[str, str]) -> None:
    """Print names in a column, each with the first line of its description."""
    width = max(map(len, descriptions))
    for name, description in descriptions.items():
        first = next(iter(description.strip().splitlines()), "")
        typer.echo(f"{name:{width}}  {first}".rstrip())


def _complain(message: str) -> None:
    typer.echo(f"error: {' '.join(message.split())}", err=True)


def _fail(message: str) -> None:
    _complain(message)
    raise typer.Exit(_FAILED) from None
