"""The report's text, word for word, from made-up numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlacli.memory import MIB
from mlacli.report import (
    CacheFacts,
    CacheKind,
    DerivedWeights,
    Flags,
    GraphFacts,
    MemoryFacts,
    ModelFacts,
    Report,
    TensorType,
)
from mlacli.report_format import format_report
from mlacli.report_work import ModeWork, Switching, Work

REPORT = Report(
    model=ModelFacts(
        file="models/v2-lite.gguf",
        name="DeepSeek V2 Lite",
        arch="deepseek2",
        file_type="IQ4_NL",
        n_layer=27,
        n_params=15_706_484_224,
        n_ctx_train=163840,
        file_bytes=8440 * MIB,
        tensor_types={"IQ4_NL": TensorType(269, 8426 * MIB), "F32": TensorType(108, 14 * MIB)},
    ),
    mla=1,
    flash_attn=False,
    n_ctx=65536,
    flags=Flags(2048, 512, 8, 8, "q8_KV", "f16", 0, False, False, True),
    cache=CacheFacts(
        kinds={
            "c^KV (q8_KV)": CacheKind(1033371648, 15768),
            "kv^T (f16)": CacheKind(1811939328, 27648),
        },
        nbytes=2845310976,
        bytes_per_token=43416,
        plain_bytes_per_token=196992,
    ),
    compute_bytes=305 * MIB,
    output_bytes=409600,
    graphs=(
        GraphFacts("few", 4, 594, 7 * MIB, {}),
        GraphFacts("absorbed", 512, 1267, 305 * MIB, {"matmul": MIB, "absorb_q": 3 * MIB // 2}),
    ),
    derived=(DerivedWeights("attn_k_b.weight", "Q8_0", 27, 30081024),),
    derived_bytes=30081024,
    work=Work(
        n_batch=512,
        per_row={"standard": 320, "absorbed": 1088, "expanded": 576.4},
        weights_per_token=2_241_593_344,
        logits_per_token=209_715_200,
        modes=(
            ModeWork(0, "standard", 11_301_563_392, "standard", 11_301_563_392),
            ModeWork(1, "absorbed", 33_044_561_920, "absorbed", 33_044_561_920),
            ModeWork(2, "expanded", 18_492_424_192, "absorbed", 33_044_561_920),
            ModeWork(3, "expanded", 999_000_000, "absorbed", 33_044_561_920),
        ),
    ),
    switching=Switching(None, "one path"),
    memory=MemoryFacts(3195 * MIB, 8440 * MIB, 9216 * MIB, "weights will page from disk"),
    buffer_lines=("llama_init_from_model: n_ctx         = 65536", "graph splits = 1"),
    notes=("2 tensors are not used: a, b",),
)

GOLDEN = """\
model                         DeepSeek V2 Lite (models/v2-lite.gguf)
                              deepseek2, IQ4_NL, 27 layers, 15.71 B parameters, 8.24 GiB
                              trained on 163840 tokens
tensors                       IQ4_NL 269 (8.23 GiB), F32 108 (14.00 MiB)

llama_init_from_model: n_ctx         = 65536
graph splits = 1

KV cache                           per token       all tokens
  c^KV (q8_KV)                     15.40 KiB       985.50 MiB
  kv^T (f16)                       27.00 KiB      1728.00 MiB
  KV bytes per token               42.40 KiB      2713.50 MiB
  as plain MHA                    192.38 KiB     12312.00 MiB
  saved by MLA                      78.0 %   (4.5 x smaller)

Compute buffer                         arena   nodes  scratch of the largest op
  few (up to 4 tokens)              7.00 MiB     594  none
  absorbed (up to 512 tokens)     305.00 MiB    1267  1.50 MiB (absorb_q)
  used by all                     305.00 MiB
Output buffer                       0.39 MiB
Weights made at load               28.69 MiB
  attn_k_b.weight                  28.69 MiB  27 x Q8_0

Multiply-adds of attention, per query token, cached row and head:
  standard 320, absorbed 1088, expanded 576 (for batches of 512)
Multiply-adds per token, 65536 rows cached (weights alone 2.24 B, logits 209.72 M more):
  -mla 0   prompt   11.30 B (standard), generation   11.30 B (standard)
* -mla 1   prompt   33.04 B (absorbed), generation   33.04 B (absorbed)
  -mla 2   prompt   18.49 B (expanded), generation   33.04 B (absorbed)
  -mla 3   prompt  999.00 M (expanded), generation   33.04 B (absorbed)
Path: every batch is absorbed

Memory: 3.12 GiB needed, 8.24 GiB of weights, 9.00 GiB available: weights will page from disk

note: 2 tensors are not used: a, b
"""


def test_golden_text() -> None:
    assert format_report(REPORT) == GOLDEN


def test_empty_sections_leave_no_gap() -> None:
    text = format_report(replace(REPORT, notes=(), derived=(), derived_bytes=0))
    assert text.endswith("weights will page from disk\n")
    assert "Weights made at load                0.00 MiB\n\nMultiply-adds" in text


def test_standard_mode_saves_nothing() -> None:
    text = format_report(replace(REPORT, mla=0))
    assert "  saved by MLA                   nothing: -mla 0 caches K and V\n" in text
    assert "Path: every batch takes standard attention\n" in text
    assert "\n* -mla 0   prompt" in text and "\n  -mla 1   prompt" in text


@pytest.mark.parametrize(
    ("switching", "line"),
    [
        (Switching(128, "default"), "batches of 128 tokens and more are expanded (-mla 2)"),
        (
            Switching(9, "--mla-threshold"),
            "batches of 9 tokens and more are expanded (--mla-threshold)",
        ),
        (
            Switching(44, "measured"),
            "batches of 44 tokens and more are expanded (measured on this machine)",
        ),
        (
            Switching(171, "unmeasured"),
            "prompt batches are expanded where that is faster: measured at the first run "
            "(by multiply-adds alone: 171 tokens and more)",
        ),
        (Switching(2**31 - 1, "measured"), "every batch is absorbed: expanding never pays"),
    ],
)
def test_path(switching: Switching, line: str) -> None:
    assert f"\nPath: {line}" in format_report(replace(REPORT, mla=3, switching=switching))
