"""A context planned: its graphs, its arena and cache sizes. No weight is touched, nothing runs.

Both the engine and the report start from here, so that what is reported is what is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from codegen.targets.base import Target
from mlacli.cache import CacheLayout
from mlacli.errors import UsageError
from mlacli.graph.lower import Lower, Lowering, scratch_bytes
from mlacli.graph.matrix import Matrix
from mlacli.graph.node import Bounds, Dim, Graph, Node
from mlacli.graph.ops import KNOWN_OPS
from mlacli.graph.plan import Plan, make_plan
from mlacli.graph.verify import verify
from mlacli.model.choose import FEW_TOKENS, options
from mlacli.model.config import ModelConfig
from mlacli.model.deepseek2 import build_graph
from mlacli.model.layers import Path
from mlacli.model.weights import Weights
from mlacli.settings import RunSettings
from mlacli.suggest import suggestion

PADDING_FLASH, PADDING_PLAIN = 256, 32


@dataclass(frozen=True)
class PlannedGraph:
    """One of at most three graphs of a context."""

    name: str
    graph: Graph
    plan: Plan
    lower: Lower


@dataclass(frozen=True)
class ContextPlan:
    """All that is known before memory is taken."""

    n_ctx: int
    layout: CacheLayout
    graphs: dict[str, PlannedGraph]
    n_out_max: int
    n_vocab: int
    n_expert_used: int

    @property
    def arena_bytes(self) -> int:
        """The compute buffer."""
        return max(g.plan.size for g in self.graphs.values())

    @property
    def n_tokens_max(self) -> int:
        """Tokens of the largest batch: the micro-batch size."""
        return max(g.lower.bounds[Dim.N_TOKENS] for g in self.graphs.values())

    @property
    def output_bytes(self) -> int:
        return 4 * self.n_out_max * self.n_vocab

    @property
    def cache_bytes(self) -> int:
        return sum(self.layout.nbytes().values())

    @property
    def n_nodes(self) -> int:
        return max(sum(1 for _ in g.graph.operations) for g in self.graphs.values())

    def derived(self) -> list[Matrix]:
        """Matrices that are made at load, once each."""
        found = {
            node.attrs["matrix"]: None
            for g in self.graphs.values()
            for node in g.graph.nodes
            if node.op == "weight" and node.attrs["matrix"].derived
        }
        return list(found)

    def left_by_rtr(self) -> list[Matrix]:
        """Quantised matrices that kernels multiply with as they lie in the file."""
        found = {
            node.attrs["matrix"]: None
            for g in self.graphs.values()
            for reader in g.graph.operations
            for node in reader.inputs
            if node.op == "weight" and reader.op != "embed"
        }
        return [m for m in found if m.fmt.is_quantised and not m.fmt.interleaved]


def padded_context(n_ctx: int, *, flash: bool) -> int:
    """Rows are padded to 256 with flash attention, 32 without."""
    step = PADDING_FLASH if flash else PADDING_PLAIN
    return -(-n_ctx // step) * step


def cache_layout(config: ModelConfig, settings: RunSettings, n_ctx: int) -> CacheLayout:
    """What is cached, from -mla, -fa and the cache types."""
    chosen = options(settings, "absorbed", n_ctx, few=False)
    transposed = chosen.transposed_cache if settings.mla else not settings.flash_attn
    return CacheLayout(
        config.n_layer,
        n_ctx,
        config.n_head,
        config.kv_lora_rank,
        config.n_rope,
        config.n_nope,
        config.n_v,
        chosen.fmt_k,
        chosen.fmt_v,
        latent=settings.mla != 0,
        transposed=transposed,
    )


def plan_context(
    config: ModelConfig,
    weights: Weights,
    settings: RunSettings,
    target: Target,
    *,
    n_ctx: int,
    n_out_max: int = 1,
    keep: tuple[str, ...] = (),
    kernels: Mapping[str, Lowering] | None = None,
) -> ContextPlan:
    """Build, verify and plan every graph that these settings can reach.

    `kernels` take the place of an op's own. Raises UsageError for one that has no place here.
    """
    n_ctx = padded_context(n_ctx, flash=settings.flash_attn)
    n_ubatch = min(settings.n_ubatch, n_ctx)
    batch_paths: dict[int, tuple[Path, ...]] = {
        0: ("standard",),
        1: ("absorbed",),
        2: ("absorbed", "expanded"),
        3: ("absorbed", "expanded"),
    }
    wanted: list[tuple[str, Path, bool]] = [("few", batch_paths[settings.mla][0], True)]
    wanted += [(path, path, False) for path in batch_paths[settings.mla]]
    graphs = {}
    for name, path, few in wanted:
        n_tokens = min(FEW_TOKENS, n_ubatch) if few else n_ubatch
        bounds = {Dim.N_TOKENS: n_tokens, Dim.N_KV: n_ctx, Dim.N_OUT: min(n_out_max, n_tokens)}
        chosen = options(settings, path, n_ctx, few=few, lanes=target.lanes)
        graph = build_graph(config, weights, chosen, n_tokens)
        verify(graph, KNOWN_OPS)
        threads = settings.n_threads if few else settings.n_threads_batch
        lower = Lower(target, bounds, threads, few, kernels or {})
        plan = _plan(graph, bounds, lower, keep)
        graphs[name] = PlannedGraph(name, graph, plan, lower)
    _check_kernels(kernels or {}, graphs.values())
    layout = cache_layout(config, settings, n_ctx)
    return ContextPlan(n_ctx, layout, graphs, n_out_max, config.n_vocab, config.n_expert_used)


def _check_kernels(kernels: Mapping[str, Lowering], graphs: Iterable[PlannedGraph]) -> None:
    found = {node.op for g in graphs for node in g.graph.operations if g.lower.replaced(node)}
    for op in kernels:
        if op not in KNOWN_OPS:
            raise UsageError(f"kernels: no op is called {op!r}{suggestion(op, KNOWN_OPS)}")
        if op not in found:
            raise UsageError(f"kernels: {op} takes the place of nothing with these settings")


def _plan(graph: Graph, bounds: Bounds, lower: Lower, keep: tuple[str, ...]) -> Plan:
    def scratch(node: Node) -> int:
        return scratch_bytes(lower, node)

    return make_plan(graph, bounds, scratch, keep)
