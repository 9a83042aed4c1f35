"""docs/experiments.md from the records of `bench/accuracy.py`: every number in it is computed here, none is typed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.experiments import claims, figures, published, tables, verdicts
from bench.experiments.verdicts import AS_DESCRIBED

Record = Mapping[str, Any]
ORDER = (
    "main", "long", "longer", "genuine", "length", "settings", "long_settings", "gate", "text", "filter", "stride",
    "noise", "cold_start", "ties", "spectrum", "periods", "dynamics",
)  # fmt: skip
TITLES = {
    "main": "Main table",
    "long": verdicts.TRAINED_OUT.capitalize(),
    "longer": verdicts.TRAINED_ON.capitalize(),
    "genuine": "With genuine times alone",
    "length": "With as many positions as published",
    "settings": "Which setting to choose",
    "long_settings": "Which setting to choose when there is time",
    "gate": "Text and gate",
    "text": "Text tables",
    "filter": "The filter's own choices",
    "stride": "Sampling at the signal's own rate",
    "noise": "Noise",
    "cold_start": "Cold start",
    "ties": "Ties in time",
    "spectrum": "Spectra",
    "periods": "Known periods",
    "dynamics": "What gate and filter learn",
}
PUBLISHED = ("main", "long", "longer", "length")  # have published values beside them
WITH_DIFFERENCES = (*PUBLISHED, "genuine", "settings", "long_settings", "gate", "text", "stride")  # a figure of them
BEFORE = {"text": "python bench/experiments/text_tables.py --data DIR\n"}  # what an experiment needs first

HEAD = """\
# Experiments

