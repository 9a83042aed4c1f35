"""Markdown tables of an experiment: each row says with how many seeds and samples it was made, and what is missing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.experiments import claims

SHOWN = ("HR@10", "NDCG@10", "MRR@10")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table; the first `left` columns are aligned to the left."""
    rule = ["---" if place < left else "---:" for place in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation over seeds where there are several."""
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def of_runs(record: Mapping[str, Any]) -> str:
    """One table for each data set: what was trained, what it reached, and the difference to `compare_to`."""
    parts = []
    for dataset in dict.fromkeys(row["dataset"] for row in [*record["runs"], *record["missing"]]):
        here = [row for row in record["runs"] if row["dataset"] == dataset]
        missing = [row for row in record["missing"] if row["dataset"] == dataset]
        found = {
            row["label"]: row
            for row in record["comparisons"]
            if (row["dataset"], row["split"], row["metric"]) == (dataset, "test", "NDCG@10")
        }
        against = f"NDCG@10 less {record['compare_to']}'s, same seeds"
        strides = len({row["options"].get("stride", 1) for row in here}) > 1
        header = ["model", "seeds", *["positions scanned"] * strides, "samples seen", "epochs", "best epoch"]
        header += ["still rising", "valid NDCG@10", *SHOWN, against, "verdict"]
        rows = []
        for label in dict.fromkeys(row["label"] for row in here):
            own = [row for row in here if row["label"] == label]
            figures = [spread([row["valid"]["NDCG@10"] for row in own])]
            figures += [spread([row["test"][name] for row in own]) for name in SHOWN]
            asked = len(own) + sum(row["label"] == label for row in missing)
            scanned = [_scanned(own[0]["options"])] * strides
            effort = [f"{len(own)} of {asked}", *scanned, *_effort(own)]
            rows.append([label, *effort, *figures, *_difference(found.get(label))])
        absent = [
            label for label in dict.fromkeys(row["label"] for row in missing) if label not in {r[0] for r in rows}
        ]
        parts.append(f"**{dataset}**")
        if rows:
            parts.append(markdown(header, rows))
        if absent:
            parts.append(f"Not run, for want of time: {'; '.join(absent)}.")
    return "\n\n".join(parts)


def _effort(own: Sequence[Mapping[str, Any]]) -> list[str]:
    """Samples seen in training, epochs, the best of these, and in how many runs that was the last one."""
    options = own[0]["options"]
    seen = f"{statistics.fmean(row['steps'] for row in own) * options['batch_size'] / 1000:.0f} k"
    if options["model"] == "bert4rec" or options["positions"] == "all":
        seen += " sequences"
    rising = sum(row["best_epoch"] == row["epochs"] for row in own)
    spans = [_span([row[name] for row in own]) for name in ("epochs", "best_epoch")]
    return [seen, *spans, f"{rising} of {len(own)}"]


def _span(values: Sequence[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _scanned(options: Mapping[str, Any]) -> str:
    """How many positions the scan reads of a full sequence: every stride-th, counted back from the last."""
    length, stride = options["max_len"], options.get("stride", 1)
    return f"{-(-length // stride)} of {length}"


def _difference(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return ["", ""]
    word = {1: "better", -1: "worse", 0: "not settled"}[claims.better(found)]
    seeds = len(found["by_seed"])
    what = f"{found['difference']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}], {seeds} seed{'s' * (seeds != 1)}"
    return [what, word]


# What is to be known about data with such a fingerprint.
NOTES = {
    "ed8a7f5d32c6": """\
The copy of MovieLens 1M behind *ml-1m* is not GroupLens' file to the byte. Users, items, ratings and the order of the
rows are, but the times of a fifth of its events, all of users 3000 and above, were filled in between those of their
neighbours: pages of ratings that share a second are partly lost for these users. Published results were not made from
this copy; what that may be worth, *Ties in time* and *With genuine times alone* show."""
}


def datasets(records: Sequence[Mapping[str, Any]]) -> str:
    """What was read: sizes after the k-core, and a digest of events and item ids."""
    known = {name: facts for record in records for name, facts in record.get("data", {}).items()}
    rows = [
        [name, f"{facts['users']:,}", f"{facts['items']:,}", f"{facts['events']:,}", f"{facts['median_length']}",
         f"`{facts['fingerprint'][:12]}`"]
        for name, facts in known.items()
    ]  # fmt: skip
    header = ["data set", "users", "items", "events", "median events of a user", "fingerprint"]
    return "\n\n".join([markdown(header, rows), *notes(known)]) if rows else ""


def notes(data: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is to be known about these data sets, by name."""
    return [note for facts in data.values() for start, note in NOTES.items() if facts["fingerprint"].startswith(start)]


def origins(record: Mapping[str, Any]) -> str:
    """Where a record's runs come from: device, torch and commits, the oldest first; and who made the analysis."""
    places: dict[tuple[str, str], dict[str, int]] = {}
    for row in sorted(record["runs"], key=lambda row: row["created"]):
        commits = places.setdefault((row.get("device", record["device"]), row["torch"]), {})
        commits[str(row["commit"])] = commits.get(str(row["commit"]), 0) + 1
    parts = []
    for (device, version), commits in places.items():
        several = len(commits) > 1 or len(places) > 1
        counted = [
            f"{commit} ({count} run{'s' * (count != 1)})" if several else commit for commit, count in commits.items()
        ]
        parts.append(f"{device}; torch {version}; commit{'s' * (len(commits) > 1)} {', '.join(counted)}.")
    known = {commit for commits in places.values() for commit in commits}
    if record["analysis"] and known != {str(record["commit"])}:
        parts.append(f"Analysed at commit {record['commit']}.")
    return " ".join(parts)


def noise(analysis: Mapping[str, Any]) -> str:
    """NDCG@10 under each noise, the mean over seeds, and the change against clean input."""
    kinds = _noises(analysis)
    header = ["data set", "model", "seeds", "clean", *(f"{kind} {share:.0%}" for kind, share in kinds)]
    rows = []
    for dataset, label in dict.fromkeys((row["dataset"], row["label"]) for row in analysis["rows"]):
        values = _under(analysis, dataset, label)
        clean = statistics.fmean(at["none", 0.0] for at in values.values())
        means = [statistics.fmean(at[kind] for at in values.values()) for kind in kinds]
        cells = [f"{clean:.4f}", *(f"{mean:.4f} ({mean / clean - 1:+.1%})" for mean in means)]
        rows.append([dataset, label, str(len(values)), *cells])
    return markdown(header, rows, left=2)


def losses(analysis: Mapping[str, Any], dataset: str, label: str) -> dict[int, dict[tuple[str, float], float]]:
    """By seed and noise, the share of a model's clean NDCG@10 that is lost."""
    return {
        seed: {kind: 1 - at[kind] / at["none", 0.0] for kind in _noises(analysis)}
        for seed, at in _under(analysis, dataset, label).items()
    }


def _noises(analysis: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [kind for kind in dict.fromkeys((row["noise"], row["share"]) for row in analysis["rows"]) if kind[1]]


def _under(analysis: Mapping[str, Any], dataset: str, label: str) -> dict[int, dict[tuple[str, float], float]]:
    """A model's NDCG@10 by seed and noise."""
    found: dict[int, dict[tuple[str, float], float]] = {}
    for row in analysis["rows"]:
        if (row["dataset"], row["label"]) == (dataset, label):
            found.setdefault(row["seed"], {})[row["noise"], row["share"]] = row["NDCG@10"]
    return found


def cold_start(analysis: Mapping[str, Any], by: Sequence[str]) -> str:
    """NDCG@10 of each group of users or targets, a column a model; the mean over seeds."""
    chosen = [row for row in analysis["rows"] if row["by"] in by]
    labels = list(dict.fromkeys(row["label"] for row in chosen))
    rows = []
    for dataset, kind, group in dict.fromkeys((row["dataset"], row["by"], row["group"]) for row in chosen):
        cells, users, seeds = [], 0, []
        for label in labels:
            at = [
                row
                for row in chosen
                if (row["dataset"], row["by"], row["group"], row["label"]) == (dataset, kind, group, label)
            ]
            users = max([users, *(row["users"] for row in at)])
            seeds += [len(at)] * bool(at)
            scored = [row for row in at if row["users"]]
            if not scored:
                cells.append("")
                continue
            rank = statistics.fmean(row["median_rank"] for row in scored)
            cells.append(f"{statistics.fmean(row['NDCG@10'] for row in scored):.4f}, median rank {rank:,.0f}")
        rows.append([dataset, kind, group, f"{users:,}", _span(seeds), *cells])
    return markdown(["data set", "by", "group", "users", "seeds", *labels], rows, left=3)


def ties(analysis: Mapping[str, Any]) -> str:
    """How many events have the time of the one before them; then HR@10 and NDCG@10 of each group of test users, a
    column a model, the mean over seeds."""
    data = [
        [name, f"{facts['events']:,}", f"{facts['tied']:.1%}", f"{facts['tests_tied']:.1%}"]
        for name, facts in analysis["data"].items()
    ]
    labels = list(dict.fromkeys(row["label"] for row in analysis["rows"]))
    rows = []
    for dataset, by, group in dict.fromkeys((row["dataset"], row["by"], row["group"]) for row in analysis["rows"]):
        own = [row for row in analysis["rows"] if (row["dataset"], row["by"], row["group"]) == (dataset, by, group)]
        at = [[row for row in own if row["label"] == label] for label in labels]
        cells = [
            " / ".join(f"{statistics.fmean(row[name] for row in some):.4f}" for name in ("HR@10", "NDCG@10"))
            if some and own[0]["users"]
            else ""
            for some in at
        ]
        rows.append([dataset, by, group, f"{own[0]['users']:,}", _span([len(some) for some in at if some]), *cells])
    return "\n\n".join(
        (
            markdown(["data set", "events", "with the time of the one before", "of the test events"], data),
            markdown(["data set", "by", "group", "users", "seeds", *labels], rows, left=3),
        )
    )
