"""The report as text, and the start-up lines that scripts look for: pure functions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from codegen.formats import CACHE_FORMATS, transposed_type
from mlacli.context import ContextPlan
from mlacli.settings import RunSettings
from mlacli.units import MIB, count_text, size_text

if TYPE_CHECKING:
    from mlacli.report import Report

_INIT = "llama_init_from_model: "
_LABEL = 30  # width of the first column
_NEVER = 2**20  # no batch is as large
_SHOWN = 3


def buffer_lines(plan: ContextPlan, settings: RunSettings) -> list[str]:
    """Context, cache and compute buffers in the words of llama.cpp and ik_llama.cpp."""
    facts = {
        "n_ctx": plan.n_ctx,
        "n_batch": settings.n_batch,
        "n_ubatch": settings.n_ubatch,
        "flash_attn": int(settings.flash_attn),
        "mla_attn": settings.mla,
        "attn_max_b": settings.amb_mib,
        "fused_moe": int(settings.fmoe),
    }
    total = plan.cache_bytes / MIB
    return [
        *(f"{_INIT}{name:<13} = {value}" for name, value in facts.items()),
        f"llama_kv_cache_init: {'CPU':>10} KV buffer size = {total:8.2f} MiB",
        f"{_INIT}KV self size  = {total:7.2f} MiB, {_kinds(plan, settings)}",
        f"{_INIT}{'CPU':>10}  output buffer size = {plan.output_bytes / MIB:8.2f} MiB",
        f"{_INIT}{'CPU':>10} compute buffer size = {plan.arena_bytes / MIB:8.2f} MiB",
        f"{_INIT}graph nodes  = {plan.n_nodes}",
        f"{_INIT}graph splits = 1",
    ]


def repack_notes(plan: ContextPlan, settings: RunSettings) -> list[str]:
    """What -rtr does not change, and when it changes nothing."""
    if not settings.rtr:
        return []
    if not any(m.source for m in plan.derived()):
        return ["-rtr has no effect: no weight can be interleaved (Q8_0, Q4_0 and IQ4_NL can)"]
    left = [f"{m.name} ({m.fmt.name}, {m.n_rows} rows)" for m in plan.left_by_rtr()]
    if len(left) > _SHOWN:
        left[_SHOWN:] = [f"{len(left) - _SHOWN} more"]
    return [f"-rtr leaves as it is: {', '.join(left)}"] if left else []


def cache_names(kinds: Iterable[str], settings: RunSettings) -> dict[str, str]:
    """Kind of cached row -> its name and type, as ik_llama.cpp writes them."""
    names = {
        "c": f"c^KV ({settings.type_k})",
        "kv_t": f"kv^T ({_transposed(settings.type_k)})",
        "k": f"K ({settings.type_k})",
        "v": f"V ({settings.type_v})",
        "v_t": f"V ({_transposed(settings.type_v)})",
    }
    return {kind: names[kind] for kind in kinds}


def _transposed(cache_type: str) -> str:
    return str(transposed_type(CACHE_FORMATS[cache_type]))


def _kinds(plan: ContextPlan, settings: RunSettings) -> str:
    nbytes = plan.layout.nbytes()
    names = cache_names(nbytes, settings)
    parts = [f"{names[kind]}: {n / MIB:7.2f} MiB" for kind, n in nbytes.items()]
    if plan.layout.latent and not plan.layout.transposed:
        parts.append("kv^T: not used")
    return ", ".join(parts)


def format_report(report: Report) -> str:
    """The whole report; every number is in `Report` as well."""
    sections = [
        _model(report),
        report.buffer_lines,
        _cache(report),
        _compute(report),
        _work(report),
        _memory(report),
        [f"note: {line}" for line in report.notes],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def _row(label: str, text: str) -> str:
    return f"{label:<{_LABEL}}{text}"


def _mib(n: int) -> str:
    return f"{n / MIB:10.2f} MiB"


def _kib(n: int) -> str:
    return f"{n / 1024:10.2f} KiB"


def _model(report: Report) -> list[str]:
    m = report.model
    types = ", ".join(
        f"{name} {t.count} ({size_text(t.nbytes)})" for name, t in m.tensor_types.items()
    )
    return [
        _row("model", f"{m.name} ({m.file})"),
        _row(
            "",
            f"{m.arch}, {m.file_type}, {m.n_layer} layers, {count_text(m.n_params)} parameters, "
            f"{size_text(m.file_bytes)}",
        ),
        _row("", f"trained on {m.n_ctx_train} tokens"),
        _row("tensors", types),
    ]


def _cache(report: Report) -> list[str]:
    c = report.cache
    lines = [_row("KV cache", f"{'per token':>14}{'all tokens':>17}")]
    for name, kind in c.kinds.items():
        lines.append(_row(f"  {name}", f"{_kib(kind.bytes_per_token)}   {_mib(kind.nbytes)}"))
    lines.append(_row("  KV bytes per token", f"{_kib(c.bytes_per_token)}   {_mib(c.nbytes)}"))
    plain = c.plain_bytes_per_token
    lines.append(_row("  as plain MHA", f"{_kib(plain)}   {_mib(plain * report.n_ctx)}"))
    if report.mla == 0:
        return [*lines, _row("  saved by MLA", "   nothing: -mla 0 caches K and V")]
    ratio = plain / c.bytes_per_token
    return [
        *lines,
        _row("  saved by MLA", f"{100 - 100 / ratio:10.1f} %   ({ratio:.1f} x smaller)"),
    ]


def _compute(report: Report) -> list[str]:
    lines = [_row("Compute buffer", f"{'arena':>14}{'nodes':>8}  scratch of the largest op")]
    for g in report.graphs:
        label = f"  {g.name} (up to {g.n_tokens_max} tokens)"
        most = max(g.scratch, key=g.scratch.__getitem__, default=None)
        scratch = f"{g.scratch[most] / MIB:.2f} MiB ({most})" if most else "none"
        lines.append(_row(label, f"{_mib(g.arena_bytes)}{g.n_nodes:8}  {scratch}"))
    lines.append(_row("  used by all", _mib(report.compute_bytes)))
    lines.append(_row("Output buffer", _mib(report.output_bytes)))
    lines.append(_row("Weights made at load", _mib(report.derived_bytes)))
    for d in report.derived:
        copy = ", -rtr copy" if d.is_copy else ""
        lines.append(_row(f"  {d.name}", f"{_mib(d.nbytes)}  {d.count} x {d.type}{copy}"))
    return lines


def _work(report: Report) -> list[str]:
    w = report.work
    lines = [
        "Multiply-adds of attention, per query token, cached row and head:",
        "  " + ", ".join(f"{path} {n:.0f}" for path, n in w.per_row.items())
        + f" (for batches of {w.n_batch})",
        f"Multiply-adds per token, {report.n_ctx} rows cached (weights alone "
        f"{count_text(w.weights_per_token)}, logits {count_text(w.logits_per_token)} more):",
    ]  # fmt: skip
    for mode in w.modes:
        mark = "*" if mode.mla == report.mla else " "
        lines.append(
            f"{mark} -mla {mode.mla}   prompt {count_text(mode.prompt_per_token):>9} "
            f"({mode.prompt_path}), generation {count_text(mode.generation_per_token):>9} "
            f"({mode.generation_path})"
        )
    return [*lines, f"Path: {_path(report)}"]


def _path(report: Report) -> str:
    if report.mla == 0:
        return "every batch takes standard attention"
    if report.mla == 1:
        return "every batch is absorbed"
    at, source = report.switching.crossover, report.switching.source
    if at is None or at > _NEVER:
        return "every batch is absorbed: expanding never pays for this model"
    if source == "unmeasured":
        return (
            "prompt batches are expanded where that is faster: measured at the first run "
            f"(by multiply-adds alone: {at} tokens and more)"
        )
    reason = {"default": "-mla 2", "measured": "measured on this machine"}.get(source, source)
    return f"batches of {at} tokens and more are expanded ({reason}), smaller ones absorbed"


def _memory(report: Report) -> list[str]:
    m = report.memory
    return [
        f"Memory: {size_text(m.needed_bytes)} needed, {size_text(m.weight_bytes)} of weights, "
        f"{size_text(m.available_bytes)} available: {m.verdict}"
    ]
