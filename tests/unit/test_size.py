"""scripts/size.py counts code, not prose."""

from __future__ import annotations

from scripts.size import Size, measure


def test_only_code_counts() -> None:
    lines = [
        '"""Module',
        'text."""',
        "",
        "# comment",
        "x = (",
        "    1",
        ")",
        "def f():",
        '    """Doc."""',
        "    return x",
        "",
    ]
    source = "\n".join(lines)
    assert measure(source) == Size(lines=5, tokens=12)
    assert measure("") == Size(0, 0)
