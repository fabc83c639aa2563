"""What each target promises: its instructions, exact integer products, reproducible IR."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from codegen import jit
from codegen.dtypes import bf16, f16, f32, i8, i16, i32, u8
from codegen.formats import CACHE_FORMATS, F16, IQ4_NL, LATENT_CACHE_TYPES, Q5_0, Q8_0
from codegen.kernel import KernelSpec, dim, kernel, ptr
from codegen.kernels import cache, layers, router
from codegen.kernels.activations import quantize
from codegen.kernels.cache import Heads, Latent
from codegen.kernels.router import Routing
from codegen.targets import NAMES, Host, build, can_run, choose
from tests.kernels.harness import each_target, run_kernel, undefined_symbols

GOLDEN = Path(__file__).parent.parent / "golden"
INTEGER_DOT = {
    "avx512vnni-bf16": "vpdpbusd",
    "avx512vnni": "vpdpbusd",
    "avx512": "vpmaddubsw",
    "avx2vnni": "vpdpbusd",
    "avx2": "vpmaddubsw",
    "neon": "sdot",
}
PAIR_DOT = {
    "avx512vnni-bf16": "vpdpwssd",
    "avx512vnni": "vpdpwssd",
    "avx512": "vpmaddwd",
    "avx2vnni": "vpdpwssd",
    "avx2": "vpmaddwd",
    "neon": "smlal2|smull2",
    "generic": "pmaddwd",
}
SPECIAL = re.compile(r"\b(vpdp\w+|vpmadd\w+|vdpbf16ps|[su]dot|bfdot|vfmadd\w+|fmla|vcvtp[hs]2\w+)")


@kernel(y=ptr(i32), w=ptr(u8), x=ptr(i8), n=dim())
def dot(k: Any, y: Any, w: Any, x: Any, n: Any, *, signed: bool, lanes: int = 0) -> None:
    """y[i] = y[i] + the sum of four products, for n lanes."""
    lanes, kind = lanes or k.target.lanes, i8 if signed else u8
    with k.loop(0, n, lanes) as i:
        weights = w.cast(kind).at(4 * i).load(kind * (4 * lanes))
        codes = x.at(4 * i).load(i8 * (4 * lanes))
        y.at(i).store(k.dot_i8(y.at(i).load(i32 * lanes), weights, codes))


@kernel(y=ptr(i32), w=ptr(u8), x=ptr(i8), n=dim())
def dot_native(k: Any, y: Any, w: Any, x: Any, n: Any) -> None:
    """One register of the weights that this target prefers."""
    lanes, kind = k.target.lanes, k.target.weight_type
    weights = w.cast(kind).load(kind * (4 * lanes))
    y.store(k.dot_i8(y.load(i32 * lanes), weights, x.load(i8 * 4 * lanes)))


@kernel(y=ptr(i32), w=ptr(i16), x=ptr(i16), n=dim())
def dot_i16(k: Any, y: Any, w: Any, x: Any, n: Any) -> None:
    """y[i] = y[i] + the sum of two products."""
    lanes = k.target.lanes
    with k.loop(0, n, lanes) as i:
        pairs = [p.at(2 * i).load(i16 * (2 * lanes)) for p in (w, x)]
        y.at(i).store(k.target.dot_i16(k, y.at(i).load(i32 * lanes), *pairs))


@kernel(y=ptr(f32), w=ptr(bf16), x=ptr(bf16), n=dim())
def dot_bf16(k: Any, y: Any, w: Any, x: Any, n: Any) -> None:
    lanes = k.target.lanes
    pairs = bf16 * (2 * lanes)
    y.store(k.target.dot_bf16(k, y.load(f32 * lanes), w.load(pairs), x.load(pairs)))


@kernel(y=ptr(f32), x=ptr(f16))
def first_half(k: Any, y: Any, x: Any) -> None:
    """y[0] = x[0]."""
    y[0] = x[0].to(f32)


@kernel(y=ptr(f32), x=ptr(f32), n=dim())
def golden_sum(k: Any, y: Any, x: Any, n: Any, *, width: int) -> None:
    """y[r] = sum of row r of x; its IR is kept as text in tests/golden."""
    with k.tiles(n) as r:
        total = k.var(k.zeros(f32 * 4))
        with k.loop(0, width, 4) as i:
            total += x.at(r * width + i).load(f32 * 4)
        y[r] = total.get().sum()


def sample_specs() -> list[KernelSpec]:
    latent = Latent(n_lora=128, n_rope=32, eps=1e-6)
    heads = Heads(n_heads=3, n_nope=64, n_rope=32, n_v=64, n_lora=128)
    v3 = Routing(
        24, 3, "sigmoid", biased=True, n_group=4, n_group_used=2, group_score="top2",
        normalise=True, ser_min=1, ser_threshold=0.5,
    )  # fmt: skip
    return [
        dot(signed=True),
        dot_native(),
        dot_bf16(),
        dot_i16(),
        golden_sum(width=32),
        quantize(n=96),
        layers.embed(n=64, fmt=IQ4_NL),
        layers.rms_norm(n=96, eps=1e-6),
        layers.rope_q(n_heads=3, n_rope=32, x_stride=96, x_offset=64, y_stride=96, y_offset=64),
        layers.silu_mul(n=64),
        layers.add(n=64),
        layers.take_rows(n=64),
        *(cache.store_latent(latent=latent, fmt=CACHE_FORMATS[n]) for n in LATENT_CACHE_TYPES),
        cache.store_latent_both_ways(latent=latent, fmt=F16),
        cache.store_kv(heads=heads, fmt_k=Q5_0, fmt_v=IQ4_NL),
        cache.store_kv_transposed(heads=heads, fmt_k=Q8_0, fmt_v=F16),
        router.route(routing=Routing(8, 2, "softmax")),
        router.route(routing=v3),
        router.group_tokens(n_expert=24, n_used=3),
        router.gather_rows(pitch=192, n_used=3, n_expert=24),
        router.moe_sum(n=96, n_used=3),
    ]


# -- integer and bf16 products ------------------------------------------------------------------


def operands(signed: bool, lanes: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Every pair of extremes, then random numbers; as many lanes as wanted."""
    low, high = (-128, 127) if signed else (0, 255)
    smallest = -127 if signed else -128  # no quantiser makes the code -128
    ends = [(w, x) for w in (low, low + 1, -1, 0, 1, high) for x in (smallest, -1, 0, 1, 127)]
    pairs = np.array([p for p in ends if p[0] >= low], np.int64)
    same = np.repeat(pairs, 4, axis=0)  # four alike in a lane: the largest sums
    rng = np.random.default_rng(0)
    free = np.stack([rng.integers(low, high + 1, 4096), rng.integers(smallest, 128, 4096)], axis=1)
    both = np.resize(np.concatenate([same, free]), (4 * lanes, 2))
    return both[:, 0], both[:, 1]


