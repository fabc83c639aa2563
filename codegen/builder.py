"""The kernel builder `k`: traces kernel code, by running it, straight into LLVM IR.

This file and jit.py are the only ones that import llvmlite. What llvmlite lacks is hidden here:
opaque pointers everywhere, vector intrinsics declared by hand, no bfloat (kept as 16-bit integers).

Machine contract of a kernel: `void kernel(ptr args, ptr job, i64 thread)`. `args` is a table of
8-byte slots, one per parameter, then the kernel's tile counters; `job` is laid out in job.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from codegen import job as job_layout
from codegen.dtypes import DType, b1, bf16, f16, f32, i32, i64, u16, u32
from codegen.values import Pointer, Value, Var

if TYPE_CHECKING:
    from codegen.targets.base import Target

PTR = ir.PointerType()
_INT = {
    "add": "add",
    "sub": "sub",
    "mul": "mul",
    "and": "and_",
    "or": "or_",
    "xor": "xor",
    "shl": "shl",
}
# contract only: it lets a * b + c fuse, and keeps NaN, infinities and the order of sums as written.
CONTRACT = ("contract",)


def ir_type(t: DType) -> ir.Type:
    """The LLVM type: bfloat16 is its 16 bits, signedness is dropped."""
    if t.kind == "f":
        scalar: ir.Type = {16: ir.HalfType, 32: ir.FloatType, 64: ir.DoubleType}[t.bits]()
    else:
        scalar = ir.IntType(t.bits)
    return ir.VectorType(scalar, t.lanes) if t.lanes > 1 else scalar


def mangled(t: DType) -> str:
    """The type's name inside an intrinsic's name: v16f32."""
    scalar = ("f" if t.kind == "f" else "i") + str(t.bits)
    return f"v{t.lanes}{scalar}" if t.lanes > 1 else scalar


class _BFloat(ir.Type):  # type: ignore[misc]  # llvmlite has no types
    """<n x bfloat>, only ever reached by a bitcast."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes

    def _to_string(self) -> str:
        return f"<{self.lanes} x bfloat>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat) and other.lanes == self.lanes

    def __hash__(self) -> int:
        return hash(self.lanes)


