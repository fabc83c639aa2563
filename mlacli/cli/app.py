"""The command `mlacli`: finds a subcommand and loads only that one."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup, TyperOption
from typer.main import get_command

from mlacli import __version__
from mlacli.cli import console
from mlacli.cli.options import DEBUG, HELP_NAMES
from mlacli.debug import ENV
from mlacli.errors import UsageError

if TYPE_CHECKING:
    from typer._click import Command, Context, HelpFormatter

# Each is the app of a module of its name. The summaries stand here so that help loads none.
COMMANDS = {
    "run": "Answer a prompt.",
    "chat": "Talk with a model.",
    "bench": "Measure the speed of every combination of flags.",
    "sweep": "Measure the speed behind more and more tokens.",
    "compare": "Put two results of bench or sweep side by side.",
    "report": "Show what a model needs: cache, buffers, work per token.",
    "info": "Show what is in a model file.",
    "tokenize": "Show the tokens of a text.",
    "doctor": "Look at what this machine offers, and what to do about it.",
    "tune": "Find the threads and batch sizes that suit a model here.",
    "config": "Show or change what flags are set to when they are not typed.",
    "graph": "Show what is computed for a batch, node by node.",
    "kernels": "List, print and measure the kernels that do it.",
}
_COMPLETION = ("--install-completion", "--show-completion")


class Commands(TyperGroup):
    """Subcommands by name, imported when asked for."""

    def list_commands(self, ctx: Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Context, cmd_name: str) -> Command | None:
        if cmd_name not in COMMANDS:
            return None
        return get_command(importlib.import_module(f"mlacli.cli.{cmd_name}").app)

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # a shell asks what could follow
            return super().parse_args(ctx, args)
        known = (*HELP_NAMES, "--version", "--debug", *_COMPLETION)
        first = next((word for word in args if word not in known), None)
        if first is not None and first.startswith("-"):
            raise UsageError(f"{first}: comes after a command, as in: mlacli run {first} ...")
        if first is not None and first not in COMMANDS:
            raise UsageError(f"{first!r}: no such command (one of {', '.join(COMMANDS)})")
        return super().parse_args(ctx, args or ["--help"])

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def get_help_option_names(self, ctx: Context) -> list[str]:
        return HELP_NAMES

    def get_help_option(self, ctx: Context) -> TyperOption | None:
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False  # typer has None, which only pydantic could read
        return option


def _show_version(wanted: bool) -> None:
    if wanted:
        console.write(f"mlacli {__version__}\n")
        raise typer.Exit


def _mlacli(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Show the version and exit.",
            callback=_show_version,
            is_eager=True,
            show_default=False,
        ),
    ] = False,
    debug: Annotated[bool, DEBUG] = False,
) -> None:
    """Run DeepSeek-style MLA models (GGUF) on CPUs."""


def build(*, completion: bool = False) -> Commands:
    """The whole command line; `completion` adds typer's flags for shells, which cost time."""
    app = typer.Typer(
        cls=Commands,
        callback=_mlacli,
        add_completion=completion,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    group = get_command(app)
    assert isinstance(group, Commands)
    return group


def run(argv: Sequence[str]) -> int:
    """Parse `argv`, run the command, return its exit code. Errors come out as exceptions."""
    group = build(completion=ENV.completes or COMMANDS.keys().isdisjoint(argv))
    if ENV.completes:
        group.main(list(argv), prog_name="mlacli")
    with group.make_context("mlacli", list(argv)) as ctx:
        return group.invoke(ctx) or 0
