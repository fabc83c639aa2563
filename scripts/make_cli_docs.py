"""Writes docs/cli.md, and tables of README.md and docs/config.md between markers, from the code.

python -m scripts.make_cli_docs
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from pathlib import Path

import typer

from mlacli.__main__ import EXIT_CODES
from mlacli.cli import sources
from mlacli.cli.app import COMMANDS, build
from mlacli.cli.options import StrictCommand
from mlacli.debug import VARIABLES

ROOT = Path(__file__).resolve().parent.parent
_FEW = 3  # flags of a table that may stand in several places
MARKERS = "<!-- flags -->", "<!-- /flags -->"
VARIABLE_MARKERS = "<!-- variables -->", "<!-- /variables -->"
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
    parts, told = [_INTRO], dict[str, str]()  # a table, and the command that it stands under
    for name in COMMANDS:
        command, same = _command(name), dict[str, list[str]]()
        parts.append(f"## mlacli {name}\n\n{inspect.cleandoc(command.help or '')}\n")
        for section, rows in command.sections().items():
            found = f"### {section}\n\n{_flag_table(rows)}"
            if len(rows) > _FEW and told.setdefault(found, name) != name:
                same.setdefault(told[found], []).append(section)
            else:
                parts.append(found)
        for other, sections in same.items():
            parts.append(f"As `mlacli {other}`: {', '.join(sections)}.\n")
    codes = ((f"{code}", text) for code, text in EXIT_CODES.items())
    parts.append("## Exit codes\n\n" + table(("code", "meaning"), codes))
    variables = ((f"`{name}`", text) for name, text in VARIABLES.items())
    more = "Every flag has a variable, too: docs/config.md lists them.\n"
    parts.append(
        "## Environment variables\n\n" + table(("variable", "meaning"), variables) + f"\n{more}"
    )
    return "\n".join(parts)


def with_flags(text: str) -> str:
    """`text` with the flags of `mlacli run` between the markers, if it has them."""
    rows = [row for rows in _command("run").sections().values() for row in rows]
    return _between(text, MARKERS, _flag_table(rows))


def with_variables(text: str) -> str:
    """`text` with the keys of all flags and their variables between the markers."""
    commands = {name: _command(name) for name in COMMANDS}
    every = {name: c for name, c in commands.items() if c.reads_settings}
    rows: dict[str, tuple[str, str, list[str]]] = {}
    for name, command in every.items():
        for key, (option, positive) in sources.keys_of(command).items():
            if key == sources.main_key(option) and positive:
                same = [k for k in sources.keys_of(command) if k in sources.LLAMA_ARGS]
                theirs = [sources.LLAMA_ARGS[k] for k in same if f"--{k}" in option.opts] + [
                    sources.LLAMA_NEGATIVES[k] for k in (key,) if k in sources.LLAMA_NEGATIVES
                ]
                peers = ", ".join(f"`{v}`" for v in theirs)
                rows.setdefault(key, (sources.variable(key), peers, []))[2].append(name)
    cells = (
        (f"`{key}`", f"`{own}`", peers, ", ".join(names) if len(names) < len(every) else "all")
        for key, (own, peers, names) in rows.items()
    )
    head = ("key", "variable", "llama.cpp's variable", "commands")
    return _between(text, VARIABLE_MARKERS, table(head, cells))


def _between(text: str, markers: tuple[str, str], new: str) -> str:
    start, end = markers
    if start not in text:
        return text
    before, _, rest = text.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{start} without {end}")
    return f"{before}{start}\n{new}{end}{after}"


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
    page = ROOT / "docs" / "config.md"
    page.write_text(with_variables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