class Kernel:
    """One function under construction; see codegen/values.py for the objects it hands out."""

    def __init__(self, name: str, target: Target, n_slots: int) -> None:
        self.target, self.name = target, name
        self.module = ir.Module(name)
        self.module.triple = target.triple
        self.n_slots, self.n_counters = n_slots, 0
        function = self._function(name, [PTR, PTR, ir.IntType(64)])
        args, job, thread = function.args
        self.args = Pointer(self, args, i64)
        self.job = Pointer(self, job, i64)
        self.thread = Value(self, thread, i64)
        self.n_threads = self.job[job_layout.N_THREADS]

    def _function(self, name: str, params: Sequence[ir.Type], result: ir.Type | None = None) -> Any:
        """Start a function and aim the builder at its first block."""
        function = ir.Function(self.module, ir.FunctionType(result or ir.VoidType(), params), name)
        function.attributes.add("nounwind")
        self.b = ir.IRBuilder(function.append_basic_block("entry"))
        return function

    def finish(self) -> str:
        """The module's text; deterministic, so it can be hashed and diffed."""
        self.b.ret_void()
        return str(self.module)

    # -- constants, registers, memory -------------------------------------------------------

    def const(self, x: Any, t: DType) -> Value:
        """`x` as a value of type `t`: numbers become constants, scalars of the type are splat."""
        if isinstance(x, Var):
            x = x.get()
        if isinstance(x, Value):
            if x.type == t:
                return x
            if x.type.lanes == 1 and x.type == t.scalar:
                return self.splat(x, t.lanes)
            raise TypeError(f"{self.name}: expected {t}, got {x.type}; write .to(...)")
        number = float(x) if t.kind == "f" else int(x)
        value = [number] * t.lanes if t.lanes > 1 else number
        return Value(self, ir.Constant(ir_type(t), value), t)

    def vector(self, values: Sequence[int | float], t: DType) -> Value:
        """A constant vector of scalar type `t`."""
        return Value(self, ir.Constant(ir_type(t * len(values)), list(values)), t * len(values))

    def zeros(self, t: DType) -> Value:
        return self.const(0, t)

    def undefined(self, t: DType) -> Value:
        return Value(self, ir.Constant(ir_type(t), ir.Undefined), t)

    def splat(self, value: Value, lanes: int) -> Value:
        if lanes == 1:
            return value
        t = value.type * lanes
        one = self.b.insert_element(
            ir.Constant(ir_type(t), ir.Undefined), value.ir, ir.Constant(ir.IntType(32), 0)
        )
        zero_mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
        return Value(self, self.b.shuffle_vector(one, one, zero_mask), t)

    def var(self, init: Value) -> Var:
        return Var(self, init)

    def alloca(self, t: DType, count: int = 1) -> Any:
        with self.b.goto_entry_block():
            slot = self.b.alloca(ir_type(t), count)
            slot.type = PTR  # llvmlite still makes typed pointers here
            slot.align = max(t.nbytes, 8)
            return slot

    def stack(self, t: DType, count: int) -> Pointer:
        """A small per-thread array on the stack."""
        return Pointer(self, self.alloca(t, count), t)

    def load_slot(self, slot: Any, t: DType) -> Value:
        return Value(self, self.b.load(slot, typ=ir_type(t)), t)

    def store_slot(self, slot: Any, value: Value) -> None:
        self.b.store(value.ir, slot)

    def offset(self, p: Pointer, index: Any, elem: DType) -> Pointer:
        step = ir_type(p.elem.scalar if p.elem.kind != "b" else p.elem)
        where = self.b.gep(p.ir, [self.const(index, i64).ir], inbounds=True, source_etype=step)
        return Pointer(self, where, elem)

    def load(self, p: Pointer, t: DType) -> Value:
        return Value(self, self.b.load(p.ir, typ=ir_type(t), align=max(1, t.bits // 8)), t)

    def load_pointer(self, p: Pointer, elem: DType) -> Pointer:
        """Load an address stored in memory."""
        return Pointer(self, self.b.load(p.ir, typ=PTR, align=8), elem)

    def store(self, p: Pointer, value: Any) -> None:
        v = value if isinstance(value, Value) else self.const(value, p.elem)
        if v.type.scalar != p.elem:
            raise TypeError(f"{self.name}: store of {v.type} through a pointer to {p.elem}")
        self.b.store(v.ir, p.ir, align=max(1, v.type.bits // 8))

    def load_part(self, p: Pointer, t: DType, count: Value) -> Value:
        """The first `count` lanes from memory, the others zero; nothing past them is touched."""
        return self._masked("load", t, count, [p.ir], [self.zeros(t).ir])

    def store_part(self, p: Pointer, value: Value, count: Value) -> None:
        """Store only the first `count` lanes."""
        self._masked("store", value.type, count, [value.ir, p.ir], [])

    def _masked(self, op: str, t: DType, count: Value, head: list[Any], tail: list[Any]) -> Value:
        steps = self.vector(list(range(t.lanes)), i32)
        mask = steps < self.const(count.to(i32), i32 * t.lanes)
        # From LLVM 22 the alignment is a parameter attribute; its default, 1, is what is wanted.
        parts = [*head, mask.ir, *tail]
        result = ir_type(t) if op == "load" else ir.VoidType()
        function = self._declare(
            f"llvm.masked.{op}.{mangled(t)}.p0", result, [x.type for x in parts]
        )
        return Value(self, self.b.call(function, parts), t)

    def prefetch(self, p: Pointer, locality: int = 3) -> None:
        """Ask for a cache line ahead of its use; `locality` 0 streams past the caches."""
        words = [ir.Constant(ir.IntType(32), n) for n in (0, locality, 1)]
        function = self._declare("llvm.prefetch.p0", ir.VoidType(), [PTR, *(w.type for w in words)])
        self.b.call(function, [p.ir, *words])

    # -- arithmetic ---------------------------------------------------------------------------

    def _pair(self, a: Any, b: Any, what: str) -> tuple[Value, Value]:
        a = a.get() if isinstance(a, Var) else a
        b = b.get() if isinstance(b, Var) else b
        if not isinstance(a, Value):
            a = self.const(a, b.type)
        elif not isinstance(b, Value):
            b = self.const(b, a.type)
        elif a.type.lanes < b.type.lanes and a.type.lanes == 1:
            a = self.const(a, a.type * b.type.lanes)
        elif b.type.lanes == 1 and a.type.lanes > 1:
            b = self.const(b, b.type * a.type.lanes)
        if a.type != b.type:
            raise TypeError(f"{self.name}: {what} of {a.type} and {b.type}; write .to(...)")
        return a, b

    def arith(self, op: str, left: Any, right: Any) -> Value:
        a, c = self._pair(left, right, op)
        t, b = a.type, self.b
        if t.kind == "f":
            return Value(self, getattr(b, "f" + op)(a.ir, c.ir, flags=CONTRACT), t)
        if t.kind == "g":
            raise TypeError(f"{self.name}: no bf16 arithmetic; convert to f32 first")
        if op == "shr":
            return Value(self, (b.ashr if t.kind == "i" else b.lshr)(a.ir, c.ir), t)
        if op in ("div", "idiv", "rem"):
            signed = "s" if t.kind == "i" else "u"
            return Value(
                self, getattr(b, signed + ("rem" if op == "rem" else "div"))(a.ir, c.ir), t
            )
        return Value(self, getattr(b, _INT[op])(a.ir, c.ir), t)

    def product(self, left: Any, right: Any) -> Value:
        """left * right rounded on its own: never fused with an add, so equal on every target."""
        a, c = self._pair(left, right, "product")
        return Value(self, self.b.fmul(a.ir, c.ir), a.type)

    def compare(self, op: str, left: Any, right: Any) -> Value:
        a, c = self._pair(left, right, op)
        if a.type.kind == "f":
            made = self.b.fcmp_ordered(op, a.ir, c.ir)
        else:
            made = (self.b.icmp_signed if a.type.kind == "i" else self.b.icmp_unsigned)(
                op, a.ir, c.ir
            )
        return Value(self, made, b1 * a.type.lanes)

    def select(self, condition: Value, yes: Any, no: Any) -> Value:
        a, c = self._pair(yes, no, "select")
        if condition.type.lanes == 1 and a.type.lanes > 1:
            condition = self.splat(condition, a.type.lanes)
        return Value(self, self.b.select(condition.ir, a.ir, c.ir), a.type)

    def select_pointer(self, condition: Value, yes: Pointer, no: Pointer) -> Pointer:
        """One of two addresses."""
        return Pointer(self, self.b.select(condition.ir, yes.ir, no.ir), yes.elem)

    def maximum(self, a: Any, b: Any) -> Value:
        """The larger; `b` when either is NaN."""
        a, b = self._pair(a, b, "maximum")
        return self.select(a > b, a, b)

    def minimum(self, a: Any, b: Any) -> Value:
        a, b = self._pair(a, b, "minimum")
        return self.select(a < b, a, b)

    def absolute(self, a: Value) -> Value:
        if a.type.kind == "f":
            return self.intrinsic(f"llvm.fabs.{mangled(a.type)}", a.type, a)
        return self.maximum(a, -a)

    def fused(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once. Only where the target `fuses`."""
        return self.intrinsic(f"llvm.fma.{mangled(a.type)}", a.type, a, b, c)

    def sqrt(self, a: Value) -> Value:
        return self.intrinsic(f"llvm.sqrt.{mangled(a.type)}", a.type, a)

    def dot_i8(self, acc: Value, weights: Value, codes: Value) -> Value:
        """i32 lane j += sum over its four bytes of weights * codes (codes signed, see Target)."""
        return self.target.dot_i8(self, acc, weights, codes)

    def reduce(self, op: str, v: Value) -> Value:
        while v.type.lanes > 1:
            half = v.type.lanes // 2
            low, high = v.lanes(0, half), v.lanes(half, 2 * half)
            v = low + high if op == "add" else self.maximum(low, high)
        return v

    # -- types, lanes -----------------------------------------------------------------------

    def convert(self, v: Value, t: DType) -> Value:
        t = t if t.lanes > 1 else t * v.type.lanes
        a, b = v.type, self.b
        if a == t:
            return v
        if bf16 in (a.scalar, t.scalar):
            return self._convert_bf16(v, t)
        if a.scalar == f16 and t.scalar == f32:
            return self.target.f16_to_f32(self, v)
        if a.scalar == f32 and t.scalar == f16:
            return self.target.f32_to_f16(self, v)
        if a.kind == "f" and t.kind == "f":
            make = b.fpext if t.bits > a.bits else b.fptrunc
        elif t.kind == "f":
            make = b.sitofp if a.kind == "i" else b.uitofp
        elif a.kind == "f":
            make = b.fptosi if t.kind == "i" else b.fptoui
        elif t.bits == a.bits:
            return Value(self, v.ir, t)
        elif t.bits < a.bits:
            make = b.trunc
        else:
            make = b.sext if a.kind == "i" else b.zext
        return Value(self, make(v.ir, ir_type(t)), t)

    def _convert_bf16(self, v: Value, t: DType) -> Value:
        """bf16 <-> f32 by bits: the upper half of an f32, rounded to nearest even."""
        if v.type.scalar == bf16:
            wide = Value(self, v.ir, u16 * v.type.lanes).to(u32) << 16
            return wide.bits_as(f32 * v.type.lanes).to(t)
        bits = v.to(f32).bits_as(u32 * v.type.lanes)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return Value(self, self.select(is_nan, quiet, rounded).to(u16).ir, t)

    def float_cast(self, v: Value, t: DType) -> Value:
        """LLVM's own fpext or fptrunc, for targets that have it as an instruction."""
        t = t * v.type.lanes
        make = self.b.fpext if t.bits > v.type.bits else self.b.fptrunc
        return Value(self, make(v.ir, ir_type(t)), t)

    def bitcast(self, v: Value, t: DType) -> Value:
        return Value(self, self.b.bitcast(v.ir, ir_type(t)), t)

    def shuffle(self, a: Value, b: Value, mask: Sequence[int]) -> Value:
        """Lanes picked from a (0..n-1) and b (n..2n-1)."""
        if len(mask) == 1:
            return self.extract(a, mask[0])
        m = ir.Constant(ir.VectorType(ir.IntType(32), len(mask)), list(mask))
        return Value(self, self.b.shuffle_vector(a.ir, b.ir, m), a.type.scalar * len(mask))

    def concat(self, a: Value, b: Value) -> Value:
        return self.shuffle(a, b, list(range(2 * a.type.lanes)))

    def extract(self, v: Value, index: int) -> Value:
        where = ir.Constant(ir.IntType(32), index)
        return Value(self, self.b.extract_element(v.ir, where), v.type.scalar)

    def insert(self, v: Value, x: Value, index: int) -> Value:
        where = ir.Constant(ir.IntType(32), index)
        return Value(self, self.b.insert_element(v.ir, x.ir, where), v.type)

    # -- control flow -------------------------------------------------------------------------

    @contextmanager
    def loop(self, start: Any, stop: Any, step: Any = 1) -> Iterator[Value]:
        """A run-time loop `for i in range(start, stop, step)`, i64."""
        b, stop, step = self.b, self.const(stop, i64), self.const(step, i64)
        head, body, done = (b.append_basic_block(n) for n in ("head", "body", "done"))
        first, entry = self.const(start, i64).ir, b.block
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(ir.IntType(64))
        i.add_incoming(first, entry)
        b.cbranch(b.icmp_signed("<", i, stop.ir), body, done)
        b.position_at_end(body)
        yield Value(self, i, i64)
        i.add_incoming(b.add(i, step.ir), b.block)
        b.branch(head)
        b.position_at_end(done)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.b.if_then(condition.ir):
            yield

    @contextmanager
    def either(self, condition: Value) -> Iterator[tuple[Any, Any]]:
        """`with k.either(c) as (yes, no): with yes: ... with no: ...`."""
        with self.b.if_else(condition.ir) as arms:
            yield arms

    @contextmanager
    def repeat_while(self) -> Iterator[Any]:
        """Loop until the yielded function is called with a false condition (at the body's end)."""
        b = self.b
        body, done = b.append_basic_block("again"), b.append_basic_block("enough")
        b.branch(body)
        b.position_at_end(body)
        state: list[Value] = []
        yield state.append
        b.cbranch(state[0].ir, body, done)
        b.position_at_end(done)

    # -- threads ----------------------------------------------------------------------------

    def my_share(self, n: Any) -> tuple[Value, Value]:
        """This thread's contiguous part of range(n)."""
        n = self.const(n, i64)
        return (n * self.thread) // self.n_threads, (n * (self.thread + 1)) // self.n_threads

    def counter(self, count: int = 1) -> Pointer:
        """Shared tile counters, one after another, on cache lines of their own; the program zeroes
        all counters before each step."""
        address = self.load_pointer(self.args.at(self.n_slots), i64)
        line = self.n_counters
        self.n_counters += -(-count // job_layout.LINE_WORDS)
        return address.at(line * job_layout.LINE_WORDS)

    @contextmanager
    def tiles(self, n: Any, counter: Pointer | None = None) -> Iterator[Value]:
        """Tiles of range(n), handed out dynamically; a set cancel word ends the loop early."""
        counter, n, b = counter or self.counter(), self.const(n, i64), self.b
        head, body, done = (b.append_basic_block(x) for x in ("tile", "tile.body", "tile.done"))
        b.branch(head)
        b.position_at_end(head)
        tile = self.fetch_add(counter, 1)
        b.cbranch(((tile < n) & self.cancelled().eq(0)).ir, body, done)
        b.position_at_end(body)
        yield tile
        b.branch(head)
        b.position_at_end(done)

    def cancelled(self) -> Value:
        """The cancel word: not zero when the step should end as soon as it can."""
        return self.load_atomic(self.load_pointer(self.job.at(job_layout.CANCEL), i64))

    def fetch_add(self, p: Pointer, n: Any) -> Value:
        made = self.b.atomic_rmw("add", p.ir, self.const(n, i64).ir, "seq_cst")
        return Value(self, made, i64)

    def load_atomic(self, p: Pointer) -> Value:
        made = self.b.load_atomic(p.ir, "seq_cst", align=8, typ=ir.IntType(64))
        return Value(self, made, i64)

    def store_atomic(self, p: Pointer, value: Any) -> None:
        # An exchange: llvmlite's atomic store does not know opaque pointers.
        self.b.atomic_rmw("xchg", p.ir, self.const(value, i64).ir, "seq_cst")

    def barrier(self) -> None:
        """Wait until every thread of the step is here."""
        with self.when(self.n_threads > 1):
            job_layout.emit_barrier(self)

    # -- calls --------------------------------------------------------------------------------

    def _declare(self, name: str, result: Any, params: Sequence[Any], varargs: bool = False) -> Any:
        known = self.module.globals.get(name)
        if known is None:
            known = ir.Function(self.module, ir.FunctionType(result, params, varargs), name)
        return known

    def intrinsic(self, name: str, result: DType, *values: Value) -> Value:
        function = self._declare(name, ir_type(result), [v.ir.type for v in values])
        flags = CONTRACT if result.kind == "f" else ()
        return Value(self, self.b.call(function, [v.ir for v in values], fastmath=flags), result)

    def opaque(self, v: Value) -> Value:
        """The same value, of which LLVM no longer knows what it is."""
        identity = ir.InlineAsm(ir.FunctionType(v.ir.type, [v.ir.type]), "", "=v,0")
        return Value(self, self.b.call(identity, [v.ir]), v.type)

    def void_intrinsic(self, name: str, *constants: int) -> None:
        """Call an intrinsic for its effect; its parameters are i32 constants."""
        words = [ir.Constant(ir.IntType(32), c) for c in constants]
        self.b.call(self._declare(name, ir.VoidType(), [w.type for w in words]), words)

    def dot_bf16_native(self, name: str, acc: Value, a: Value, b: Value) -> Value:
        """The one intrinsic whose operands are LLVM's own bfloat, which llvmlite.ir lacks."""
        pairs = _BFloat(a.type.lanes)
        function = self._declare(name, ir_type(acc.type), [acc.ir.type, pairs, pairs])
        operands = [acc.ir, self.b.bitcast(a.ir, pairs), self.b.bitcast(b.ir, pairs)]
        return Value(self, self.b.call(function, operands), acc.type)

    def call_external(self, name: str, *values: Value | Pointer, varargs: bool = False) -> Value:
        """Call a C function; only those of jit.EXTERNAL_SYMBOLS may be named."""
        params = [] if varargs else [v.ir.type for v in values]
        function = self._declare(name, ir.IntType(64), params, varargs)
        return Value(self, self.b.call(function, [v.ir for v in values]), i64)

    def call_through(self, slot: Pointer, *values: Value | Pointer) -> None:
        """Call the kernel whose address is stored at `slot`."""
        made = ir.FunctionType(ir.VoidType(), [v.ir.type for v in values])
        function = self.b.load(slot.ir, typ=ir.PointerType(made), align=8)
        self.b.call(function, [v.ir for v in values])
