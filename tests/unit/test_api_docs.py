"""docs/api.md: its examples are run, and it names every keyword."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

from mlacli.keywords import LoadSettings

PAGE = Path(__file__).parent.parent.parent / "docs" / "api.md"


def test_the_examples_give_what_the_page_says() -> None:
    parser = doctest.DocTestParser()
    # Closing fences are no output.
    text = re.sub(r"^```.*$", "", PAGE.read_text(), flags=re.MULTILINE)
    test = parser.get_doctest(text, {}, "api.md", str(PAGE), 0)
    assert len(test.examples) > 25
    report: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert "".join(report) == ""


def test_every_setting_is_named() -> None:
    text = PAGE.read_text()
    assert [name for name in LoadSettings.__annotations__ if f"`{name}`" not in text] == []
