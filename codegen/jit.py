"""Kernels to machine code: LLVM, the object cache, and addresses to call.

LLVM aborts the process on a damaged object, so cached bytes are only handed over after
codegen/cache_dir.py has proven them whole.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any, Protocol

import llvmlite
from llvmlite import binding as llvm

from codegen.kernel import KernelSpec
from codegen.targets import Host, choose
from codegen.targets.base import Target

EXTERNAL_SYMBOLS = frozenset(
    {"sched_yield", "syscall", "clock_gettime", "memset", "memcpy", "memmove"}
)
_NATIVE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class Store(Protocol):
    """Where object code is kept between runs."""

    def get(self, key: str) -> bytes | None: ...
    def put(self, key: str, payload: bytes) -> None: ...


def host() -> Host:
    """This machine, as LLVM sees it."""
    features = llvm.get_host_cpu_features()
    names = frozenset(name for name, on in features.items() if on)
    return Host(llvm.get_process_triple(), llvm.get_host_cpu_name(), names)


def host_target(wanted: str | None = None) -> Target:
    """The best target here, or the one asked for; raises ValueError if this CPU cannot run it."""
    return choose(host(), wanted)


def version() -> str:
    return f"llvmlite {llvmlite.__version__} LLVM {'.'.join(map(str, llvm.llvm_version_info))}"


def target_machine(target: Target) -> Any:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    made = llvm.Target.from_triple(target.triple)
    return made.create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, reloc="static", codemodel="large"
    )


def optimise(ir_text: str, machine: Any) -> Any:
    """Parse, verify and optimise. The kernels unroll and vectorise by themselves."""
    module = llvm.parse_assembly(ir_text)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = False
    options.loop_unrolling = options.loop_interleaving = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module


def assembly(spec: KernelSpec, target: Target) -> str:
    """The kernel's assembly text, for any target."""
    machine = target_machine(target)
    text: str = machine.emit_assembly(optimise(spec.ir(target), machine))
    return text


class Jit:
    """Compiles kernels for one target and keeps them loaded as long as the process lives.

    `compiled` and `loaded` count what came from LLVM and what came from the store.
    """

    def __init__(self, target: Target, store: Store | None = None) -> None:
        self.target, self.store = target, store
        self.compiled = self.loaded = 0
        self._machine = target_machine(target)
        self._lljit = llvm.create_lljit_compiler(self._machine)
        self._known: dict[KernelSpec, tuple[int, int]] = {}
        self._trackers: list[Any] = []

    def load(self, spec: KernelSpec) -> tuple[int, int]:
        """(address, number of tile counters) of a kernel, compiled on first use."""
        known = self._known.get(spec)
        if known is None:
            known = self._known[spec] = self._link(spec, *self._object(spec))
        return known

    def function(self, spec: KernelSpec) -> Callable[[Any, Any, int], None]:
        """The kernel as a Python callable (args, job, thread); it releases the GIL."""
        return _NATIVE(self.load(spec)[0])

    def _object(self, spec: KernelSpec) -> tuple[bytes, int]:
        key = spec.key(self.target, version())
        stored = self.store.get(key) if self.store else None
        if stored is not None:
            self.loaded += 1
            return stored[1:], stored[0]
        text, n_counters = spec.build(self.target)
        check_symbols(text)
        payload = self._machine.emit_object(optimise(text, self._machine))
        self.compiled += 1
        if self.store:
            self.store.put(key, bytes([n_counters]) + payload)
        return payload, n_counters

    def _link(self, spec: KernelSpec, payload: bytes, n_counters: int) -> tuple[int, int]:
        builder = llvm.JITLibraryBuilder().add_object_img(payload)
        builder.export_symbol(spec.symbol).add_current_process()
        tracker = builder.link(self._lljit, spec.symbol)
        self._trackers.append(tracker)
        return tracker[spec.symbol], n_counters


def check_symbols(ir_text: str) -> None:
    """Generated code may call LLVM intrinsics and a short list of C functions, nothing else."""
    for name in re.findall(r'^declare [^@]*@"?([\w.]+)"?', ir_text, re.MULTILINE):
        if not name.startswith("llvm.") and name not in EXTERNAL_SYMBOLS:
            raise ValueError(f"kernel calls {name}, which is not on the list of allowed symbols")
