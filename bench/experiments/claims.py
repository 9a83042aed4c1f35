"""What the records say about a claim: held, not held, or not settled, by rules that the report prints.

A comparison of two models (`bootstrap.compare`) is *settled* only where at least `LEAST_SEEDS` seeds were trained and
two intervals lie on one side of zero: the bootstrap's over users, and Student's over the differences of the seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["held", "not held", "not settled"]

LEAST_SEEDS = 3
# The paper's gain in HR@10 over Mamba4Rec on ML-1M (arXiv 2505.04445, abstract).
PUBLISHED_GAIN = 0.032
# Something costs nothing if at most this share of the metric is lost, at the far end of the interval.
MARGIN = 0.05
# 97.5 % quantiles of Student's t distribution with 1, 2, ... degrees of freedom; the last one for more, too.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

RULES = f"""\
* A model is **better** (or **worse**) than another where at least {LEAST_SEEDS} seeds were trained and two 95 %
  intervals lie above (below) zero: that of the paired bootstrap over users, and Student's over the differences of the
  seeds. The first speaks of other users, the second of other seeds.
* The claim "A ranks better than B" is **held** on a data set where A is better, **not held** where A is worse, and
  **not settled** otherwise.
* The claim "A gains {PUBLISHED_GAIN:.1%} over B" is **held** where A is better and the interval of the relative
  difference reaches that gain, **not held** where at least {LEAST_SEEDS} seeds were trained and both intervals lie
  below it as a whole, **not settled** otherwise.
* The claim "A loses nothing against B" is **held** where at least {LEAST_SEEDS} seeds were trained and both intervals
  of the relative difference lie above -{MARGIN:.0%}, **not held** where A is worse, and **not settled** otherwise.
* The claim about noise has no interval: it is **held** (**not held**) where at least {LEAST_SEEDS} seeds were trained
  and it is true (false) under every noise in every seed, and **not settled** otherwise.
* A claim about the data alone (spectra) needs no seeds: it is **held** where the 95 % interval over users lies above
  what random order gives, **not held** where it lies below, and **not settled** otherwise.
* Over several data sets a claim is held if it is held on each that was run, not held if it is on each not held, else
  not settled.
* An interval in brackets is that over users, if nothing else is said. Of other hyper-parameters nothing here speaks,
  of longer training only what says so. No interval is corrected for the number of comparisons: of twenty that show
  nothing but chance, about one excludes zero."""


@dataclass(frozen=True)
class Finding:
    """A claim put to one data set."""

    dataset: str
    verdict: Verdict
    evidence: str


def over_seeds(found: Mapping[str, Any]) -> tuple[float, float]:
    """Student's 95 % interval of the mean difference, from the differences of at least two seeds."""
    values = list(found["by_seed"].values())
    mean, freedom = statistics.fmean(values), len(values) - 1
    reach = STUDENT[min(freedom, len(STUDENT)) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return mean - reach, mean + reach


def better(found: Mapping[str, Any]) -> int:
    """1 or -1 where a comparison is settled, else 0."""
    if len(found["by_seed"]) < LEAST_SEEDS:
        return 0
    low, high = over_seeds(found)
    if found["low"] > 0 and low > 0:
        return 1
    return -1 if found["high"] < 0 and high < 0 else 0


def _relative(found: Mapping[str, Any]) -> tuple[float, float] | None:
    """Both intervals as one, the wider ends of them, relative to theirs; None with too few seeds, or where theirs is 0
    or not to be had from a difference of 0."""
    if len(found["by_seed"]) < LEAST_SEEDS or not found["relative"]:
        return None
    low, high = (end * found["relative"] / found["difference"] for end in over_seeds(found))
    return min(low, found["relative_low"]), max(high, found["relative_high"])


def turned(found: Mapping[str, Any]) -> dict[str, Any]:
    """The comparison "ours less theirs" as "theirs less ours"."""

    def relative(value: float | None) -> float | None:
        return None if value is None or value == -1 else 1 / (1 + value) - 1

    return {
        **found,
        "difference": -found["difference"],
        "low": -found["high"],
        "high": -found["low"],
        "by_seed": {seed: -value for seed, value in found["by_seed"].items()},
        "relative": relative(found["relative"]),
        "relative_low": relative(found["relative_high"]),
        "relative_high": relative(found["relative_low"]),
    }


def ranks_better(found: Mapping[str, Any]) -> Verdict:
    """The verdict on "A ranks better than B"."""
    verdicts: tuple[Verdict, ...] = ("not settled", "held", "not held")
    return verdicts[better(found)]


def gains_as_published(found: Mapping[str, Any]) -> Verdict:
    """The verdict on "A gains `PUBLISHED_GAIN` over B"."""
    ends = _relative(found)
    if ends is not None and ends[1] < PUBLISHED_GAIN:
        return "not held"
    return (
        "held" if ends is not None and better(found) > 0 and found["relative_high"] >= PUBLISHED_GAIN else "not settled"
    )


def loses_nothing(found: Mapping[str, Any]) -> Verdict:
    """The verdict on "A loses nothing against B"."""
    if better(found) < 0:
        return "not held"
    ends = _relative(found)
    return "held" if ends is not None and ends[0] > -MARGIN else "not settled"


def everywhere(true: Sequence[bool], seeds: int) -> Verdict:
    """The verdict on a claim without an interval, by whether it is true in each case of each seed."""
    if seeds < LEAST_SEEDS or (any(true) and not all(true)):
        return "not settled"
    return "held" if all(true) else "not held"


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict over several data sets."""
    first = verdicts[0] if verdicts else "not settled"
    return first if set(verdicts) == {first} else "not settled"


def evidence(found: Mapping[str, Any]) -> str:
    """A comparison in words."""
    relative = "" if found["relative"] is None else (
        f", relative {found['relative']:+.1%} [{found['relative_low']:+.1%}, {found['relative_high']:+.1%}]"
    )  # fmt: skip
    seeds = len(found["by_seed"])
    others = "" if seeds < LEAST_SEEDS else " over users and [{:+.4f}, {:+.4f}] over seeds".format(*over_seeds(found))
    return (
        f"{found['metric']} {found['difference']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]{others}{relative}; "
        f"{seeds} seed{'s' * (seeds != 1)}, {found['users']:,} users"
    )


def comparisons(record: Mapping[str, Any], label: str, metric: str, split: str = "test") -> Iterator[Mapping[str, Any]]:
    """The comparisons of a label with the record's `compare_to`, by data set."""
    for row in record["comparisons"]:
        if (row["label"], row["metric"], row["split"]) == (label, metric, split):
            yield row


@dataclass(frozen=True)
class Choice:
    """The label that validation chose on a data set, `among` those of `all` labels that have as many `seeds`."""

    dataset: str
    label: str
    among: int
    all: int
    seeds: int


def chosen_on_validation(record: Mapping[str, Any], labels: Sequence[str]) -> list[Choice]:
    """By data set, the best mean validation NDCG@10 among those of `labels` that were trained with the most seeds."""
    best = []
    for dataset in dict.fromkeys(row["dataset"] for row in record["runs"]):
        values: dict[str, list[float]] = {}
        for row in record["runs"]:
            if row["dataset"] == dataset and row["label"] in labels:
                values.setdefault(row["label"], []).append(row["valid"]["NDCG@10"])
        if values:
            most = max(map(len, values.values()))
            full = {label: sum(found) / most for label, found in values.items() if len(found) == most}
            best.append(Choice(dataset, max(full, key=lambda label: full[label]), len(full), len(values), most))
    return best
