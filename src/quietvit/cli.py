"""The command line: joins the commands of ``commands``.

It computes nothing, and imports nothing heavy before a command runs.
"""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from quietvit import __version__
from quietvit.commands import (
    advising,
    comparing,
    deploying,
    evaluating,
    looking,
    quantizing,
    training,
)
from quietvit.complaints import Command, Commands
from quietvit.plugins import import_plugin

app = typer.Typer(
    cls=Commands,
    name="quietvit",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="[bold]Start here:[/bold]  quietvit compare --recipe digits --output runs/compared",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quietvit {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the place in the code that raised an error.")
    ] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            "--plugin",
            metavar="MODULE",
            help="Import a module with methods, regularizers, targets or tasks of your own. "
            "Repeatable, also after the command.",
        ),
    ] = None,
) -> None:
    """Quantize vision transformers, train them for it, prove what the exported file computes."""
    for module in plugin or ():
        import_plugin(module)


for group in (training, looking, advising, quantizing, comparing, evaluating, deploying):
    for command in group.app.registered_commands:
        command.cls = Command
    app.add_typer(group.app)


def main() -> None:
    """Entry point of the ``quietvit`` command."""
    # torch warns of how torchao registers its types. Users cannot change that.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    app()


if __name__ == "__main__":
    main()
