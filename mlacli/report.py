"""What a model needs with given flags: caches, buffers, work. Reads headers, plans, runs nothing.

The plan is the one that the engine would use, so that what is reported is what is taken.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace

from codegen.formats import BlockFormat
from mlacli.context import ContextPlan, PlannedGraph, plan_context
from mlacli.engine import Model
from mlacli.fit import context_size, planned_memory, planned_need, wanted_context
from mlacli.free_memory import available_bytes
from mlacli.gguf.problem import printable
from mlacli.graph.lower import scratch_bytes
from mlacli.graph.node import Dim
from mlacli.loading import model_for
from mlacli.machine import kept_profile, this_target
from mlacli.report_format import buffer_lines, cache_names, repack_notes
from mlacli.report_work import CostModel, Switching, Work, switching, work_of
from mlacli.settings import RunSettings

__all__ = [
    "Report",
    "buffer_lines",
    "context_size",
    "make_report",
    "repack_notes",
    "report_json",
    "report_of",
]

FITS, PAGES, TOO_LARGE = "fits", "weights will page from disk", "does not fit"


@dataclass(frozen=True)
class TensorType:
    """All tensors of one type."""

    count: int
    nbytes: int


@dataclass(frozen=True)
class ModelFacts:
    """What the file's headers say."""

    file: str
    name: str
    arch: str
    file_type: str
    n_layer: int
    n_params: int
    n_ctx_train: int
    file_bytes: int
    tensor_types: dict[str, TensorType]


@dataclass(frozen=True)
class Flags:
    """What else memory depends on; `n_ubatch` may be more than the context."""

    n_batch: int
    n_ubatch: int
    n_threads: int
    n_threads_batch: int
    type_k: str
    type_v: str
    amb_mib: int
    rtr: bool
    mlock: bool
    mmap: bool


@dataclass(frozen=True)
class CacheKind:
    """One kind of cached row, all layers."""

    nbytes: int
    bytes_per_token: int


@dataclass(frozen=True)
class CacheFacts:
    """The cache; `plain_bytes_per_token` is what K and V of all heads would take, same types."""

    kinds: dict[str, CacheKind]
    nbytes: int
    bytes_per_token: int
    plain_bytes_per_token: int


@dataclass(frozen=True)
class GraphFacts:
    """One planned graph; `scratch` is the most that a node of each op takes inside the arena."""

    name: str
    n_tokens_max: int
    n_nodes: int
    arena_bytes: int
    scratch: dict[str, int]


@dataclass(frozen=True)
class DerivedWeights:
    """Weights that the file lacks, or copies with interleaved rows (-rtr): anonymous memory, made
    at load."""

    name: str
    type: str
    count: int
    nbytes: int
    is_copy: bool = False


@dataclass(frozen=True)
class MemoryFacts:
    """What must be had, what may be paged, and what there is, in bytes."""

    needed_bytes: int
    weight_bytes: int
    available_bytes: int
    verdict: str


@dataclass(frozen=True)
class Report:
    """All numbers of a report; sizes in bytes."""

    model: ModelFacts
    mla: int
    flash_attn: bool
    n_ctx: int
    flags: Flags
    cache: CacheFacts
    compute_bytes: int
    output_bytes: int
    graphs: tuple[GraphFacts, ...]
    derived: tuple[DerivedWeights, ...]
    derived_bytes: int
    work: Work
    switching: Switching
    memory: MemoryFacts
    buffer_lines: tuple[str, ...]
    notes: tuple[str, ...]


def report_json(report: Report) -> str:
    """All of it as JSON."""
    return json.dumps(asdict(report), indent=2) + "\n"


def make_report(settings: RunSettings, available: int | None = None) -> Report:
    """`report_of` for the settings' model file and, unless told, the memory that there is now."""
    available = available_bytes() if available is None else available
    return report_of(model_for(replace(settings, mmap=True)), settings, available)


