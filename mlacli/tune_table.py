"""What came of tuning: as a table, and as keys of the configuration file."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from mlacli.tune import NEVER, Trial, Tuned

HEADS = ("flag", "value", "test", "t/s (spread)", "speed / default's (spread)", "")
KEYS = {"t": "threads", "ub": "ubatch-size", "mla-threshold": "mla-threshold"}
_OTHER_NAMES = {"threads-batch": "tb", "ubatch-size": "ub"}


def table_lines(found: Iterable[Tuned]) -> list[tuple[str, ...]]:
    """Rows below HEADS: medians over the rounds, with the least and the greatest."""
    lines: list[tuple[str, ...]] = []
    for tuned in found:
        for test, seconds in tuned.paths.items():
            path, _, name = test.partition(" ")
            lines.append((tuned.flag, path, name, _rate(seconds), "", ""))
        for trial in tuned.trials:
            marks = ["default"] * (trial.value == tuned.default)
            marks += ["chosen"] * (trial.value == tuned.chosen)
            remark = trial.error or ", ".join(marks)
            rate = "" if tuned.paths else _rate(trial.seconds)
            value = value_text(trial.value)
            lines.append((tuned.flag, value, tuned.test, rate, _gain(tuned, trial), remark))
    return lines


def value_text(value: int | None) -> str:
    """A value as it is shown."""
    return {None: "not set", NEVER: "never"}.get(value, str(value))


def _rate(seconds: Sequence[float]) -> str:
    return _spread([1 / s for s in seconds])


def _gain(tuned: Tuned, trial: Trial) -> str:
    return _spread(trial.gains(tuned.base) if tuned.base and trial is not tuned.base else [])


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.median(values):.2f} ({min(values):.2f} .. {max(values):.2f})"


def changes(
    found: Iterable[Tuned], own: Mapping[str, object], elsewhere: Iterable[str], default_t: int
) -> dict[str, int | None]:
    """Keys to set in the model's table, or with None to remove from it: a default is written only
    where it would not hold otherwise.

    `own` is that table as it is, `elsewhere` are keys that the file sets for all models.
    """
    decided = {tuned.name: tuned for tuned in found if tuned.is_decided}
    elsewhere = set(elsewhere)
    keys: dict[str, int | None] = {}
    for name, key in KEYS.items():
        if name in decided:
            tuned = decided[name]
            is_plain = tuned.chosen == tuned.default and key not in elsewhere
            keys[key] = None if is_plain else tuned.chosen
    if "tb" in decided or ("t" in decided and "threads-batch" not in own):
        chosen = decided["tb"].chosen if "tb" in decided else default_t
        threads = keys.get("threads", own.get("threads"))
        is_plain = chosen == default_t and elsewhere.isdisjoint(("threads", "threads-batch"))
        # without a value of its own it would follow -t
        keys["threads-batch"] = None if is_plain and threads is None else chosen
    return {_OTHER_NAMES[key]: None for key in keys if key in _OTHER_NAMES} | keys
