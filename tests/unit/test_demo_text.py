"""The demo model's training text and tokenizer: scripts/demo_text.py and demo_tokenizer.py."""

from __future__ import annotations

import random
from pathlib import Path

import gguf
import pytest

from mlacli.text.tokenizer import Tokenizer, tokenizer_data
from scripts.demo_text import (
    HELD_OUT_AT,
    HELD_OUT_EVERY,
    QUESTIONS,
    Entry,
    collect,
    compiled_entries,
    question,
    source_entries,
)
from scripts.demo_tokenizer import CHAT_TEMPLATE, PRE, SPECIAL, train_tokenizer, write_vocabulary

SOURCE = '''"""The module.

More of it."""

class Public:
    """A class that
       spans lines."""
    def method(self):
        """What the method does."""
    def _hidden(self):
        """Private, so nobody asks."""

async def function():
    """What the function does."""

def short():
    """Too short."""

class _Hidden:
    def method(self):
        """Inside something private."""
'''
LONG = "# filler\n" * 60


def test_public_docstrings_become_entries() -> None:
    assert list(source_entries(SOURCE, "pack.mod")) == [
        Entry("pack.mod", "The module."),
        Entry("pack.mod.Public", "A class that\nspans lines."),
        Entry("pack.mod.Public.method", "What the method does."),
        Entry("pack.mod.function", "What the function does."),
    ]
    assert list(source_entries("print 'a template'", "pack.mod")) == []


def test_compiled_modules_are_asked_about_too() -> None:
    entries = {entry.name: entry.summary for entry in compiled_entries()}
    assert entries["math.sqrt"] == "Return the square root of x."
    assert "heapq.heappush" in entries and "dict.items" in entries
    assert not any(part.startswith("_") for name in entries for part in name.split("."))


def test_files_are_left_out_held_out_or_learned(tmp_path: Path) -> None:
    names = [f"m{index:03}.py" for index in range(2 * HELD_OUT_EVERY)]
    for name in names:
        (tmp_path / name).write_text(f"'''Module {name}.'''\n{LONG}", encoding="utf-8")
    (tmp_path / names[1]).write_text("'''Short.'''\n", encoding="utf-8")
    twice = "def same():\n    'Defined twice, as for two systems.'\n" * 2
    (tmp_path / names[2]).write_text(twice + LONG, encoding="utf-8")
    package = tmp_path / "pack"
    for folder in (package, package / "test", tmp_path / "site-packages"):
        folder.mkdir()
        source = f"'''In {folder.name}.'''\n{LONG}"
        (folder / "__init__.py").write_text(source, encoding="utf-8")
    text = collect(tmp_path)
    held = [HELD_OUT_AT, HELD_OUT_EVERY + HELD_OUT_AT]
    assert [source.splitlines()[0] for source in text.held_out] == [
        f"'''Module {names[index]}.'''" for index in held
    ]
    # One is too short, two are held out, and the package counts.
    assert len(text.sources) == len(names) - 3 + 1
    assert text.sources[-1].startswith("'''In pack.'''")
    assert Entry("pack", "In pack.") in text.entries
    assert Entry(names[held[0]][:-3], f"Module {names[held[0]]}.") in text.entries
    assert sum(entry.name == "m002.same" for entry in text.entries) == 1


def test_questions_name_the_whole_or_the_last_two_parts() -> None:
    chance = random.Random(1)
    asked = {question("a.b.c", chance) for _ in range(500)}
    assert asked == {form.format(name) for form in QUESTIONS for name in ("a.b.c", "b.c")}
    assert {question("zlib", chance) for _ in range(99)} == {q.format("zlib") for q in QUESTIONS}


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x ** 2\n",
        "3.14159 in 2024",
        "naïve 日本語かな 😀",
        "\t\n \r\n  a",
        "'''",
    ],
)
def test_vocabulary_file_means_what_the_trained_tokenizer_does(tmp_path: Path, text: str) -> None:
    trained = train_tokenizer([SOURCE, LONG], 300)
    write_vocabulary(tmp_path / "vocabulary.gguf", trained)
    fields = gguf.GGUFReader(tmp_path / "vocabulary.gguf").fields
    data = tokenizer_data({name: field.contents() for name, field in fields.items()})
    assert len(data.tokens) == 300 == trained.get_vocab_size()
    assert data.tokens[-len(SPECIAL) :] == list(SPECIAL)
    assert data.merges
    ours = Tokenizer(data)
    assert ours.encode(text, special=True) == trained.encode(text).ids
    spelled = f"{SPECIAL[0]}{text}{SPECIAL[1]}"
    assert ours.encode(spelled, special=True) == trained.encode(spelled).ids
    assert (ours.bos, ours.eos) == (295, 296)


def test_bundled_model_has_this_tokenizer() -> None:
    bundled = Path(__file__).parents[2] / "mlacli" / "data" / "demo.gguf"
    fields = {n: field.contents() for n, field in gguf.GGUFReader(bundled).fields.items()}
    assert fields["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert fields["tokenizer.ggml.pre"] == PRE
    assert fields["tokenizer.ggml.tokens"][-len(SPECIAL) :] == list(SPECIAL)
