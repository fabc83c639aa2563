"""Writes docs/cli.md, and the flag table of README.md where it has markers, from the code.

python -m scripts.make_cli_docs
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from pathlib import Path

import typer

from mlacli.__main__ import EXIT_CODES
from mlacli.cli.app import COMMANDS, build
from mlacli.cli.options import StrictCommand
from mlacli.debug import VARIABLES

ROOT = Path(__file__).resolve().parent.parent
MARKERS = "<!-- flags -->", "<!-- /flags -->"
_INTRO = """\
# Command line

<!-- Written by scripts/make_cli_docs.py: change the code, then run it. -->

Flags are those of llama.cpp and ik_llama.cpp. `_` and `-` are the same in long flags. A value
follows after a space or `=` (`-ub 256`, `-ub=256`); attached only to one letter, and only a number
(`-c4096`). A value in brackets may be left out. When a flag is repeated, the last one counts (in
bench: all of them). Text goes to standard output, everything else to standard error, and every
error is one line that starts with `error: `.

`mlacli --install-completion` sets up completion of commands and flags for your shell.
"""


def cli_page() -> str:
    """docs/cli.md."""
    parts = [_INTRO]
    for name in COMMANDS:
        command = _command(name)
        parts.append(f"## mlacli {name}\n\n{inspect.cleandoc(command.help or '')}\n")
        for section, rows in command.sections().items():
            parts.append(f"### {section}\n\n{_flag_table(rows)}")
    codes = ((f"{code}", text) for code, text in EXIT_CODES.items())
    parts.append("## Exit codes\n\n" + table(("code", "meaning"), codes))
    variables = ((f"`{name}`", text) for name, text in VARIABLES.items())
    parts.append("## Environment variables\n\n" + table(("variable", "meaning"), variables))
    return "\n".join(parts)


def with_flags(text: str) -> str:
    """`text` with the flags of `mlacli run` between the markers, if it has them."""
    start, end = MARKERS
    if start not in text:
        return text
    rows = [row for rows in _command("run").sections().values() for row in rows]
    before, _, rest = text.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{start} without {end}")
    return f"{before}{start}\n{_flag_table(rows)}{end}{after}"


def _command(name: str) -> StrictCommand:
    group = build()
    command = group.get_command(typer.Context(group), name)
    assert isinstance(command, StrictCommand)
    return command


def _flag_table(rows: Iterable[tuple[str, str, str]]) -> str:
    cells = ((f"`{names}`", _escaped(default), _escaped(text)) for names, default, text in rows)
    return table(("flag", "default", "meaning"), cells)


def _escaped(text: str) -> str:
    """Plain text as Markdown that looks the same."""
    return re.sub(r"([\\*<`\[\]])", r"\\\1", text)


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table; only `|` is escaped in the cells."""
    lines = [header, ("---",) * len(header), *rows]
    cells = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def main() -> None:
    (ROOT / "docs" / "cli.md").write_text(cli_page(), encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(with_flags(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
