"""docs/cli.md says what the code does."""

from __future__ import annotations

import inspect

import pytest

from mlacli import debug, errors
from mlacli.__main__ import EXIT_CODES
from mlacli.cli import sources
from mlacli.cli.app import COMMANDS
from scripts.make_cli_docs import MARKERS, ROOT, cli_page, table, with_flags, with_variables

STALE = "run: python -m scripts.make_cli_docs"


def test_page_is_fresh() -> None:
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == cli_page(), STALE


def test_readme_is_fresh() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_flags(text) == text, STALE


def test_config_page_is_fresh() -> None:
    text = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert with_variables(text) == text, STALE
    assert "| `ctx-size` | `MLACLI_CTX_SIZE` | `LLAMA_ARG_CTX_SIZE` |" in text
    for names in (sources.LLAMA_ARGS, sources.LLAMA_NEGATIVES):
        assert all(name in text for name in names.values())  # each stands for a flag that exists


def test_page_names_everything() -> None:
    page = cli_page()
    for command in COMMANDS:
        assert f"\n## mlacli {command}\n" in page
    flags = ("`-ub, --ubatch-size N` | 512 |", "`-fa, --flash-attn [on\\|off\\|auto]` | on |")
    for flag in (*flags, "`-no-fa, --no-flash-attn`", "`-o, --output md\\|json", r"Read \\n, \\t"):
        assert flag in page


def test_every_exit_code_is_told() -> None:
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert EXIT_CODES.keys() == {0, 1} | codes


def test_every_variable_is_told() -> None:
    source = inspect.getsource(debug)
    read = {part.split('"')[1] for part in source.split("environ.get(")[1:]}
    assert read == debug.VARIABLES.keys() | {"_MLACLI_COMPLETE"}


def test_only_what_is_between_the_markers_is_replaced() -> None:
    start, end = MARKERS
    text = with_flags(f"before\n{start}\nstale words\n{end}\nafter\n")
    assert text.startswith(f"before\n{start}\n| flag | default | meaning |\n| --- | --- | --- |\n")
    assert text.endswith(f" |\n{end}\nafter\n") and "stale words" not in text
    assert with_flags(text) == text
    assert with_flags("no markers") == "no markers"
    with pytest.raises(SystemExit, match="without"):
        with_flags(f"{start} open")


def test_cells_are_escaped() -> None:
    assert table(("a", "b"), [("x|y", "z")]) == "| a | b |\n| --- | --- |\n| x\\|y | z |\n"
