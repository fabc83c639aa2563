"""Kernels to machine code: LLVM, the object cache, and addresses to call.

LLVM aborts the process on a damaged object, so cached bytes are only handed over after
codegen/cache_dir.py has proven them whole.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import llvmlite
from llvmlite import binding as llvm

from codegen.compilers import Compilers, helpers_worth
from codegen.kernel import KernelSpec
from codegen.targets import Host, choose
from codegen.targets.base import Target

Progress = Callable[[int, int], None]  # (kernels compiled, kernels to compile); from any thread
EXTERNAL_SYMBOLS = frozenset(
    {"sched_yield", "syscall", "clock_gettime", "memset", "memcpy", "memmove"}
)
_NATIVE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class Store(Protocol):
    """Where object code is kept between runs; `notes` say why it is not."""

    notes: list[str]

    def get(self, key: str) -> bytes | None: ...
    def put(self, key: str, payload: bytes) -> None: ...


def host() -> Host:
    """This machine, as LLVM sees it."""
    features = llvm.get_host_cpu_features()
    found, missing = (frozenset(n for n, on in features.items() if on is x) for x in (True, False))
    return Host(llvm.get_process_triple(), llvm.get_host_cpu_name(), found, missing)


def host_target(wanted: str | None = None) -> Target:
    """The best target here, or the one asked for; raises ValueError if this CPU cannot run it."""
    return choose(host(), wanted)


def version() -> str:
    return f"llvmlite {llvmlite.__version__} LLVM {'.'.join(map(str, llvm.llvm_version_info))}"


def target_machine(target: Target) -> Any:
    return machine_for(**_machine_words(target))


def _machine_words(target: Target) -> dict[str, str]:
    return {"triple": target.triple, "cpu": target.cpu, "features": target.features}


def machine_for(*, triple: str, cpu: str, features: str) -> Any:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    made = llvm.Target.from_triple(triple)
    return made.create_target_machine(
        cpu=cpu, features=features, opt=3, reloc="static", codemodel="large"
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


def optimised_ir(spec: KernelSpec, target: Target) -> str:
    """The kernel's LLVM IR as LLVM leaves it, for any target."""
    return str(optimise(spec.ir(target), target_machine(target)))


def code_bytes(payload: bytes) -> int:
    """Bytes of instructions in object code that a compiler of ours made."""
    sections = llvm.ObjectFileRef.from_data(payload).sections()
    return sum(int(section.size()) for section in sections if section.is_text())


class Jit:
    """Compiles kernels for one target and keeps them loaded as long as the process lives.

    `compiled` and `loaded` count what came from LLVM and what came from the store. Up to
    `n_processes` compile at once.
    """

    def __init__(self, target: Target, store: Store | None = None, n_processes: int = 1) -> None:
        self.target, self.store, self.n_processes = target, store, n_processes
        self.compiled = self.loaded = 0
        self._machine = target_machine(target)
        self._lljit = llvm.create_lljit_compiler(self._machine)
        self._known: dict[KernelSpec, tuple[int, int]] = {}
        self._symbols: dict[str, KernelSpec] = {}
        self._notes: list[str] = []
        self._trackers: list[Any] = []

    @property
    def notes(self) -> tuple[str, ...]:
        """What did not go as it should, but does no harm."""
        return (*(self.store.notes if self.store else ()), *self._notes)

    def load(self, spec: KernelSpec) -> tuple[int, int]:
        """(address, number of tile counters) of a kernel, compiled on first use."""
        if spec not in self._known:
            self.load_all([spec])
        return self._known[spec]

    def load_all(self, specs: Iterable[KernelSpec], progress: Progress | None = None) -> None:
        """Load kernels; those that must be compiled are shared among the processes.

        `progress` is told how many of those that must be compiled are. Raises ValueError for two
        that bear the same symbol: the second would run the first.
        """
        missing: dict[str, tuple[KernelSpec, str]] = {}  # by symbol: with the store's key
        for spec in dict.fromkeys(specs):
            if spec in self._known:
                continue
            if self._symbols.setdefault(spec.symbol, spec) != spec:
                raise ValueError(f"two kernels are called {spec.symbol}")
            key = spec.key(self.target, version())
            stored = self.store.get(key) if self.store else None
            if stored is None:
                missing[spec.symbol] = spec, key
            else:
                self._link(spec, stored[1:], stored[0])
                self.loaded += 1
        if progress and missing:
            progress(0, len(missing))
        compiled = self._compile({name: spec for name, (spec, _) in missing.items()}, progress)
        for symbol, (payload, n_counters) in compiled.items():
            spec, key = missing[symbol]
            self._link(spec, payload, n_counters)
            self.compiled += 1
            if self.store:
                self.store.put(key, bytes([n_counters]) + payload)

    def function(self, spec: KernelSpec) -> Callable[[Any, Any, int], None]:
        """The kernel as a Python callable (args, job, thread); it releases the GIL."""
        return _NATIVE(self.load(spec)[0])

    def _compile(
        self, specs: Mapping[str, KernelSpec], progress: Progress | None
    ) -> dict[str, tuple[bytes, int]]:
        """(object code, number of tile counters) by symbol."""
        n_counters: dict[str, int] = {}

        def texts() -> Iterator[tuple[str, str]]:
            for symbol, spec in specs.items():
                text, n_counters[symbol] = spec.build(self.target)
                check_symbols(text)
                yield symbol, text

        def compile_one(text: str) -> bytes:
            payload: bytes = self._machine.emit_object(optimise(text, self._machine))
            return payload

        compilers = Compilers(
            machine=_machine_words(self.target),
            folders=[str(Path(path).parent.parent) for path in (__file__, llvmlite.__file__)],
            compile_one=compile_one,
            n=helpers_worth(len(specs), self.n_processes),
            done=(lambda n: progress(n, len(specs))) if progress else None,
        )
        payloads = compilers.compile(texts())
        self._notes += compilers.notes
        return {symbol: (payload, n_counters[symbol]) for symbol, payload in payloads.items()}

    def _link(self, spec: KernelSpec, payload: bytes, n_counters: int) -> None:
        builder = llvm.JITLibraryBuilder().add_object_img(payload)
        builder.export_symbol(spec.symbol).add_current_process()
        tracker = builder.link(self._lljit, spec.symbol)
        self._trackers.append(tracker)
        self._known[spec] = tracker[spec.symbol], n_counters


def check_symbols(ir_text: str) -> None:
    """Generated code may call LLVM intrinsics and a short list of C functions, nothing else."""
    for name in re.findall(r'^declare [^@]*@"?([\w.]+)"?', ir_text, re.MULTILINE):
        if not name.startswith("llvm.") and name not in EXTERNAL_SYMBOLS:
            raise ValueError(f"kernel calls {name}, which is not on the list of allowed symbols")
