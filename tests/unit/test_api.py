"""The Python API: the command line's engine, its answers, its manners towards a program."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlacli
from mlacli import Cancelled, Model, api, api_call, load
from mlacli.errors import MlaError, ModelError, SessionError, UsageError
from mlacli.keywords import LoadSettings, SamplingOptions
from mlacli.sampling_settings import SamplingSettings
from mlacli.session import run_prompt
from mlacli.settings import Request, RunSettings
from tests import reference
from tests.conftest import TinyModel
from tests.engines import oracle

QUESTION = "What does json.dumps do?"
ANSWER = "Serialize ``obj`` to a JSON formatted ``s``."
CHAT = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def shared() -> Iterator[Model]:
    with load(n_threads=2) as model:
        yield model


@pytest.fixture
def model(shared: Model) -> Model:
    shared.clear()
    return shared


@pytest.fixture(scope="module")
def long_prompt(shared: Model) -> list[int]:
    """Tokens that take about a second."""
    return (shared.tokenize(Path(threading.__file__).read_text()))[:2000]


# -- importing ------------------------------------------------------------------------------------


def test_importing_the_package_is_cheap() -> None:
    code = "import mlacli, sys; print({'numpy', 'llvmlite', 'mlacli.api'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr


def test_what_is_exported() -> None:
    assert set(mlacli.__all__) <= set(dir(mlacli))
    assert all(getattr(mlacli, name) is not None for name in mlacli.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        mlacli.lod  # type: ignore[attr-defined]  # noqa: B018


def test_keywords_are_the_fields_of_the_settings() -> None:
    """A setting that the command line has got is one of the API, too."""
    names = {f.name for f in fields(RunSettings)} - {"model", "verbose", "rope"}
    assert set(LoadSettings.__annotations__) == names
    names = {f.name for f in fields(SamplingSettings)} - {"sampling_seq"}
    assert set(SamplingOptions.__annotations__) == names


# -- answers --------------------------------------------------------------------------------------


def cli_answer(**sampling: Any) -> str:
    """What `mlacli run` writes."""
    found: dict[str, Any] = {}

    class Kept:
        def prompt(self, text: str) -> None: ...
        def piece(self, token: int | None, text: str) -> None: ...
        def end(self, result: Mapping[str, Any]) -> None:
            found.update(result)

    request = Request(QUESTION, n_predict=24, sampling=SamplingSettings(**sampling))
    run_prompt(RunSettings(n_threads=2), request, output=Kept(), note=lambda _: None)
    return str(found["text"])


@pytest.mark.parametrize("sampling", [{"temp": 0.0}, {"temp": 1.2, "seed": 42}], ids=str)
def test_answers_are_those_of_the_command_line(model: Model, sampling: dict[str, Any]) -> None:
    answer = model.generate(QUESTION, max_tokens=24, **sampling)
    assert answer.text == str(answer) == cli_answer(**sampling)
    assert model.detokenize(answer.tokens) == answer.text
    assert answer.n_prompt == answer.timings.n_prompt + answer.timings.n_reused
    if "seed" in sampling:
        assert answer.seed == 42
    else:
        assert (answer.text, answer.finish) == (ANSWER, "end")


def test_a_stream_is_the_answer_in_pieces(model: Model) -> None:
    stream = model.stream(QUESTION, temp=0)
    assert stream.answer.finish is None and model.tokens == []
    pieces = list(stream)
    assert "".join(pieces) == stream.answer.text == ANSWER
    assert len(pieces) > 5 and all(pieces)
    assert list(stream) == [] and stream.answer.finish == "end"


def test_a_stream_left_early_leaves_the_model_usable(model: Model) -> None:
    for piece in model.stream(QUESTION, temp=0):
        assert ANSWER.startswith(piece)
        break
    stream = model.stream(QUESTION, temp=0)
    first = next(stream)
    stream.close()
    assert list(stream) == []
    assert (stream.answer.text, stream.answer.finish) == (first, "cancelled")
    again = model.generate(QUESTION, temp=0)
    assert again.text == ANSWER
    assert again.timings.n_reused == again.n_prompt - 1 and again.timings.n_prompt == 1


def test_a_stream_does_not_go_on_in_another_ones_cache(model: Model) -> None:
    first, second = model.stream(QUESTION, temp=0), model.stream("What is math.sqrt?", temp=0)
    next(first)
    begun = next(second)
    with pytest.raises(UsageError, match="used for something else"):
        next(first)
    rest = "".join(second)
    assert begun + rest == model.generate("What is math.sqrt?", temp=0).text


def test_a_conversation_is_evaluated_once(model: Model) -> None:
    answer = model.generate(messages=CHAT, temp=0)
    assert answer.text == ANSWER
    more = [*CHAT, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": "And?"}]
    after = model.generate(messages=more, temp=0, max_tokens=2)
    assert after.timings.n_reused >= answer.n_prompt
    assert after.timings.n_prompt < after.n_prompt / 2
    system = model.generate(QUESTION, system="Be brief.", temp=0, max_tokens=2)
    both = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert model.generate(messages=both, temp=0, max_tokens=2).text == system.text
    assert system.n_prompt > answer.n_prompt


def test_control_tokens_in_messages_stay_text(model: Model) -> None:
    smuggled = CHAT[0]["content"] + "<｜Assistant｜>"
    plain = model.generate(QUESTION, max_tokens=0).n_prompt
    assert model.generate(smuggled, max_tokens=0).n_prompt > plain + 3
    assert len(model.tokenize("<｜Assistant｜>", special=True)) == 1


@pytest.mark.parametrize(
    ("asked", "text", "finish"),
    [
        ({"max_tokens": 0}, "", "length"),
        ({"max_tokens": 1}, "S", "length"),
        ({"stop": "JSON"}, ANSWER[: ANSWER.index("JSON")], "stop"),
        ({"stop": ["nowhere", "ize ``o"]}, "Serial", "stop"),
        ({"stop": ANSWER[-3:] + "never"}, ANSWER, "end"),
        ({"regex": "[0-9]{3}"}, None, "grammar"),
    ],
    ids=str,
)
def test_what_ends_an_answer(
    model: Model, asked: dict[str, Any], text: str | None, finish: str
) -> None:
    answer = model.generate(QUESTION, temp=0, **asked)
    assert answer.finish == finish
    assert "".join(model.stream(QUESTION, temp=0, **asked)) == answer.text
    if text is None:
        assert re.fullmatch("[0-9]{3}", answer.text)
    else:
        assert answer.text == text


def test_a_full_context_ends_an_answer_or_is_shifted() -> None:
    asked: dict[str, Any] = {"raw": True, "temp": 0, "ignore_eos": True}
    with load(n_ctx=256, n_threads=2) as model:
        answer = model.generate("import json", **asked)
        assert answer.finish == "context" and len(model.tokens) == model.n_ctx == 256
        shifted = model.generate("import json", context_shift=True, max_tokens=280, **asked)
        assert shifted.finish == "length" and shifted.timings.n_shifts == 1
        assert shifted.tokens[: len(answer.tokens)] == answer.tokens


def test_answers_keep_to_a_schema(model: Model) -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"n": {"type": "integer"}}}
    schema |= {"required": ["n"], "additionalProperties": False}
    for given in (schema, json.dumps(schema)):
        answer = model.generate(QUESTION, temp=0, json_schema=given, max_tokens=60, seed=1)
        assert answer.finish != "end" or isinstance(json.loads(answer.text)["n"], int)
        assert answer.text.lstrip().startswith("{")
    found = model.generate(QUESTION, temp=0, grammar='root ::= "yes" | "no"').text
    assert found in ("yes", "no")


# -- logits and tokens ----------------------------------------------------------------------------


def test_logits_leave_an_answers_timings_alone(model: Model) -> None:
    answer = model.generate(QUESTION, temp=0, max_tokens=2)
    before = replace(answer.timings)
    model.logits(model.tokenize("another text"))
    assert answer.timings == before


def test_a_cancel_while_nothing_runs_is_no_concern_of_the_next_call(model: Model) -> None:
    model.cancel()
    assert model.generate(QUESTION, temp=0, max_tokens=1).finish == "length"


def test_a_cancel_before_the_first_step_counts(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenized = api_call.tokens_of

    def cancelled(*given: Any) -> list[int]:
        model.cancel()
        return tokenized(*given)

    monkeypatch.setattr(api, "tokens_of", cancelled)
    answer = model.generate(QUESTION, temp=0)
    assert answer.finish == "cancelled" and answer.text == ""


@pytest.mark.parametrize("n_out_max", [None, 3])
def test_logits_are_those_of_the_oracle(tiny_model: TinyModel, n_out_max: int | None) -> None:
    path = tiny_model("tiny-odd", "F32")
    tokens = np.random.default_rng(3).integers(0, 4096, 40)
    expected = oracle(path).run(tokens.tolist(), range(40))
    clear = expected.smallest_margin() > 1e-5
    with load(str(path), n_threads=2, type_k="f32", n_out_max=n_out_max) as model:
        every = model.logits(tokens, every=True)
        assert every.shape == (40, model.n_vocab) and every.dtype == np.float32
        assert reference.per_token_nmse(every, expected.logits)[clear].max() <= 1e-10
        some = model.logits(tokens, every=True, first=30)
        assert reference.nmse(some, every[30:]) <= 1e-10
        assert model.tokens == tokens.tolist()
        kept = every.copy()
        last = model.logits(tokens[:20])
        assert last.shape == (model.n_vocab,) and reference.nmse(last, every[19]) <= 1e-10
        assert np.array_equal(every, kept) and model.tokens == tokens[:20].tolist()


def test_tokens_and_back(model: Model) -> None:
    text = "def naïve(x):\n    return '日本' + x  # \udcff"
    tokens = model.tokenize(text)
    assert model.detokenize(tokens) == text.replace("\udcff", "\ufffd")
    assert model.bos is None and model.tokenize(text, add_bos=False) == tokens
    (end,) = model.tokenize("<｜end▁of▁sentence｜>", special=True)
    assert model.detokenize([end]) == "" != model.detokenize([end], special=True)
    with pytest.raises(ModelError, match="token id 4096 is outside"):
        model.detokenize([model.n_vocab])


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"n_cxt": 8}, r"n_cxt: no such setting; did you mean n_ctx\?"),
        ({"verbose": True}, r"verbose: no such setting"),
        ({"n_ctx": "8192"}, r"n_ctx: '8192' is not a whole number"),
        ({"n_ctx": 1.5}, r"n_ctx: '1.5' is not a whole number"),
        ({"n_ctx": True}, r"n_ctx: 'True' is not a whole number"),
        ({"n_ctx": -1}, r"n_ctx: -1 is out of range \(0 to 2147483647\)"),
        ({"mla": 4}, r"mla: 4 is out of range \(0 to 3\)"),
        ({"flash_attn": "on"}, r"flash_attn: 'on' is not True or False"),
        ({"type_k": "q9"}, r"type_k: 'q9' is not one of f32, f16"),
        ({"type_k": None}, r"type_k: 'None' is not a text"),
        ({"ser": (1,)}, r"ser: \(1,\) is not a pair such as"),
        ({"ser": (0, 0.5)}, r"ser: .*0 is out of range"),
        ({"n_out_max": 0}, r"n_out_max: 0 is out of range \(1 to 512\)"),
        ({"chat_template": "x"}, r"chat_template: 'x' is neither a Jinja text nor"),
        ({"kernels": {"flash_absorbd": None}}, r"did you mean flash_absorbed\?"),
        ({"path": "/nonexistent"}, r"/nonexistent"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(given: dict[str, Any], line: str) -> None:
    with pytest.raises(MlaError, match=line):
        load(**given)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, "prompt and messages: give one of them"),
        ({"prompt": "a", "messages": CHAT}, "prompt and messages: give one of them"),
        ({"prompt": ""}, "prompt: '' is not a text"),
        ({"prompt": 5}, "prompt: '5' is not a text"),
        ({"prompt": "word " * 3000}, r"prompt: \d+ tokens do not fit n_ctx 2048 \(limit 2047\)"),
        ({"messages": []}, "messages: there are none"),
        ({"messages": ["x"]}, "messages: number 0 is not a dict"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages: number 0 is not a dict"),
        ({"messages": CHAT, "raw": True}, "messages: need the chat template"),
        ({"prompt": "a", "temp": -1}, r"temp: -1.0 is out of range \(0 to 1000\)"),
        ({"prompt": "a", "temp": float("nan")}, "temp: nan is out of range"),
        ({"prompt": "a", "top_k": 1.5}, "top_k: '1.5' is not a whole number"),
        ({"prompt": "a", "temperature": 1}, r"temperature: no such setting"),
        ({"prompt": "a", "samplers": "top_k"}, "samplers: 'top_k' is not a list"),
        ({"prompt": "a", "samplers": ["topk"]}, "samplers: 'topk' is not one of"),
        ({"prompt": "a", "logit_bias": {9999: 1.0}}, "logit_bias: token 9999 is outside"),
        ({"prompt": "a", "logit_bias": {1: float("inf")}}, "logit_bias: .*is not a token and a"),
        ({"prompt": "a", "max_tokens": -1}, r"max_tokens: -1 is out of range"),
        ({"prompt": "a", "stop": [""]}, "stop: '' is not a text of one character"),
        ({"prompt": "a", "regex": "["}, "^regex: "),
        ({"prompt": "a", "regex": "a", "grammar": "b"}, "grammar and regex: give one"),
        ({"prompt": "a", "json_schema": "{"}, "^json_schema: "),
        ({"prompt": "a", "json_schema": {"a": {1}}}, "^json_schema: is not JSON"),
        ({"prompt": "a", "system": 5}, "system: '5' is not a text"),
        ({"prompt": "a", "raw": 1}, "raw: '1' is not True or False"),
        ({"prompt": "a", "keep": "all"}, "keep: 'all' is not a whole number"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_requests_that_cannot_work(model: Model, given: dict[str, Any], line: str) -> None:
    """Raised by stream itself, not by the first piece."""
    with pytest.raises(UsageError, match=line):
        model.stream(**given)


@pytest.mark.parametrize(
    ("tokens", "line"),
    [
        ([], "tokens: there are no tokens"),
        ([1, 4096], r"tokens: 4096 is outside the vocabulary \(0 to 4095\)"),
        ([-1], "tokens: -1 is outside"),
        ([1.5], "tokens: these are not whole numbers"),
        ([[1, 2]], "tokens: these are not whole numbers"),
        ([1] * 2049, r"tokens: 2049 tokens do not fit n_ctx 2048 \(limit 2048\)"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_tokens_that_cannot_be_evaluated(model: Model, tokens: list[int], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        model.logits(tokens)


# -- manners --------------------------------------------------------------------------------------


def test_nothing_is_printed(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "mlacli"):
        with load(n_threads=2, n_ctx=256, type_v="q8_0") as model:
            answer = model.generate(QUESTION, raw=True, system="x", keep=3, max_tokens=1)
            assert "n_ctx         = 256" in model.report()
    assert capfd.readouterr() == ("", "")
    assert any("-ctv q8_0 has no effect" in line for line in model.notes)
    assert any("--keep has no effect" in line for line in answer.notes)
    assert {*model.notes, *answer.notes} <= {record.message for record in caplog.records}


def test_two_models_at_once(model: Model) -> None:
    with load(n_threads=1, mla=0, type_k="q8_0") as other:
        streams = [model.stream(QUESTION, temp=0), other.stream(QUESTION, temp=0)]
        texts = ["", ""]
        for pair in zip(*streams, strict=True):
            texts = [a + b for a, b in zip(texts, pair, strict=True)]
    assert texts == [ANSWER, ANSWER]


def test_one_call_at_a_time(model: Model, long_prompt: list[int]) -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(model.logits(long_prompt)))
    thread.start()
    refused = 0
    while thread.is_alive():
        try:
            model.tokenize("does not wait")
            model.clear()
        except UsageError as problem:
            assert "busy" in str(problem)
            refused += 1
        time.sleep(0.01)
    assert refused > 2 and len(found) == 1
    assert np.isfinite(found[0]).all()


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Ctrl-C means what it means in a program; sends it 100 ms from now, and says when."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.1, send)
    timer.start()
    try:
        yield sent
    finally:
        timer.join()
        signal.signal(signal.SIGINT, old)


def test_control_c_ends_a_step_and_leaves_the_model_usable(
    model: Model, long_prompt: list[int], interrupt: list[float]
) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    try:
        with pytest.raises(KeyboardInterrupt):
            for _ in range(20):
                model.clear()
                model.logits(long_prompt)
        assert time.monotonic() - interrupt[0] < 0.25
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert os.read(reader, 1) == bytes([signal.SIGINT])  # who listened before is told, too
    finally:
        assert signal.set_wakeup_fd(-1) == writer
        os.close(reader)
        os.close(writer)
    assert model.generate(QUESTION, temp=0).text == ANSWER


def test_control_c_between_pieces_is_the_programs_own(model: Model, interrupt: list[float]) -> None:
    stream, pieces = model.stream(QUESTION, temp=0), []
    with pytest.raises(KeyboardInterrupt):
        pieces.append(next(stream))
        time.sleep(5)
    assert "".join([*pieces, *stream]) == ANSWER  # nothing of it was lost


def test_another_handler_of_control_c_is_left_alone(model: Model, interrupt: list[float]) -> None:
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    while not came:
        assert model.generate(QUESTION, temp=0).text == ANSWER
    assert came == [signal.SIGINT]


def test_cancel_from_another_thread(model: Model, long_prompt: list[int]) -> None:
    model.cancel()  # nothing is under way: nothing happens
    assert model.generate(QUESTION, temp=0, max_tokens=1).finish == "length"
    model.clear()
    timer = threading.Timer(0.1, model.cancel)
    timer.start()
    with pytest.raises(Cancelled):
        model.logits(long_prompt)
    timer.join()
    stream = model.stream(QUESTION, temp=0)
    first = next(stream)
    model.cancel()
    assert list(stream) == [] and stream.answer.finish == "cancelled"
    assert stream.answer.text == first
    timer = threading.Timer(0.2, model.cancel)
    timer.start()
    answer = model.generate(QUESTION, ignore_eos=True, seed=1)
    assert answer.finish in ("cancelled", "context") and answer.text
    timer.join()
    assert model.generate(QUESTION, temp=0).text == ANSWER


def test_a_call_in_a_thread_touches_no_signal(model: Model) -> None:
    before = signal.getsignal(signal.SIGINT)
    found: list[str] = []
    run = threading.Thread(target=lambda: found.append(model.generate(QUESTION, temp=0).text))
    run.start()
    run.join()
    assert found == [ANSWER] and signal.getsignal(signal.SIGINT) is before


def test_a_closed_model_gives_everything_back() -> None:
    threads = threading.active_count()
    model = load(n_threads=2)
    assert model.generate(QUESTION, temp=0, max_tokens=1).finish == "length"
    assert model._session is not None and model._session.template is not None
    engine, child = weakref.ref(model._session.engine), model._session.template._process
    model.close()
    model.close()
    gc.collect()
    assert engine() is None and threading.active_count() == threads
    assert child is not None and child.poll() is not None
    assert "closed" in repr(model)
    for call in (model.clear, model.report, lambda: model.tokenize("x")):
        with pytest.raises(UsageError, match="the model is closed"):
            call()


def test_a_forgotten_model_gives_everything_back() -> None:
    threads = threading.active_count()
    model = load(n_threads=2)
    model.generate(QUESTION, max_tokens=1)
    del model
    gc.collect()
    assert threading.active_count() == threads


# -- sessions -------------------------------------------------------------------------------------


def test_a_saved_session_goes_on(model: Model, tmp_path: Path) -> None:
    path, tokens = tmp_path / "s", model.tokenize(QUESTION * 3)
    with pytest.raises(UsageError, match="save_session: nothing has been evaluated"):
        model.save_session(path)
    model.logits(tokens)
    assert model.save_session(path) == path.stat().st_size
    expected = model.logits([*tokens, 7])
    model.clear()
    assert model.load_session(str(path)) == len(tokens) and model.tokens == tokens
    assert np.array_equal(model.logits([*tokens, 7]), expected)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SessionError, match=r"^load_session: .*bytes behind its header"):
        model.load_session(path)
    assert model.tokens == []
    with pytest.raises(SessionError, match="there is no such file"):
        model.load_session(tmp_path / "none")
    assert model.generate(QUESTION, temp=0).text == ANSWER
