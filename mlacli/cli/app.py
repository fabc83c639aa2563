"""The command `mlacli`: finds a subcommand and loads only that one."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import click

from mlacli import __version__
from mlacli.cli.options import DEBUG_HELP, HELP_NAMES
from mlacli.errors import UsageError

# Each is `command` in a module of its name. The summaries stand here so that help loads none.
COMMANDS = {
    "run": "Answer a prompt.",
    "bench": "Measure the speed of every combination of flags.",
    "report": "Show what a model needs: cache, buffers, work per token.",
}


class Commands(click.Group):
    """Subcommands by name, imported when asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"mlacli.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        known = (*HELP_NAMES, "--version", "--debug")
        first = next((word for word in args if word not in known), None)
        if first is not None and first.startswith("-"):
            raise UsageError(f"{first}: comes after a command, as in: mlacli run {first} ...")
        if first is not None and first not in COMMANDS:
            raise UsageError(f"{first!r}: no such command (one of {', '.join(COMMANDS)})")
        return super().parse_args(ctx, args or ["--help"])

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def build() -> Commands:
    """The whole command line."""
    return Commands(
        "mlacli",
        help="Run DeepSeek-style MLA models (GGUF) on CPUs.",
        context_settings={"help_option_names": HELP_NAMES},
        params=[click.Option(["--debug"], is_flag=True, expose_value=False, help=DEBUG_HELP)],
    )


def run(argv: Sequence[str]) -> int:
    """Parse `argv`, run the command, return its exit code. Errors come out as exceptions."""
    group = build()
    click.version_option(__version__, message="mlacli %(version)s")(group)
    with group.make_context("mlacli", list(argv)) as ctx:
        return group.invoke(ctx) or 0
