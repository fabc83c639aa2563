"""--override-kv and the flags about RoPE: what is read, what comes of it, what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlacli.engine import load_model
from mlacli.errors import SessionError, UsageError
from mlacli.gguf.reader import open_gguf
from mlacli.model.config import ModelConfig
from mlacli.overrides import Override, OverrideRule, RopeSettings, divided
from mlacli.session_file import load_session, save_session
from mlacli.settings import default_model
from tests.conftest import TinyModel
from tests.engines import all_logits, make_engine
from tests.gguf_bytes import Value, edited_model

RULE = OverrideRule("--override-kv")
A = "deepseek2."
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]


def config(rope: RopeSettings | None = None, *overrides: str) -> ModelConfig:
    """Of the bundled model, which is YaRN with factor 4."""
    rope = rope or RopeSettings()
    return load_model(default_model(), overrides=map(RULE.parse, overrides), rope=rope).config


# -- the text


def test_every_type_is_read() -> None:
    assert RULE.parse("a.b=int:-3") == Override("a.b", "int", -3)
    assert RULE.parse("a=float:1e-3") == Override("a", "float", 1e-3)
    assert RULE.parse("a=bool:false") == Override("a", "bool", False)
    assert RULE.parse("a=str:x=y:z, w") == Override("a", "str", "x=y:z, w")
    assert RULE.parse("a=str:") == Override("a", "str", "")


def test_several_in_one_value() -> None:
    parts = divided("a=int:1,b.c=str:x, y,d=bool:true")
    assert parts == ["a=int:1", "b.c=str:x, y", "d=bool:true"]
    assert [str(RULE.parse(part)) for part in parts] == parts


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a", "'a' is not KEY=TYPE:VALUE"),
        ("=int:3", "'=int:3' is not KEY=TYPE:VALUE"),
        ("a=3", "'a=3' is not KEY=TYPE:VALUE"),
        ("a=u32:3", "'a=u32:3' has type 'u32' (one of int, float, bool, str)"),
        ("a=int:3.5", "'a=int:3.5' has '3.5' (-9223372036854775808 to 18446744073709551615)"),
        ("a=int:99999999999999999999", "'a=int:99999999999999999999' has '99999999999999999999' "),
        ("a=float:nan", "'a=float:nan' has 'nan', which is not a finite number"),
        ("a=float:1e999", "'a=float:1e999' has '1e999', which is not a finite number"),
        ("a=bool:yes", "'a=bool:yes' has 'yes' (true or false)"),
    ],
)
def test_bad_text(text: str, line: str) -> None:
    with pytest.raises(UsageError) as caught:
        RULE.parse(text)
    assert str(caught.value).startswith(f"--override-kv: {line}")


# -- the file's keys


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (A + "rope.freq_base=int:3", f"{A}rope.freq_base is f32 in the file: write float:, not "),
        (A + "block_count=str:3", f"{A}block_count is u32 in the file: write int:, not str:"),
        ("general.name=bool:true", "general.name is string in the file: write str:, not bool:"),
        ("tokenizer.ggml.tokens=int:3", "tokenizer.ggml.tokens is an array of string in the file"),
        ("general.alignment=int:64", "general.alignment describes the file itself and cannot be"),
        (A + "rope.freq_base=float:1e300", f"{A}rope.freq_base 1e+300 does not fit into 32 bits"),
    ],
)
def test_overrides_that_cannot_work(text: str, line: str) -> None:
    with pytest.raises(UsageError) as caught:
        config(None, text)
    assert str(caught.value).startswith(f"--override-kv: {line}")


def test_what_is_told_and_kept() -> None:
    texts = [
        A + "rope.freq_base=float:20000",
        A + "rope.freq_base=float:30000",  # the last one counts
        A + "context_length=int:2048",  # as in the file
        A + "rope.freq_bose=float:1",
    ]
    model = load_model(default_model(), overrides=map(RULE.parse, texts))
    assert model.notes == (
        "deepseek2.rope.freq_base = 30000.0, not 10000.0",
        "deepseek2.rope.freq_bose = 1.0, which is not in the file "
        "(did you mean deepseek2.rope.freq_base?)",
    )
    assert model.overrides == (
        "deepseek2.rope.freq_base=float:30000.0",
        "deepseek2.rope.freq_bose=float:1.0",
    )
    assert model.config.rope_freq_base == 30000


# -- RoPE against its formulas


def yarn_frequencies(
    factor: float,
    original: float,
    *,
    base: float = 10000.0,
    slow: float = 1,
    fast: float = 32,
    ext: float = 1,
) -> npt.NDArray[np.float64]:
    """YaRN, arXiv 2309.00071 section 3.2, for the bundled model's 32 rotated values; `ext` is
    llama.cpp's share of the ramp."""
    d, found = 32, []
    turns = [original / (2 * math.pi * n) for n in (fast, slow)]
    place = [d * math.log(n) / (2 * math.log(base)) for n in turns]
    low, high = max(math.floor(place[0]), 0), min(math.ceil(place[1]), d - 1)
    for i in range(d // 2):
        theta = base ** (-2 * i / d)
        gamma = 1 - min(max((i - low) / max(high - low, 0.001), 0), 1)
        found.append(theta * gamma * ext + theta / factor * (1 - gamma * ext))
    return np.array(found)


def test_the_bundled_model_is_what_these_tests_think() -> None:
    c = config()
    assert c.yarn is not None and c.n_rope == 32 and c.rope_freq_base == 10000
    assert (c.yarn.factor, c.yarn.original_context) == (4, 512)
    np.testing.assert_allclose(c.rope_frequencies(), yarn_frequencies(4, 512), rtol=1e-12)


PLAIN = np.array([10000.0 ** (-i / 16) for i in range(16)])
CASES: dict[str, tuple[dict[str, Any], npt.NDArray[np.float64]]] = {
    "none": ({"rope_scaling": "none"}, PLAIN),
    "linear": ({"rope_scaling": "linear"}, PLAIN / 4),
    "scale": ({"rope_scale": 8.0}, yarn_frequencies(8, 512)),
    "freq scale": ({"rope_freq_scale": 0.125}, yarn_frequencies(8, 512)),
    "linear scale": ({"rope_scaling": "linear", "rope_scale": 2.0}, PLAIN / 2),
    "base": ({"rope_freq_base": 500000.0}, yarn_frequencies(4, 512, base=500000.0)),
    "original": ({"yarn_orig_ctx": 256}, yarn_frequencies(4, 256)),
    "ext": ({"yarn_ext_factor": 0.5}, yarn_frequencies(4, 512, ext=0.5)),
    "ext 0": ({"yarn_ext_factor": 0.0}, PLAIN / 4),
    "betas": (
        {"yarn_beta_slow": 2.0, "yarn_beta_fast": 16.0},
        yarn_frequencies(4, 512, slow=2, fast=16),
    ),
    "linear with ext": (
        {"rope_scaling": "linear", "yarn_ext_factor": 0.25},
        yarn_frequencies(4, 512, ext=0.25),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies(name: str) -> None:
    flags, expected = CASES[name]
    np.testing.assert_allclose(
        config(RopeSettings(**flags)).rope_frequencies(), expected, rtol=1e-6
    )


def test_attention_scale() -> None:
    plain, c = config(RopeSettings(rope_scaling="none")), config()
    assert c.yarn is not None
    key = c.yarn.log_multiplier
    assert plain.kq_scale == pytest.approx(1 / math.sqrt(plain.head_dim))
    for factor in (1.0, 4.0, 10.0):
        for attn in (1.0, 1.5):
            rope = RopeSettings(rope_scale=factor, yarn_attn_factor=attn)
            mscale = attn * (1 + key * math.log(factor))
            expected = mscale**2 / math.sqrt(plain.head_dim)
            assert config(rope).kq_scale == pytest.approx(expected, rel=1e-6)


def test_the_trained_context_grows_with_yarn() -> None:
    assert config().n_ctx_train == 2048
    assert config(RopeSettings(rope_scale=8)).n_ctx_train == 4096
    assert config(RopeSettings(rope_scale=8, yarn_orig_ctx=1024)).n_ctx_train == 8192
    assert config(RopeSettings(rope_scaling="linear", rope_scale=8)).n_ctx_train == 2048


def test_flags_stand_beside_overrides_of_the_same_things() -> None:
    key = "deepseek2.rope.scaling."
    original = Override(key + "original_context_length", "int", 1024)
    model = load_model(default_model(), rope=RopeSettings(rope_scale=4), overrides=[original])
    assert model.config == config(RopeSettings(rope_scale=4, yarn_orig_ctx=1024))
    kind = Override(key + "type", "str", "linear")
    model = load_model(default_model(), rope=RopeSettings(rope_scale=8), overrides=[kind])
    assert model.config.n_ctx_train == 2048


def test_flags_of_the_file_s_own_values_change_nothing() -> None:
    rope = RopeSettings(rope_scaling="yarn", rope_scale=4, yarn_orig_ctx=512, rope_freq_base=10000)
    model = load_model(default_model(), rope=rope)
    assert model.overrides == () and model.notes == ()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"rope_scale": 2.0, "rope_freq_scale": 0.5}, "--rope-scale and --rope-freq-scale: give "),
        ({"rope_scaling": "none", "rope_scale": 2.0}, "--rope-scaling none: leaves no room for "),
        ({"yarn_beta_slow": 3.0, "yarn_beta_fast": 2.0}, "--yarn-beta-fast: 2 is below --yarn-be"),
        ({"rope_scaling": "longrope"}, "--rope-scaling: 'longrope' is not one of none, linear, ya"),
        ({"rope_freq_base": 1.0}, "--rope-freq-base: 1.0 is out of range (2 to 1000000000000.0)"),
    ],
)
def test_settings_that_cannot_work(flags: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError) as caught:
        RopeSettings(**flags)
    assert str(caught.value).startswith(line)