What M2Rec's claims come to on real data, trained and ranked by this package. Written by `python bench/accuracy.py
--report` from the records under `bench/results/*/accuracy`; no number is typed by hand but the published ones, which
are said to be such.

**Protocol.** 5-core; per user the last item is the test, the one before it validation, the prefixes of the rest are
training samples; events in order of time, equal times in the order of the file (on MovieLens many events of a user
have equal times, so this rule decides what is held out). The held-out item is ranked among all items, those of the
history included. Training stops early on validation NDCG@10, and the best epoch's model is tested. All models of a data
set have the same width, learning rate, dropout and number of samples seen, unless a row says otherwise; none was tuned
for itself. BERT4Rec is trained on masked sequences, not on prefixes. Behind ± is the standard deviation over seeds.

**Scale.** These runs were made on a few CPU cores: sequences of at most {max_len} items and few epochs, but where an
experiment says otherwise; a few random prefixes of each user in an epoch; and one seed where several were too much.
Each row says how many seeds it has, how many samples each saw, and in how many runs validation was still rising when
training ended: such a row says how fast a model learns, not where it would arrive. An item's text is the table that
lies in the data set's folder, unless a row names another. Where runs of several commits meet in a table, those of the
same seed have the same initial weights and samples, but not always the same dropout, whose random numbers may change
with the code: such a difference within a seed is one between independent runs.{absent}
{data}
## Rules

{rules}
"""

TEXTS = """\
All models but *no text* and *none* read a table through the residual gate. *MiniLM* is the table in the data set's
folder, the full text of each item through all-MiniLM-L6-v2; on foursquare-nyc that text is the venue's category and
nothing else. *rows permuted* deals its rows out at random among the items, once for all seeds: the same vectors, about
other items. *TF-IDF* has no encoder, but the words of the same text, reduced by an SVD. *tuned* is the encoder after
`fastm2rec tune-text` on neighbours in the training part; what is held out for validation and test is in no pair."""

NOISE = """\
Test NDCG@10, and its change against clean input, the mean over seeds and over several draws of the noise. *gaussian p*
adds to every item vector that is read N(0, (p s)^2), s being the standard deviation of the entries of the model's own
trained table; *replaced p* puts, with probability p, an item drawn evenly from the catalogue in the place of each item
of the history. Targets and the vectors they are scored with stay clean."""

GROUPS = """\
Test NDCG@10 by group, the mean over seeds. *history* is the number of a user's events before the test item, those
beyond the model's length included; *training events* is how often the test item occurs in the training part of all
users. A group of few users says little."""

UNSEEN = """\
Targets that training never saw, with the vector it left them and with one predicted from their text by a ridge
regression on the seen items; *everybody* ranks all users' targets among vectors so mended. AUC@n is the share of the
other n - 1 items that are ranked below the target, 0.5 where ranks are random. Training pushes the vectors of unseen
items far below that, so to be better than these is little: median ranks are to be read beside half the number of
items."""


TIES = """\
HR@10 / NDCG@10 on the test items, the mean over seeds. On MovieLens a whole page of ratings may have one second, and
which of them is held out is then decided by a rule of ties: here, the order of the file. So a result on such data is
one for its rule."""


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
    own.sort(key=lambda record: (_place(record["name"]), record["device"]))
    lengths = Counter(row["options"]["max_len"] for record in own for row in record["runs"])
    datasets = {row["dataset"] for record in own for row in record["runs"]}
    absent = "" if "ml-1m" in datasets else " ML-1M was not run."
    data = f"\n{tables.datasets(own)}\n" if any(record.get("data") for record in own) else ""
    parts = [HEAD.format(rules=claims.RULES, max_len=lengths.most_common(1)[0][0], absent=absent, data=data)]
    sections, summary = [], []
    times = Counter(record["name"] for record in own)
    for record in own:
        text, rows = _section(record, out, times[record["name"]] > 1)
        sections.append(text)
        summary += rows
    sections += _across(own)
    unmade = [name for name in ORDER if name not in {record["name"] for record in own}]
    if unmade:
        files = ", ".join(f"`bench/experiments/{name}.yaml`" for name in unmade)
        sections.append(f"## Not run yet\n\n{files}\n")
    header = ["claim", "verdict", "on each data set", "experiment"]
    parts.append("## Claims\n\n" + tables.markdown(header, summary, left=4) + "\n")
    return "\n".join(parts + sections)


def _place(name: str) -> int:
    return ORDER.index(name) if name in ORDER else len(ORDER)


def _section(record: Record, out: Path, several: bool) -> tuple[str, list[list[str]]]:
    """One experiment: question, command, table, figure, and a paragraph for each claim; and the claims' rows."""
    name = record["name"]
    title = str(TITLES.get(name, name)) + (f" ({record['device']})" if several else "")
    parts: list[str] = [
        f"## {title}",
        f"{record['question']} Compared with: {record['compare_to']}.",
        f"```\n{BEFORE.get(name, '')}python bench/accuracy.py bench/experiments/{name}.yaml --data DIR --record\n```",
        tables.origins(record),
    ]
    if name == "text":
        parts.append(TEXTS)
    if name not in ("noise", "cold_start", "ties", "spectrum"):
        parts.append(tables.of_runs(record))
    if name in PUBLISHED:
        parts += filter(None, [_plainly(record), published.beside(record)])
    parts += _pictures(record, out, f"-{_slug(record['device'])}" if several else "")
    rows = []
    for claim, found in verdicts.findings(record):
        verdict = claims.together([one.verdict for one in found])
        listed = "\n".join(f"* {one.dataset}: {one.verdict}. {one.evidence}." for one in found)
        parts.append(f"**{claim}** {verdict.capitalize()}.\n\n{listed}")
        each = "; ".join(f"{one.dataset}: {one.verdict}" for one in found)
        rows.append([claim, verdict, each, title])
    return "\n\n".join(parts) + "\n", rows


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
    text = (
        "How slowly users change (text of the items) and what M2Rec gains or loses, by data set; those without a "
        "spectrum are left out. So few data sets can show no relation between the two."
    )
    return [f"## Across domains\n\n{text}\n\n{tables.markdown(header, rows)}\n"] if rows else []


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text.partition(",")[0].lower())


def _pictures(record: Record, out: Path, suffix: str) -> list[str]:
    """The experiment's figures, drawn, as Markdown; and the tables of its analysis."""
    name, analysis = record["name"], record["analysis"]
    drawn: list[tuple[str, str]] = []
    texts: list[str] = []

    def path(stem: str) -> Path:
        return out / f"{stem}{suffix}.png"

    if name in WITH_DIFFERENCES and record["comparisons"]:
        caption = "dot: over all seeds (number in brackets); bar: its interval over users; ticks: single seeds"
        drawn.append((figures.differences(record, path(name)), caption))
    if name in ("filter", "periods") and record["comparisons"]:
        file = figures.against(record, "theta", path(name), "theta (cycles per step)")
        drawn.append((file, "NDCG@10 against the cutoff, hard mask, padded Fourier basis"))
    kind = analysis.get("kind")
    if kind == "noise":
        texts.append(f"{NOISE}\n\n{tables.noise(analysis)}")
    elif kind == "cold_start":
        texts.append(f"{GROUPS}\n\n{tables.cold_start(analysis, ('history', 'training events'))}")
        if analysis["comparisons"]:
            texts.append(f"{UNSEEN}\n\n{tables.cold_start(analysis, ('unseen', 'everybody'))}")
    elif kind == "ties":
        texts.append(f"{TIES}\n\n{tables.ties(analysis)}")
    elif kind == "spectrum":
        caption = "the filter's curves are shares of the power before it; dashed: its cutoff"
        drawn.append((figures.spectrum(analysis, path(name), analysis["theta"]), caption))
    elif kind == "dynamics":
        drawn.append((figures.dynamics(analysis, path(name)), "alpha, beta and theta at the end of each epoch"))
    return texts + [f"![{caption}]({file})\n\n*{caption}*" for file, caption in drawn]