@each_target
@pytest.mark.parametrize("signed", [True, False])
def test_integer_dot_is_exact(target: Any, signed: bool) -> None:
    w, x = operands(signed, 1024)
    y = np.arange(-512, 512, dtype=np.int32) * 1_000_000
    expected = y + (w * x).reshape(-1, 4).sum(axis=1)
    for lanes in sorted({4, 8, 16, target.lanes}):
        found = y.copy()
        args: dict[str, Any] = {
            "y": found,
            "w": w.astype(np.uint8),
            "x": x.astype(np.int8),
            "n": 1024,
        }
        run_kernel(dot(signed=signed, lanes=lanes), target, args)
        np.testing.assert_array_equal(found, expected)


@each_target
def test_pair_dot_is_exact(target: Any) -> None:
    ends = [-32767, -32766, -1, 0, 1, 32766, 32767]
    same = np.repeat([(a, b) for a in ends for b in ends], 2, axis=0)  # the largest sums
    free = np.random.default_rng(0).integers(-32767, 32768, (2048 - len(same), 2))
    w, x = np.concatenate([same, free]).T
    y = np.arange(-512, 512, dtype=np.int32)
    sums = (w * x).reshape(-1, 2).sum(axis=1)
    y[sums > 0] = -abs(y[sums > 0])  # the result stays an i32
    y[sums < 0] = abs(y[sums < 0])
    expected = y + sums
    args: dict[str, Any] = {"y": y, "w": w.astype(np.int16), "x": x.astype(np.int16), "n": 1024}
    run_kernel(dot_i16(), target, args)
    np.testing.assert_array_equal(y, expected)


@each_target
def test_bf16_dot(target: Any) -> None:
    rng = np.random.default_rng(0)
    n = target.lanes
    w, x = ((rng.normal(size=2 * n).astype(np.float32).view(np.uint32) >> 16) for _ in range(2))
    y = rng.normal(size=n).astype(np.float32)
    wide = [(v << 16).view(np.float32).astype(np.float64) for v in (w, x)]
    expected = y + (wide[0] * wide[1]).reshape(n, 2).sum(axis=1)
    args = {"y": y, "w": w.astype(np.uint16), "x": x.astype(np.uint16), "n": n}
    run_kernel(dot_bf16(), target, args)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


# -- instructions -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_integer_mnemonic(name: str) -> None:
    """Compiled for every target, also those that this machine cannot run."""
    text = jit.assembly(dot_native(), build(name))
    found = set(SPECIAL.findall(text))
    assert INTEGER_DOT[name] in found if name in INTEGER_DOT else not found


