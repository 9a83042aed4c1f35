"""What the records say about a claim: held, not held, or not settled, by rules that the report prints.

A comparison of two models (`bootstrap.compare`) is *settled* only where at least `LEAST_SEEDS` seeds were trained, its
interval over users lies on one side of zero, and the difference of every seed lies there too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["held", "not held", "not settled"]

LEAST_SEEDS = 3
# The paper's gain in HR@10 over Mamba4Rec on ML-1M (arXiv 2505.04445, abstract).
PUBLISHED_GAIN = 0.032
# Something costs nothing if at most this share of the metric is lost, at the far end of the interval.
MARGIN = 0.05

RULES = f"""\
* A model is **better** (or **worse**) than another where at least {LEAST_SEEDS} seeds were trained, the 95 % interval
  of the paired bootstrap over users lies above (below) zero, and so does the difference within every seed.
* The claim "A ranks better than B" is **held** on a data set where A is better, **not held** where A is worse, and
  **not settled** otherwise.
* The claim "A gains {PUBLISHED_GAIN:.1%} over B" is **held** where A is better and the interval of the relative
  difference reaches that gain, **not held** where at least {LEAST_SEEDS} seeds were trained and the whole interval lies
  below it, **not settled** otherwise.
* The claim "A loses nothing against B" is **held** where at least {LEAST_SEEDS} seeds were trained and the whole
  interval of the relative difference lies above -{MARGIN:.0%}, **not held** where A is worse, and **not settled**
  otherwise.
* Over several data sets a claim is held if it is held on each, not held if it is on each not held, else not settled.
* The interval speaks of other users. Of other seeds only the spread over the trained ones speaks, and of other
  hyper-parameters or of longer training nothing here does."""


@dataclass(frozen=True)
class Finding:
    """A claim put to one data set."""

    dataset: str
    verdict: Verdict
    evidence: str


def better(found: Mapping[str, Any]) -> int:
    """1 or -1 where a comparison is settled, else 0."""
    by_seed = found["by_seed"].values()
    if len(by_seed) < LEAST_SEEDS:
        return 0
    if found["low"] > 0 and min(by_seed) > 0:
        return 1
    return -1 if found["high"] < 0 and max(by_seed) < 0 else 0


def ranks_better(found: Mapping[str, Any]) -> Verdict:
    """The verdict on "A ranks better than B"."""
    verdicts: tuple[Verdict, ...] = ("not settled", "held", "not held")
    return verdicts[better(found)]


def gains_as_published(found: Mapping[str, Any]) -> Verdict:
    """The verdict on "A gains `PUBLISHED_GAIN` over B"."""
    if len(found["by_seed"]) < LEAST_SEEDS or found["relative_high"] is None:
        return "not settled"
    if found["relative_high"] < PUBLISHED_GAIN:
        return "not held"
    return "held" if better(found) > 0 else "not settled"


def loses_nothing(found: Mapping[str, Any]) -> Verdict:
    """The verdict on "A loses nothing against B"."""
    if better(found) < 0:
        return "not held"
    enough = len(found["by_seed"]) >= LEAST_SEEDS and found["relative_low"] is not None
    return "held" if enough and found["relative_low"] > -MARGIN else "not settled"


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
    return (
        f"{found['metric']} {found['difference']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]{relative}; "
        f"{seeds} seed{'s' * (seeds != 1)}, {found['users']:,} users"
    )


def comparisons(record: Mapping[str, Any], label: str, metric: str, split: str = "test") -> Iterator[Mapping[str, Any]]:
    """The comparisons of a label with the record's `compare_to`, by data set."""
    for row in record["comparisons"]:
        if (row["label"], row["metric"], row["split"]) == (label, metric, split):
            yield row


def findings(record: Mapping[str, Any], label: str, metric: str, rule: Any) -> list[Finding]:
    """A claim about `label`, put to every data set of a record."""
    return [Finding(row["dataset"], rule(row), evidence(row)) for row in comparisons(record, label, metric)]


def chosen_on_validation(record: Mapping[str, Any], labels: Sequence[str]) -> list[tuple[str, str]]:
    """(data set, label) with the best mean validation NDCG@10 among `labels` that were trained with the most seeds."""
    best = []
    for dataset in dict.fromkeys(row["dataset"] for row in record["runs"]):
        values: dict[str, list[float]] = {}
        for row in record["runs"]:
            if row["dataset"] == dataset and row["label"] in labels:
                values.setdefault(row["label"], []).append(row["valid"]["NDCG@10"])
        if values:
            most = max(map(len, values.values()))
            full = {label: sum(found) / most for label, found in values.items() if len(found) == most}
            best.append((dataset, max(full, key=lambda label: full[label])))
    return best
