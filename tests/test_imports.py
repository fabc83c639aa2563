"""Who may import whom, and what only one place may do. Reads the source; imports nothing of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Each level may import itself and the levels below it; the first matching name counts.
LEVELS = (
    ("mlacli.__main__", "mlacli.cli"),
    ("mlacli.chat", "mlacli.doctor", "mlacli.api", "mlacli.api_call", "mlacli.api_stream"),
    ("mlacli.inside",),
    (
        *("mlacli.bench", "mlacli.bench_table", "mlacli.bench_records", "mlacli.bench_pivot"),
        *("mlacli.bench_db", "mlacli.bench_runner", "mlacli.session", "mlacli.sweep"),
        *("mlacli.tune", "mlacli.tune_table"),
    ),
    ("mlacli.generation", "mlacli.session_file", "mlacli.signals", "mlacli.answer", "mlacli.reply"),
    (
        *(
            "mlacli.engine",
            "mlacli.loading",
            "mlacli.context",
            "mlacli.machine",
            "mlacli.calibrate",
        ),
        *("mlacli.roofline", "mlacli.fit"),
        *("mlacli.work", "mlacli.profile", "mlacli.profile_table", "mlacli.results"),
        "mlacli.plot_results",
        *("mlacli.report", "mlacli.report_format", "mlacli.report_work", "mlacli.report_grid"),
        *("mlacli.report_picture", "mlacli.fit_flags", "mlacli.info", "mlacli.info_format"),
        *("mlacli.checks_cpu", "mlacli.checks_memory"),
    ),
    ("mlacli.model",),
    ("mlacli.cache",),
    ("mlacli.graph",),
    (
        *("mlacli.gguf", "mlacli.text", "mlacli.settings", "mlacli.limits", "mlacli.cpu_count"),
        *("mlacli.debug", "mlacli.errors", "mlacli.memory", "mlacli.free_memory"),
        *("mlacli.sampling_settings", "mlacli.files", "mlacli.pictures", "mlacli.hub"),
        *("mlacli.numa", "mlacli.placement", "mlacli.findings", "mlacli.progress"),
        *("mlacli.units", "mlacli.config_file", "mlacli.suggest", "mlacli.overrides"),
        *("mlacli.keywords", "mlacli.prompts"),
    ),
    ("codegen",),
)
LLVMLITE = {"codegen/builder.py", "codegen/jit.py"}
# Children are processes of their own: stdout is the pipe that takes their results back.
CHILDREN = ("mlacli/text/template_child.py", "codegen/compile_child.py")
PRINTS = ("mlacli/cli/", "mlacli/__main__.py", *CHILDREN)
UNSAFE_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
# jinja2.Environment runs whatever a model file's template says.
UNSAFE_NAMES = {"jinja2.Environment", "jinja2.Template", "jinja2.sandbox.SandboxedEnvironment"}

FILES = sorted(path for folder in ("mlacli", "codegen") for path in (ROOT / folder).rglob("*.py"))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _only_for_types(path: Path) -> set[ast.AST]:
    """The nodes under `if TYPE_CHECKING:`, which never run."""
    blocks = (node for node in ast.walk(_tree(path)) if isinstance(node, ast.If))
    tests = (block for block in blocks if ast.unparse(block.test) == "TYPE_CHECKING")
    return {inner for block in tests for node in block.body for inner in ast.walk(node)}


def _imports(path: Path, running: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported, also inside functions.

    With `running`, without what is imported for type checkers only.
    """
    package = _module(path) if path.name == "__init__.py" else _module(path).rpartition(".")[0]
    for node in set(ast.walk(_tree(path))) - (_only_for_types(path) if running else set()):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def _calls(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything called or read as an attribute."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.lineno, node.func.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node.lineno, f"{node.value.id}.{node.attr}"


def _level(module: str) -> int | None:
    for level, names in enumerate(LEVELS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return level
    return None


def _problems(path: Path) -> list[str]:
    """Every rule that a file breaks."""
    own = _level(_module(path))
    found = []
    for line, name in _imports(path):
        level = _level(name)
        if level is not None and own is not None and level < own:
            found.append(f"{line}: imports {name}, which stands above it")
        top = name.split(".")[0]
        if name in ("os.environ", "os.getenv", "os.environb") and path.name != "debug.py":
            found.append(f"{line}: reads the environment")
    for line, name in _imports(path, running=True):
        top = name.split(".")[0]
        if top == "llvmlite" and _name(path) not in LLVMLITE:
            found.append(f"{line}: imports llvmlite")
        if top in UNSAFE_MODULES or name in UNSAFE_NAMES:
            found.append(f"{line}: imports {name}")
    for line, name in _calls(path):
        if name in ("os.environ", "os.getenv", "os.environb") and path.name != "debug.py":
            found.append(f"{line}: reads the environment")
        if name in UNSAFE_CALLS or name in UNSAFE_NAMES:
            found.append(f"{line}: uses {name}")
        prints = name in ("print", "sys.stdout", "sys.stderr")
        if prints and not _name(path).startswith(PRINTS):
            found.append(f"{line}: prints ({name})")
    return found


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_rules(path: Path) -> None:
    assert _problems(path) == []


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_every_module_has_a_level(path: Path) -> None:
    assert _module(path) in ("mlacli", "mlacli.data") or _level(_module(path)) is not None


def _dependencies() -> dict[str, set[str]]:
    modules = {_module(path): path for path in FILES}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        named = (name for _, name in _imports(path, running=True))
        wanted = {n if n in modules else n.rpartition(".")[0] for n in named}
        graph[module] = (wanted & modules.keys()) - {module}
    return graph


def _cyclic(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is left after taking away, again and again, what needs or is needed by nothing left."""
    while True:
        needed = set().union(*graph.values())
        kept = {module for module, needs in graph.items() if needs and module in needed}
        if len(kept) == len(graph):
            return graph
        graph = {module: graph[module] & kept for module in kept}


def test_no_cycles() -> None:
    assert _cyclic(_dependencies()) == {}


def test_cycles_are_found() -> None:
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": {"b", "d"}, "d": set[str]()}
    assert _cyclic(graph) == {"b": {"c"}, "c": {"b"}}
    assert _cyclic({"a": {"b"}, "b": set()}) == {}


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("codegen/x.py", "from mlacli.errors import MlaError", "stands above"),
        ("mlacli/graph/x.py", "def f():\n    import mlacli.engine", "stands above"),
        ("codegen/x.py", "if TYPE_CHECKING:\n    import mlacli.errors", "stands above"),
        ("mlacli/gguf/x.py", "from ..model import config", "stands above"),
        ("mlacli/engine.py", "import llvmlite.binding", "llvmlite"),
        ("mlacli/engine.py", "import os\nx = os.environ['A']", "environment"),
        ("codegen/x.py", "from os import getenv", "environment"),
        ("mlacli/report.py", "print(1)", "prints"),
        ("mlacli/session.py", "import sys\nsys.stdout.write('')", "prints"),
        ("mlacli/text/x.py", "import jinja2\njinja2.Environment()", "jinja2"),
        ("mlacli/text/x.py", "from jinja2 import Environment", "jinja2"),
        ("mlacli/text/x.py", "import pickle", "pickle"),
        ("codegen/x.py", "exec('1')", "exec"),
    ],
)
def test_the_rules_see_what_they_forbid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str, complaint: str
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert complaint in "".join(_problems(path))