@pytest.mark.parametrize("name", NAMES)
def test_pair_mnemonic(name: str) -> None:
    assert re.search(PAIR_DOT[name], jit.assembly(dot_i16(), build(name)))


@pytest.mark.parametrize("name", NAMES)
def test_bf16_mnemonic(name: str) -> None:
    text = jit.assembly(dot_bf16(), build(name))
    assert ("vdpbf16ps" in text) == (name == "avx512vnni-bf16")


@pytest.mark.parametrize("name", NAMES)
def test_vectors_are_as_wide_as_promised(name: str) -> None:
    target = build(name)
    register = {16: "zmm", 8: "ymm", 4: "xmm"}[target.lanes]
    if name == "neon":
        register = r"v\d+\.4s"
    assert re.search(register, jit.assembly(quantize(n=96), target))


def test_choice_of_target() -> None:
    old = Host("x86_64-unknown-linux-gnu", "haswell", frozenset({"avx2", "fma", "f16c"}))
    assert choose(old).name == "avx2" and choose(old, "generic").name == "generic"
    with pytest.raises(ValueError, match="avx512vnni"):
        choose(old, "avx512vnni")
    with pytest.raises(ValueError, match="avx3"):
        choose(old, "avx3")
    arm = Host("aarch64-unknown-linux-gnu", "neoverse-n1", frozenset({"neon", "dotprod"}))
    assert choose(arm).name == "neon" and not can_run("avx2", arm)
    assert choose(Host("riscv64-unknown-linux-gnu", "", frozenset())).name == "generic"


def test_what_a_machine_hides_is_not_used() -> None:
    """A virtual machine may name a CPU model and hide some of its instructions."""
    found = frozenset({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"})
    found |= {"avx512vnni"}
    linux = "x86_64-unknown-linux-gnu"
    open_host = Host(linux, "sapphirerapids", found)
    assert "vmovsh" in jit.assembly(first_half(), choose(open_host))
    hidden = Host(linux, "sapphirerapids", found, frozenset({"avx512fp16"}))
    assert "vmovsh" not in jit.assembly(first_half(), choose(hidden))


# -- IR -----------------------------------------------------------------------------------------


def digests() -> str:
    """One digest per sample kernel and target."""
    lines = []
    for name in NAMES:
        for spec in sample_specs():
            digest = hashlib.sha256(spec.ir(build(name)).encode()).hexdigest()
            lines.append(f"{name} {spec.symbol} {digest}")
    return "\n".join(lines)


def test_ir_is_deterministic() -> None:
    """Twice here, and in processes that hash strings differently."""
    here = digests()
    assert digests() == here
    code = "from tests.kernels import test_targets; print(test_targets.digests())"
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == here


@pytest.mark.parametrize("name", NAMES)
def test_no_external_symbols(name: str) -> None:
    """In the IR and in the object code, also of targets that this machine cannot run."""
    target = build(name)
    machine = jit.target_machine(target)
    for spec in sample_specs():
        text = spec.ir(target)
        jit.check_symbols(text)
        payload = machine.emit_object(jit.optimise(text, machine))
        assert undefined_symbols(payload) <= jit.EXTERNAL_SYMBOLS, spec.symbol


def test_forbidden_symbol_is_refused() -> None:
    @kernel(y=ptr(f32))
    def bad(k: Any, y: Any) -> None:
        k.call_external("printf", y)

    with pytest.raises(ValueError, match="printf"):
        jit.Jit(build("generic", jit.host())).load(bad())


def test_golden_ir() -> None:
    """The whole text of one small kernel; `python -m tests.kernels.test_targets` renews it."""
    assert golden_sum(width=32).ir(build("generic")) == (GOLDEN / "sum_32.ll").read_text()


def test_no_fast_math_flags() -> None:
    for spec in sample_specs():
        flags = set(
            re.findall(r"\b(fast|reassoc|nnan|ninf|nsz|arcp|afn)\b", spec.ir(build("avx2")))
        )
        assert not flags, spec.symbol


def test_values_have_no_truth_and_types_do_not_mix() -> None:
    @kernel(y=ptr(f32), n=dim())
    def truth(k: Any, y: Any, n: Any) -> None:
        if n < 3:
            y[0] = 1.0

    @kernel(y=ptr(f32), n=dim())
    def mixed(k: Any, y: Any, n: Any) -> None:
        y[0] = y[0] * n

    @kernel(y=ptr(f32), n=dim())
    def unrolled(k: Any, y: Any, n: Any) -> None:
        for i in range(n):
            y[i] = 0.0

    for wrong, message in ((truth, "truth value"), (mixed, r"\.to\("), (unrolled, "run time")):
        with pytest.raises(TypeError, match=message):
            wrong().ir(build("generic"))


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / "sum_32.ll").write_text(golden_sum(width=32).ir(build("generic")))