def report_of(model: Model, settings: RunSettings, available: int) -> Report:
    """Plan a context as `run` would and say what it takes; one that does not fit is planned, too.

    Raises ModelError for a file that cannot run, UsageError for a flag that cannot work with it.
    """
    config, target = model.config, this_target()
    notes = list(model.notes)

    def note(line: str) -> None:
        notes.append(line.removeprefix("note: "))

    n_ctx = wanted_context(config, settings, available, note)
    plan = plan_context(config, model.weights, settings, target, n_ctx=n_ctx)
    integer = model.weights.v_b(0).fmt.integer_dot
    cost = CostModel(kept_profile(target, settings.n_threads_batch, settings.type_k), integer)
    return Report(
        model=model_facts(model),
        mla=settings.mla,
        flash_attn=settings.flash_attn,
        n_ctx=plan.n_ctx,
        flags=Flags(**{f.name: getattr(settings, f.name) for f in fields(Flags)}),
        cache=_cache_facts(plan, settings),
        compute_bytes=plan.arena_bytes,
        output_bytes=plan.output_bytes,
        graphs=tuple(_graph_facts(g) for g in plan.graphs.values()),
        derived=_derived(plan),
        derived_bytes=planned_need(plan).derived,
        work=work_of(config, settings, cost, plan.n_ctx),
        switching=switching(config, settings, cost, settings.mla),
        memory=_memory_facts(model, plan, settings, available),
        buffer_lines=tuple(buffer_lines(plan, settings)),
        notes=(*notes, *repack_notes(plan, settings)),
    )


def model_facts(model: Model) -> ModelFacts:
    config, file = model.config, model.file
    types: dict[str, TensorType] = {}
    for tensor in file.tensors.values():
        seen = types.get(tensor.type_name, TensorType(0, 0))
        types[tensor.type_name] = TensorType(seen.count + 1, seen.nbytes + tensor.nbytes)
    return ModelFacts(
        file=printable(str(file.path), 200),
        name=config.name,
        arch=config.arch,
        file_type=config.file_type,
        n_layer=config.n_layer,
        n_params=sum(math.prod(tensor.shape) for tensor in file.tensors.values()),
        n_ctx_train=config.n_ctx_train,
        file_bytes=file.size_bytes,
        tensor_types=dict(sorted(types.items(), key=lambda item: -item[1].nbytes)),
    )


def _cache_facts(plan: ContextPlan, settings: RunSettings) -> CacheFacts:
    layout, kinds = plan.layout, plan.layout.nbytes()
    names = cache_names(kinds, settings)
    k = _row_bytes(layout.fmt_k, layout.n_nope + layout.n_rope)
    v = _row_bytes(layout.fmt_v, layout.n_v)
    return CacheFacts(
        kinds={names[kind]: CacheKind(n, n // layout.n_ctx) for kind, n in kinds.items()},
        nbytes=plan.cache_bytes,
        bytes_per_token=layout.bytes_per_token,
        plain_bytes_per_token=layout.n_layer * layout.n_head * (k + v),
    )


def _row_bytes(fmt: BlockFormat, n: int) -> int:
    """As BlockFormat.row_bytes, but rounded up where blocks do not divide the row."""
    return fmt.header_bytes + -(-n * fmt.block_bytes // fmt.size)


def _graph_facts(planned: PlannedGraph) -> GraphFacts:
    scratch: dict[str, int] = {}
    operations = list(planned.graph.operations)
    for node in operations:
        if node.index in planned.plan.scratch:
            n = scratch_bytes(planned.lower, node)
            scratch[node.op] = max(scratch.get(node.op, 0), n)
    return GraphFacts(
        name=planned.name,
        n_tokens_max=planned.lower.bounds[Dim.N_TOKENS],
        n_nodes=len(operations),
        arena_bytes=planned.plan.size,
        scratch=scratch,
    )


def _derived(plan: ContextPlan) -> tuple[DerivedWeights, ...]:
    """Grouped by what stands behind `blk.N.` and by type."""
    found: dict[tuple[str, str], DerivedWeights] = {}
    for matrix in plan.derived():
        name = (
            matrix.tensor.split(".", 2)[-1] if matrix.tensor.startswith("blk.") else matrix.tensor
        )
        kind = (name, matrix.fmt.name)
        seen = found.get(kind, DerivedWeights(*kind, 0, 0, matrix.is_copy))
        found[kind] = replace(seen, count=seen.count + 1, nbytes=seen.nbytes + matrix.nbytes)
    return tuple(found.values())


def _memory_facts(
    model: Model, plan: ContextPlan, settings: RunSettings, available: int
) -> MemoryFacts:
    needed, weights = planned_memory(plan, settings, model.file.size_bytes)
    verdict = TOO_LARGE if needed > available else PAGES if needed + weights > available else FITS
    return MemoryFacts(needed, model.file.size_bytes, available, verdict)
