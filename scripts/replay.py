"""Does this change generate other code than main does?

Dumps the IR of every kernel that a set of small contexts uses, for several targets, into one text
per kernel; compares with the texts of another revision, made in a throwaway work tree.

    python scripts/replay.py               # against main
    python scripts/replay.py --base HEAD~3
Exit code 1 when any kernel's IR differs. A refactor says [ir] in its title and must show nothing.
"""

from __future__ import annotations

import argparse
import difflib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TARGETS = ("avx512vnni", "avx2", "neon", "generic")
PRESETS = ("tiny-v3", "tiny-odd")
SHOWN_LINES = 40


def dump(folder: Path) -> dict[str, str]:
    """Kernel name (target/symbol) -> IR text, of every kernel of the small contexts."""
    sys.path.insert(0, str(ROOT))
    from codegen.targets import build
    from mlacli.context import plan_context
    from mlacli.engine import load_model
    from mlacli.graph.ops import lower_graph
    from mlacli.settings import fitted
    from scripts.make_model import make_model

    found: dict[str, str] = {}
    for preset in PRESETS:
        path = folder / f"{preset}.gguf"
        make_model(path, preset=preset, type="Q8_0", sparse=True)
        model = load_model(path)
        for name in TARGETS:
            target = build(name)
            for mla in (0, 1, 2):
                settings = fitted(model=path, mla=mla, n_threads=2)
                plan = plan_context(model.config, model.weights, settings, target, n_ctx=512)
                for planned in plan.graphs.values():
                    for launch in lower_graph(planned.lower, planned.graph):
                        key = f"{name}/{launch.spec.symbol}"
                        if key not in found:
                            found[key] = launch.spec.ir(target)
    return found


def dump_revision(base: str, folder: Path) -> dict[str, str]:
    """The same for another revision, by its own copy of this script."""
    tree = folder / "base"
    subprocess.run(["git", "worktree", "add", "--detach", str(tree), base], cwd=ROOT, check=True)
    try:
        command = [sys.executable, str(tree / "scripts" / "replay.py"), "--dump"]
        made = subprocess.run(command, check=True, capture_output=True, text=True)
        result: dict[str, str] = json.loads(made.stdout)
        return result
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def show_changes(old: dict[str, str], new: dict[str, str]) -> int:
    """Print what changed; the number of kernels that did."""
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    for name in changed:
        before, after = old.get(name, ""), new.get(name, "")
        diff = list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=1))
        print(f"{name}: {'new' if not before else 'gone' if not after else 'changed'}")
        if before and after:
            print("\n".join(diff[:SHOWN_LINES]))
    print(f"{len(changed)} of {len(new)} kernels differ")
    return len(changed)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="main", help="the revision to compare with")
    parser.add_argument("--dump", action="store_true", help="print this tree's IR as JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.dump:
            json.dump(dump(folder), sys.stdout)
            return 0
        return int(show_changes(dump_revision(given.base, folder), dump(folder)) > 0)


if __name__ == "__main__":
    sys.exit(main())
