"""Small byte-level vocabularies, trained on the spot."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from mlacli.text.pre_tokenizer import PATTERNS
from mlacli.text.tokenizer import TokenizerData
from mlacli.text.vocabulary import CONTROL, NORMAL, USER_DEFINED

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
CONTROLS = (BOS, EOS, "<｜User｜>", "<｜Assistant｜>", "<｜User｜>x", "<｜▁pad▁｜>")
USER_TOKENS = ("<think>", "</think>", "§§")
MIXED = (
    "Größe, façade, naïve; Привет мир! 你好，世界。ひらがな カタカナ 12 345 6789 ½ ٣٤ "
    "😀👩\u200d👩\u200d👧 e\u0301\u00a0\u3000x"
)


def split_by(patterns: tuple[str, ...]) -> pre_tokenizers.Sequence:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    )


@cache
def vocabulary(pre: str) -> TokenizerData:
    """About 700 tokens: all bytes, merges, six control and three user-defined tokens."""
    library = Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split_by(PATTERNS[pre]), to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator([Path(__file__).read_text("utf-8"), *[MIXED] * 4], trainer)
    model = json.loads(library.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    types = [NORMAL] * len(tokens) + [CONTROL] * len(CONTROLS) + [USER_DEFINED] * len(USER_TOKENS)
    return TokenizerData(
        model="gpt2",
        pre=pre,
        tokens=[*tokens, *CONTROLS, *USER_TOKENS],
        token_types=types,
        merges=[" ".join(pair) for pair in model["merges"]],
        bos=len(tokens),
        eos=len(tokens) + 1,
        add_bos=True,
    )


def without_bytes(data: TokenizerData, gone: list[int]) -> TokenizerData:
    """`data` in which the stand-ins of the bytes `gone` are tokens for these letters themselves."""
    letters = {chr(byte) for byte in gone}
    types = [
        USER_DEFINED if token in letters else kind
        for token, kind in zip(data.tokens, data.token_types, strict=True)
    ]
    left = [merge for merge in data.merges if not letters & set(merge)]
    return replace(data, token_types=types, merges=left)
