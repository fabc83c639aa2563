"""Text for the demo model: the Python standard library's sources, and what its docstrings say.

Both come from the Python that runs this; the
bundled model was trained with those of CPython 3.11.7.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Tests, tables, generated text, and what is not the standard library's own.
EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    | {"turtledemo", "pydoc_data", "encodings"}
)
SHORTEST_SOURCE = 400  # characters
# One file in 60 is held out; counted over all files, so that the choice is a fixed one.
HELD_OUT_EVERY, HELD_OUT_AT = 60, 17
SHORTEST_SUMMARY = 16  # characters; of documented classes and functions in sources
LONGEST_COMPILED_DOC = 1499  # characters
# Modules written in C: their docstrings are not in any source file.
COMPILED_MODULES = (
    *("builtins", "math", "time", "itertools", "_functools", "_collections", "sys", "os", "posix"),
    *("_json", "_struct", "zlib", "_socket", "_random", "_heapq", "_bisect", "array", "select"),
    *("fcntl", "signal", "gc", "marshal", "binascii", "cmath", "errno", "_operator"),
)
QUESTIONS = (
    *("What does {} do?", "What is {}?", "Explain {}."),
    *("Describe {}.", "How does {} work?", "Tell me about {}."),
)
SHORT_NAME_SHARE = 0.25  # of questions that name only `class.method` or `module.function`


@dataclass(frozen=True)
class Entry:
    """A documented name and the first paragraph of its docstring."""

    name: str
    summary: str


@dataclass(frozen=True)
class DemoText:
    """Whole source files, apart for training and for perplexity, and what can be asked about."""

    sources: tuple[str, ...]
    held_out: tuple[str, ...]
    entries: tuple[Entry, ...]


def standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def collect(library: Path) -> DemoText:
    """The text of all modules below `library` and of the compiled ones.

    Held-out files give entries too: only their code is kept out of training.
    """
    sources, held_out, entries = list[str](), list[str](), list[Entry]()
    for index, path in enumerate(source_files(library)):
        source = path.read_text(encoding="utf-8", errors="ignore")
        if len(source) < SHORTEST_SOURCE:
            continue
        held = index % HELD_OUT_EVERY == HELD_OUT_AT
        (held_out if held else sources).append(source)
        entries.extend(source_entries(source, module_name(path, library)))
    entries.extend(compiled_entries())
    return DemoText(tuple(sources), tuple(held_out), tuple(dict.fromkeys(entries)))


def source_files(library: Path) -> list[Path]:
    """The modules to read, in the order of their paths as text."""
    paths = (path.relative_to(library) for path in library.rglob("*.py"))
    kept = (path for path in paths if EXCLUDED_FOLDERS.isdisjoint(path.parts))
    return [library / path for path in sorted(kept, key=Path.as_posix)]


def module_name(path: Path, library: Path) -> str:
    """`json` for json/__init__.py, `json.decoder` for json/decoder.py."""
    return ".".join(path.relative_to(library).with_suffix("").parts).removesuffix(".__init__")


def source_entries(source: str, module: str) -> Iterator[Entry]:
    """What a module's source documents: itself, then its public classes and functions."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # Templates and the like: they are text to learn, but have no docstrings.
        return
    if doc := ast.get_docstring(tree):
        yield Entry(module, first_paragraph(doc))
    yield from _definitions(tree, module)


def _definitions(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[Entry]:
    for node in parent.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        summary = first_paragraph(ast.get_docstring(node) or "")
        if len(summary) >= SHORTEST_SUMMARY:
            yield Entry(name, summary)
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node, name)


def compiled_entries() -> Iterator[Entry]:
    """What the modules written in C document: callables and the methods of classes."""
    for module_name in COMPILED_MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # posix and fcntl exist on Unix only.
            continue
        for name, member in _public_members(module):
            doc = inspect.getdoc(member)
            if doc and callable(member) and len(doc) <= LONGEST_COMPILED_DOC:
                yield _compiled_entry(f"{module_name.lstrip('_')}.{name}", doc)
            if not inspect.isclass(member):
                continue
            for method_name, method in _public_members(member):
                doc = inspect.getdoc(method)
                if doc and callable(method):
                    yield _compiled_entry(f"{name}.{method_name}", doc)


def _compiled_entry(name: str, doc: str) -> Entry:
    return Entry(name, doc.split("\n\n")[0])  # getdoc has removed the common indent


def _public_members(owner: object) -> Iterator[tuple[str, object]]:
    return (pair for pair in inspect.getmembers(owner) if not pair[0].startswith("_"))


def first_paragraph(doc: str) -> str:
    return "\n".join(line.strip() for line in doc.strip().split("\n\n")[0].splitlines())


def question(name: str, chance: random.Random) -> str:
    """One of the ways to ask about `name`, which may be cut to its last two parts."""
    if chance.random() < SHORT_NAME_SHARE:
        name = ".".join(name.split(".")[-2:])
    return chance.choice(QUESTIONS).format(name)
