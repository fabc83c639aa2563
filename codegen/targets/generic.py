"""Any other CPU: 128-bit vectors that LLVM maps to what there is, no special instructions."""

from __future__ import annotations

from codegen.targets.base import Target


def generic(triple: str, cpu: str = "", features: str = "") -> Target:
    return Target("generic", triple, cpu, features, lanes=4, registers=16, fuses=False)