def test_flags_without_effect_are_noted() -> None:
    rope = RopeSettings(rope_scaling="none", yarn_orig_ctx=256, yarn_attn_factor=2)
    notes = load_model(default_model(), rope=rope).notes
    assert notes[-2:] == (
        "--yarn-orig-ctx has no effect: RoPE scaling is none",
        "--yarn-attn-factor has no effect: RoPE scaling is none",
    )


# -- an engine


def rewritten(source: Path, target: Path, changes: dict[str, Value | None]) -> Path:
    """A model with other metadata and the same weights."""
    edited_model(source, target, changes)
    old, new = open_gguf(source), open_gguf(target)
    with target.open("r+b") as out:
        for name, tensor in new.tensors.items():
            out.seek(tensor.offset)
            out.write(old.data(name).tobytes())
    return target


ENGINE_CASES: dict[str, tuple[dict[str, Any], dict[str, Value | None]]] = {
    "base": (
        {"rope": RopeSettings(rope_freq_base=500.0)},
        {A + "rope.freq_base": 500.0},
    ),
    "scale and kind": (
        {"rope": RopeSettings(rope_scaling="linear", rope_scale=3)},
        {A + "rope.scaling.type": "linear", A + "rope.scaling.factor": 3.0},
    ),
    "yarn": (
        {
            "rope": RopeSettings(
                yarn_orig_ctx=64, yarn_ext_factor=0.5, yarn_attn_factor=1.25, yarn_beta_fast=8
            )
        },
        {
            A + "rope.scaling.original_context_length": 64,
            A + "rope.scaling.yarn_ext_factor": 0.5,
            A + "rope.scaling.yarn_attn_factor": 1.25,
            A + "rope.scaling.yarn_beta_fast": 8.0,
        },
    ),
    "override": (
        {"overrides": (Override(A + "attention.layer_norm_rms_epsilon", "float", 0.5),)},
        {A + "attention.layer_norm_rms_epsilon": 0.5},
    ),
}


