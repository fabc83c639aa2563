"""Each filter and penalty against its paper's formula, written another way."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlacli.text import filters, mirostat, penalties
from mlacli.text.filters import Logits

# quarters, so that there are many ties
LOGITS = hnp.arrays(
    np.float64, st.integers(1, 40), elements=st.integers(-40, 40).map(lambda n: n / 4)
)
P = st.floats(0.0, 1.0)


def probabilities(logits: Logits) -> list[float]:
    weights = [math.exp(float(x) - float(max(logits))) for x in logits]
    return [weight / math.fsum(weights) for weight in weights]


def ranked(logits: Logits) -> list[int]:
    """Ids from the most to the least probable, of equals the smallest id first."""
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


def kept(logits: Logits) -> set[int]:
    return {i for i, x in enumerate(logits) if x > -np.inf}


def assert_keeps(result: Logits, logits: Logits, ids: set[int]) -> None:
    expected = [x if i in ids else -np.inf for i, x in enumerate(logits)]
    np.testing.assert_array_equal(result, expected)


@given(logits=LOGITS, k=st.integers(0, 45))
def test_top_k(logits: Logits, k: int) -> None:
    ids = ranked(logits)[: k or None]
    assert_keeps(filters.top_k(logits, k), logits, set(ids))
    assert filters.top_k_ids(logits, k).tolist() == sorted(ids)


@given(logits=LOGITS, p=P)
def test_top_p(logits: Logits, p: float) -> None:
    weights = probabilities(logits)
    order = ranked(logits)
    sums = [math.fsum(weights[i] for i in order[: n + 1]) for n in range(len(order))]
    if any(abs(total - p) < 1e-12 for total in sums):
        return  # on the edge, where the rounding of the sum decides
    count = next((n + 1 for n, total in enumerate(sums) if total >= p), len(order))
    assert_keeps(filters.top_p(logits, p), logits, set(order[:count]))


def test_top_p_over_a_flat_vocabulary() -> None:
    logits = np.zeros(5000)
    assert len(kept(filters.top_p(logits, 0.5))) in (2500, 2501)
    assert kept(filters.top_p(logits, 0.01)) in (set(range(50)), set(range(51)))
    assert filters.top_p(logits, 1.0) is logits


@given(logits=LOGITS, p=P)
def test_min_p(logits: Logits, p: float) -> None:
    weights = probabilities(logits)
    if any(math.isclose(weight, p * max(weights), rel_tol=1e-9) for weight in weights if p < 1):
        return
    ids = {i for i, weight in enumerate(weights) if weight >= p * max(weights)}
    assert_keeps(filters.min_p(logits, p), logits, ids)


@given(logits=LOGITS, temp=st.floats(0.05, 20))
def test_temperature(logits: Logits, temp: float) -> None:
    weights = [p ** (1 / temp) for p in probabilities(logits)]
    expected = [weight / math.fsum(weights) for weight in weights]
    result = filters.softmax(filters.temperature(logits, temp))
    np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-12)


@given(logits=LOGITS)
def test_greedy_and_softmax(logits: Logits) -> None:
    assert filters.greedy(logits) == ranked(logits)[0]
    np.testing.assert_allclose(filters.softmax(logits), probabilities(logits), rtol=1e-12)


@given(logits=LOGITS, p=P, k=st.integers(1, 40), fraction=st.floats(0, 1, exclude_max=True))
def test_a_draw_never_takes_what_was_removed(
    logits: Logits, p: float, k: int, fraction: float
) -> None:
    left = filters.min_p(filters.top_p(filters.top_k(logits, k), p), p / 2)
    assert filters.draw(left, fraction) in kept(left)
    assert ranked(logits)[0] in kept(left)


def test_a_draw_is_the_inverse_of_the_cumulative_probabilities() -> None:
    logits = np.log([0.5, 1e-300, 0.25, 0.25])
    assert [filters.draw(logits, f) for f in (0.0, 0.49, 0.51, 0.74, 0.76, 1 - 2**-53)] == [
        0,
        0,
        2,
        2,
        3,
        3,
    ]
    removed = np.array([-np.inf, 0.0, -np.inf])
    assert filters.draw(removed, 0.0) == filters.draw(removed, 1 - 2**-53) == 1


@given(logits=LOGITS, n=st.floats(-1, 4))
def test_top_n_sigma(logits: Logits, n: float) -> None:
    mean = math.fsum(logits) / len(logits)
    sigma = math.sqrt(math.fsum((x - mean) ** 2 for x in logits) / len(logits))
    least = max(logits) - n * sigma
    assume(n <= 0 or not any(math.isclose(x, least, abs_tol=1e-9) for x in logits))
    ids = {i for i, x in enumerate(logits) if n <= 0 or x >= least}
    assert_keeps(filters.top_n_sigma(logits, n), logits, ids)
    hidden = np.append(logits, -np.inf)
    assert kept(filters.top_n_sigma(hidden, max(n, 0.5))) == kept(
        filters.top_n_sigma(logits, max(n, 0.5))
    )


@given(logits=LOGITS, p=P)
def test_typical_p(logits: Logits, p: float) -> None:
    weights = probabilities(logits)
    entropy = -math.fsum(w * math.log(w) for w in weights)
    distance = [abs(-math.log(w) - entropy) for w in weights]
    order = sorted(range(len(logits)), key=lambda i: distance[i])
    gaps = [distance[b] - distance[a] for a, b in itertools.pairwise(order)]
    assume(all(gap > 1e-9 for gap in gaps))  # else rounding orders them
    sums = [math.fsum(weights[i] for i in order[: n + 1]) for n in range(len(order))]
    assume(not any(abs(total - p) < 1e-12 for total in sums))
    count = next((n + 1 for n, total in enumerate(sums) if total > p), len(order))
    expected = set(range(len(logits))) if p >= 1 else set(order[:count])
    assert_keeps(filters.typical_p(logits, p), logits, expected)


def test_typical_p_may_drop_the_likeliest() -> None:
    logits = np.log([0.5] + [0.5 / 64] * 64)
    assert 0 not in kept(filters.typical_p(logits, 0.3))


@given(logits=LOGITS, z=P)
def test_tail_free(logits: Logits, z: float) -> None:
    order = ranked(logits)
    sorted_weights = [probabilities(logits)[i] for i in order]
    slopes = [a - b for a, b in itertools.pairwise(sorted_weights)]
    bends = [abs(a - b) for a, b in itertools.pairwise(slopes)]
    count = len(order)
    if z < 1 and len(order) > 2:
        total = math.fsum(bends)
        assume(abs(total - 1e-6) > 1e-9)
        shares = [b / total if total > 1e-6 else 1 / len(bends) for b in bends]
        sums = [math.fsum(shares[: n + 1]) for n in range(len(shares))]
        assume(not any(abs(s - z) < 1e-9 for s in sums))
        count = next((n for n, s in enumerate(sums) if s > z and n >= 1), len(order))
    assert_keeps(filters.tail_free(logits, z), logits, set(order[:count]))


@given(logits=LOGITS, threshold=st.floats(0.01, 0.5))
def test_exclude_top(logits: Logits, threshold: float) -> None:
    weights = probabilities(logits)
    assume(not any(math.isclose(w, threshold, rel_tol=1e-9) for w in weights))
    above = [i for i in ranked(logits) if weights[i] >= threshold]
    removed = set(above[:-1])
    ids = set(range(len(logits))) - removed
    assert_keeps(filters.exclude_top(logits, threshold), logits, ids)


@given(logits=LOGITS, temp=st.floats(0.1, 2), spread=st.floats(0.01, 2), e=st.floats(0.2, 3))
def test_dynamic_temperature(logits: Logits, temp: float, spread: float, e: float) -> None:
    weights = probabilities(logits)
    entropy = -math.fsum(w * math.log(w) for w in weights)
    result = filters.dynamic_temperature(logits, temp, spread, e)
    if len(logits) == 1:
        assert result is logits
        return
    low, high = max(0.0, temp - spread), temp + spread
    flat = min(1.0, max(0.0, entropy / math.log(len(logits))))
    t = low + (high - low) * flat**e
    assume(t > 1e-6)
    np.testing.assert_allclose(result, logits / t, rtol=1e-6)


def test_temperature_0_leaves_the_greatest() -> None:
    assert kept(filters.temperature(np.array([1.0, 3.0, 3.0, 2.0]), 0.0)) == {1}


# --- penalties ---


@given(
    logits=LOGITS,
    recent=st.lists(st.integers(0, 60), max_size=20),
    repeat=st.floats(0.25, 4),
    frequency=st.floats(-2, 2),
    presence=st.floats(-2, 2),
)
def test_penalise(
    logits: Logits, recent: list[int], repeat: float, frequency: float, presence: float
) -> None:
    recent = [token for token in recent if token < len(logits)]
    before = logits.copy()
    tokens, counts = np.unique(np.array(recent, np.intp), return_counts=True)
    result = penalties.penalise(
        logits, tokens, counts, repeat=repeat, frequency=frequency, presence=presence
    )
    expected = [
        x
        if i not in recent
        else (x / repeat if x > 0 else x * repeat) - recent.count(i) * frequency - presence
        for i, x in enumerate(logits)
    ]
    np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(logits, before)


@given(history=st.lists(st.integers(0, 3), max_size=40), longest=st.integers(1, 45))
def test_repeats(history: list[int], longest: int) -> None:
    expected: dict[int, int] = {}
    for end in range(len(history) - 1):
        n = 0
        while n <= end and n < longest and history[end - n] == history[len(history) - 1 - n]:
            n += 1
        if n:
            token = history[end + 1]
            expected[token] = max(n, expected.get(token, 0))
    assert penalties.repeats(np.array(history, np.int64), longest) == expected


def test_dry_penalties_grow_by_the_base() -> None:
    assert penalties.dry_penalties([2, 3, 5], 0.8, 1.75, 2) == pytest.approx(
        [0.8, 0.8 * 1.75, 0.8 * 1.75**3]
    )
    assert penalties.dry_penalties([10_000], 1.0, 2.0, 2) == [2.0**127]  # an f32 holds it
    assert penalties.dry_penalties([10_000], 0.5, 1.0, 2) == [0.5]


@given(words=st.lists(st.sampled_from([b"a", b"b:", b"x\n", b"\n", b" c", b":d"]), max_size=300))
def test_tokens_since(words: list[bytes]) -> None:
    breakers = [b"\n", b":", b"a b"]
    text = b"".join(words)
    end = max((text.rfind(b) + len(b) for b in breakers if b in text), default=0)
    starts = [len(b"".join(words[:i])) for i in range(len(words))]
    assert penalties.tokens_since(breakers, words) == sum(start >= end for start in starts)


def test_tokens_since_finds_a_breaker_of_two_tokens() -> None:
    assert penalties.tokens_since([b"END."], [b"x", b" EN", b"D.", b"y", b"z"]) == 2
    assert penalties.tokens_since([], [b"x"] * 1000) == 1000


# --- mirostat ---


def test_mirostat_1_keeps_as_many_as_its_formula() -> None:
    for exponent, mu in ((1.1, 4.0), (1.4, 6.0), (0.8, 5.0)):
        n = 2000
        weights = [rank**-exponent for rank in range(1, n + 1)]
        logits = np.log(weights)
        e = exponent - 1  # the fit of an exact power law is exact
        k = ((e * 2**mu) / (1 - n**-e)) ** (1 / exponent)
        assert kept(mirostat.cut_by_rank(logits, mu, n)) == set(range(max(1, int(k))))


@given(logits=LOGITS, mu=st.floats(-1, 12))
def test_mirostat_2_keeps_what_surprises_less(logits: Logits, mu: float) -> None:
    surprise = [-math.log2(w) for w in probabilities(logits)]
    assume(not any(math.isclose(s, mu, abs_tol=1e-9) for s in surprise))
    ids = {i for i, s in enumerate(surprise) if s <= mu} | {ranked(logits)[0]}
    assert_keeps(mirostat.cut_by_surprise(logits, mu), logits, ids)


@given(logits=LOGITS, mu=st.floats(0, 10))
def test_mirostat_moves_against_the_error(logits: Logits, mu: float) -> None:
    surprise = -math.log2(probabilities(logits)[0])
    found = mirostat.moved(mu, logits, 0, target=3.0, rate=0.1)
    assert found == pytest.approx(mu - 0.1 * (surprise - 3.0), abs=1e-9)
    assert kept(mirostat.cut_by_rank(logits, mu, 50))
