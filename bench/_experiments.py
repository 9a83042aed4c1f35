"""docs/experiments.md from the records of `bench/accuracy.py`: every number in it is computed here, none is typed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.experiments import claims, figures, tables
from bench.experiments.claims import Finding, Verdict

Record = Mapping[str, Any]
AS_DESCRIBED = ("M2Rec (inner)", "M2Rec (input)")
ORDER = ("main", "gate", "filter", "stride", "noise", "cold_start", "spectrum", "periods", "dynamics")
TITLES = {
    "main": "Main table",
    "gate": "Text and gate",
    "filter": "The filter's own choices",
    "stride": "Sampling at the signal's own rate",
    "noise": "Noise",
    "cold_start": "Cold start",
    "spectrum": "Spectra",
    "periods": "Known periods",
    "dynamics": "What gate and filter learn",
}

HEAD = """\
# Experiments

What M2Rec's claims come to on real data, trained and ranked by this package. Written by `python bench/accuracy.py
--report` from the records under `bench/results/*/accuracy`; no number is typed by hand.

**Protocol.** 5-core; per user the last item is the test, the one before it validation, the prefixes of the rest are
training samples; events in order of time, equal times in the order of the file. The held-out item is ranked among all
items, those of the history included. Training stops early on validation NDCG@10, and the best epoch's model is tested.
All models of a data set have the same width, learning rate, dropout and number of samples seen, unless a row says
otherwise; none was tuned for itself. BERT4Rec is trained on masked sequences, not on prefixes.

**Scale.** These runs were made on a few CPU cores: sequences of at most {max_len} items, a few random prefixes of each
user in an epoch, few epochs, and one seed where several were too much. Each row says how many seeds it has, how many
samples each saw, and whether validation was still rising when training ended: such a row says how fast a model learns,
not where it would arrive. An item's text is the table that lies in the data set's folder; other text encoders were not
compared.{absent}

## Rules

{rules}
"""


def render(records: Sequence[Record], out: Path) -> str:
    """The document, and its figures beside it.

    Args:
        records: what `bench/accuracy.py` wrote; others are passed over.
        out: the folder of the document, where the figures go.

    Returns:
        Markdown.

    Raises:
        ValueError: there is no record of an experiment with a finished run.
    """
    own = [record for record in records if record.get("kind") == "experiment" and record["runs"]]
    if not own:
        raise ValueError("records: expected at least one experiment with a finished run, got none")
    own.sort(key=lambda record: (record["device"], _place(record["name"])))
    lengths = {row["options"]["max_len"] for record in own for row in record["runs"]}
    datasets = {row["dataset"] for record in own for row in record["runs"]}
    absent = "" if "ml-1m" in datasets else " ML-1M was not run."
    parts = [HEAD.format(rules=claims.RULES, max_len=max(lengths), absent=absent)]
    sections, summary = [], []
    several = len({record["device"] for record in own}) > 1
    for record in own:
        text, verdicts = _section(record, out, several)
        sections.append(text)
        summary += verdicts
    sections += _across(own)
    unmade = [name for name in ORDER if name not in {record["name"] for record in own}]
    if unmade:
        files = ", ".join(f"`bench/experiments/{name}.yaml`" for name in unmade)
        sections.append(f"## Not run yet\n\n{files}\n")
    rows = [[claim, verdict, where] for claim, verdict, where in summary]
    parts.append("## Claims\n\n" + tables.markdown(["claim", "verdict", "experiment"], rows, left=3) + "\n")
    return "\n".join(parts + sections)


def _place(name: str) -> int:
    return ORDER.index(name) if name in ORDER else len(ORDER)


def _section(record: Record, out: Path, several: bool) -> tuple[str, list[tuple[str, str, str]]]:
    """One experiment: question, command, table, figure, and a paragraph for each claim."""
    name = record["name"]
    title = str(TITLES.get(name, name)) + (f" ({record['device']})" if several else "")
    parts: list[str] = [
        f"## {title}",
        f"{record['question']} Compared with: {record['compare_to']}.",
        f"```\npython bench/accuracy.py bench/experiments/{name}.yaml --data DIR --record\n```",
        f"{record['device']}; torch {record['torch']}; commit {', '.join(_commits(record))}.",
    ]
    if name not in ("noise", "cold_start", "spectrum"):
        parts.append(tables.of_runs(record))
    if name == "main":
        parts.append(_plainly(record))
    parts += _pictures(record, out, f"-{_slug(record['device'])}" if several else "")
    verdicts: list[tuple[str, str, str]] = []
    for claim, found in _claims(record):
        verdict = claims.together([one.verdict for one in found])
        listed = "\n".join(f"* {one.dataset}: {one.verdict}. {one.evidence}." for one in found)
        parts.append(f"**{claim}** {verdict.capitalize()}.\n\n{listed}")
        verdicts.append((claim, verdict, title))
    return "\n\n".join(parts) + "\n", verdicts


def _plainly(record: Record) -> str:
    """Who is ahead in the table, in words, data set by data set: what the runs show, before what they settle."""
    lines = []
    for label in AS_DESCRIBED:
        for row in claims.comparisons(record, label, "NDCG@10"):
            seeds = len(row["by_seed"])
            word = "is ahead of" if row["low"] > 0 else "loses to" if row["high"] < 0 else "cannot be told from"
            where = f"on {row['dataset']}, with {seeds} seed{'s' * (seeds != 1)}, {label}, as described,"
            lines.append(f"* {where} {word} {record['compare_to']}: {claims.evidence(row)}")
    return "In this table, by the interval over users alone:\n\n" + "\n".join(lines)


def _across(own: Sequence[Record]) -> list[str]:
    """How slow each data set is, beside what M2Rec gains there; nothing where a record is missing."""
    named = {record["name"]: record for record in own}
    if not {"main", "spectrum"} <= named.keys():
        return []
    gains = {row["dataset"]: row for row in claims.comparisons(named["main"], AS_DESCRIBED[0], "NDCG@10")}
    rows = [
        [row["dataset"], f"{row['slow_share']['mean']:.3f}", f"{row['slow_share']['chance']:.3f}",
         claims.evidence(gains[row["dataset"]])]
        for row in named["spectrum"]["analysis"].get("rows", [])
        if "slow_share" in row and row["dataset"] in gains
    ]  # fmt: skip
    theta = f"{named['spectrum']['analysis']['theta']:g}"
    header = ["data set", f"power up to {theta} cycles per step", "by chance", f"{AS_DESCRIBED[0]} less Mamba4Rec"]
    text = "Data sets by how slowly their users change (text of the items), and what M2Rec gains or loses on each."
    return [f"## Across domains\n\n{text}\n\n{tables.markdown(header, rows)}\n"] if rows else []


def _commits(record: Record) -> list[str]:
    return sorted({str(row["commit"]) for row in record["runs"]})


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text.partition(",")[0].lower())


def _pictures(record: Record, out: Path, suffix: str) -> list[str]:
    """The experiment's figures, drawn, as Markdown; and the tables of its analysis."""
    name, analysis = record["name"], record["analysis"]
    drawn: list[tuple[str, str]] = []
    texts: list[str] = []

    def path(stem: str) -> Path:
        return out / f"{stem}{suffix}.png"

    if name in ("main", "gate", "stride") and record["comparisons"]:
        caption = "dot: difference over all seeds (their number in brackets); bar: its interval; ticks: single seeds"
        drawn.append((figures.differences(record, path(name)), caption))
    if name in ("filter", "periods") and record["comparisons"]:
        file = figures.against(record, "theta", path(name), "theta (cycles per step)")
        drawn.append((file, "NDCG@10 against the cutoff, hard mask, padded Fourier basis"))
    kind = analysis.get("kind")
    if kind == "noise":
        texts.append("Test NDCG@10, and its change against clean input:\n\n" + tables.noise(analysis))
    elif kind == "cold_start":
        texts.append("Test NDCG@10 by group:\n\n" + tables.cold_start(analysis, ("history", "training events")))
        if analysis["comparisons"]:
            text = "Targets that training never saw, with the vector it left them and with one from text:\n\n"
            texts.append(text + tables.cold_start(analysis, ("unseen", "everybody")))
    elif kind == "spectrum":
        caption = "the filter's curves are shares of the power before it; dashed: its cutoff"
        drawn.append((figures.spectrum(analysis, path(name), analysis["theta"]), caption))
    elif kind == "dynamics":
        drawn.append((figures.dynamics(analysis, path(name)), "alpha, beta and theta at the end of each epoch"))
    return texts + [f"![{caption}]({file})\n\n*{caption}*" for file, caption in drawn]


def _claims(record: Record) -> list[tuple[str, list[Finding]]]:
    """The claims that an experiment speaks to, each with what it found by data set; those without are left out."""
    kind = record["analysis"].get("kind")
    made = {
        "main": _main_claims, "gate": _gate_claims, "stride": _stride_claims, "filter": _filter_claims,
        "periods": _period_claims, "noise": _noise_claims, "cold_start": _cold_start_claims,
        "spectrum": _spectrum_claims,
    }.get(kind or record["name"])  # fmt: skip
    return [(claim, found) for claim, found in made(record) if found] if made else []


def _compared(record: Record, label: str, metric: str, rule: Any) -> list[Finding]:
    return claims.findings(record, label, metric, rule)


def _main_claims(record: Record) -> list[tuple[str, list[Finding]]]:
    made = []
    for label in AS_DESCRIBED:
        made.append((f"{label} ranks better than Mamba4Rec.", _compared(record, label, "HR@10", claims.ranks_better)))
        gain = f"{label} gains {claims.PUBLISHED_GAIN:.1%} in HR@10 over Mamba4Rec, as published."
        made.append((gain, _compared(record, label, "HR@10", claims.gains_as_published)))
    settings = [label for label in dict.fromkeys(row["label"] for row in record["runs"]) if label.startswith("M2Rec")]
    won: list[Finding] = []
    for dataset, label in claims.chosen_on_validation(record, settings):
        found = _compared(record, label, "NDCG@10", claims.ranks_better)
        won += [Finding(dataset, one.verdict, f"{label}. {one.evidence}") for one in found if one.dataset == dataset]
    made.append(("The setting of M2Rec that validation chooses ranks better than Mamba4Rec.", won))
    return made


def _gate_claims(record: Record) -> list[tuple[str, list[Finding]]]:
    control = record["compare_to"]
    return [
        (f"{label} ranks better than {control}.", _compared(record, label, "NDCG@10", claims.ranks_better))
        for label in ("residual, text", "scalar (Eq. 16)")
    ]


def _stride_claims(record: Record) -> list[tuple[str, list[Finding]]]:
    labels = dict.fromkeys(row["label"] for row in record["runs"] if row["label"] != record["compare_to"])
    return [
        (f"{label} loses nothing against stride 1.", _compared(record, label, "NDCG@10", claims.loses_nothing))
        for label in labels
    ]


def _filter_claims(record: Record) -> list[tuple[str, list[Finding]]]:
    label = "theta 0.1"
    return [("The filter alone, without text, ranks better than no filter.",
             _compared(record, label, "NDCG@10", claims.ranks_better))]  # fmt: skip


def _period_claims(record: Record) -> list[tuple[str, list[Finding]]]:
    def harms(row: Mapping[str, Any]) -> Verdict:
        return {1: "not held", -1: "held", 0: "not settled"}[claims.better(row)]  # type: ignore[return-value]

    return [
        (f"A cutoff below the users' frequencies harms: {label} ranks worse than no filter.",
         _compared(record, label, "NDCG@10", harms))
        for label in ("theta 0.1 (inner)", "theta 0.1 (input)")
    ]  # fmt: skip


def _noise_claims(record: Record) -> list[tuple[str, list[Finding]]]:
    analysis, found = record["analysis"], []
    kinds = [key for key in dict.fromkeys((row["noise"], row["share"]) for row in analysis["rows"]) if key[1]]
    for dataset in dict.fromkeys(row["dataset"] for row in analysis["rows"]):
        here = {row["label"] for row in analysis["rows"] if row["dataset"] == dataset}
        if not {AS_DESCRIBED[0], record["compare_to"]} <= here:
            continue
        losses = {}
        for label in (AS_DESCRIBED[0], record["compare_to"]):
            clean = tables.mean_at(analysis, dataset, label, "none", 0.0)
            losses[label] = [1 - tables.mean_at(analysis, dataset, label, *key) / clean for key in kinds]
        smaller = [ours < theirs for ours, theirs in zip(*losses.values(), strict=True)]
        verdict: Verdict = "held" if all(smaller) else "not settled" if any(smaller) else "not held"
        found.append(Finding(dataset, verdict, f"the smaller loss under {sum(smaller)} of {len(smaller)} noises"))
    claim = f"{AS_DESCRIBED[0]} loses a smaller share of its NDCG@10 to noise than Mamba4Rec, whatever the noise."
    return [(claim, found)]


def _cold_start_claims(record: Record) -> list[tuple[str, list[Finding]]]:
    found = [
        Finding(f"{row['dataset']}, {row['label']}", claims.ranks_better(row), claims.evidence(row))
        for row in record["analysis"]["comparisons"]
    ]
    return [("Unseen items are ranked better by vectors from their text than by those that training left them.", found)]


def _spectrum_claims(record: Record) -> list[tuple[str, list[Finding]]]:
    rows, theta = record["analysis"]["rows"], record["analysis"]["theta"]
    cycles, slow = [], []
    for row in rows:
        if "peak" in row:
            expected = 1 / int(row["dataset"].rpartition(" ")[2])
            near: Verdict = "held" if abs(row["peak"] - expected) < 0.5 / row["length"] else "not held"
            most = f"the strongest frequency has {max(row['power']):.0%} of the power"
            said = f"at {row['peak']:.4f}, 1 / period is {expected:.4f}; {most}"
            cycles.append(Finding(f"{row['dataset']}, {row['signal']}", near, said))
        if "slow_share" in row:
            share = row["slow_share"]
            chance = share["chance"]
            more: Verdict = "held" if share["low"] > chance else "not held" if share["high"] < chance else "not settled"
            said = f"share of the power {share['mean']:.3f} [{share['low']:.3f}, {share['high']:.3f}], by chance"
            slow.append(Finding(row["dataset"], more, f"{said} {chance:.3f}; {row['users']:,} users with full windows"))
    return [
        ("The slowest peak in the spectrum of a cycle is at 1 / period.", cycles),
        (f"Below {theta:g} cycles per step users have more power than in random order.", slow),
    ]