@pytest.mark.parametrize("name", ENGINE_CASES)
def test_logits_are_those_of_a_file_with_that_metadata(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    flags, changes = ENGINE_CASES[name]
    source = tiny_model("tiny-odd")
    plain = all_logits(make_engine(source), TOKENS).copy()
    with_flags = all_logits(make_engine(source, **flags), TOKENS).copy()
    fresh = all_logits(make_engine(rewritten(source, tmp_path / "m.gguf", changes)), TOKENS)
    np.testing.assert_array_equal(with_flags, fresh)
    assert np.abs(with_flags[-1] - plain[-1]).max() > 1e-3 * np.abs(plain[-1]).max()


def test_a_session_of_other_metadata_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    path, source = tmp_path / "s", tiny_model("tiny-odd")
    scaled: dict[str, Any] = {"rope": RopeSettings(rope_freq_base=500.0)}
    engine = make_engine(source, **scaled)
    engine.eval(TOKENS, range(len(TOKENS)))
    save_session(path, engine, TOKENS)
    assert load_session(path, make_engine(source, **scaled)) == TOKENS
    same: dict[str, Any] = {"overrides": (Override(A + "rope.freq_base", "float", 500.0),)}
    assert load_session(path, make_engine(source, **same)) == TOKENS
    with pytest.raises(SessionError, match=r"belongs to metadata .*freq_base=float:500.0, not unc"):
        load_session(path, make_engine(source))
