"""Which claims an experiment speaks to, and what it found about each, data set by data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.experiments import claims, tables
from bench.experiments.claims import Finding, Verdict

Record = Mapping[str, Any]
AS_DESCRIBED = ("M2Rec (inner)", "M2Rec (input)")
TRAINED_OUT = "trained until validation stops rising"
TRAINED_ON = "trained on while validation may still rise"


def findings(record: Record) -> list[tuple[str, list[Finding]]]:
    """Each claim with what was found by data set; claims without any finding are left out."""
    made = {
        "main": _main, "long": _long, "longer": _longer, "genuine": _genuine, "length": _length, "settings": _settings,
        "long_settings": _long_settings, "gate": _gate, "text": _text, "stride": _stride, "filter": _filter,
        "periods": _periods, "noise": _noise, "cold_start": _cold_start, "spectrum": _spectrum,
    }.get(record["analysis"].get("kind") or record["name"])  # fmt: skip
    return [(claim, found) for claim, found in made(record) if found] if made else []


def _compared(record: Record, label: str, metric: str, rule: Any) -> list[Finding]:
    """A claim about `label` beside the record's `compare_to`, put to every data set."""
    rows = claims.comparisons(record, label, metric)
    return [Finding(row["dataset"], rule(row), claims.evidence(row)) for row in rows]


def _worse(row: Mapping[str, Any]) -> Verdict:
    return {1: "not held", -1: "held", 0: "not settled"}[claims.better(row)]  # type: ignore[return-value]


def _main(record: Record) -> Iterator[tuple[str, list[Finding]]]:
    for label in AS_DESCRIBED:
        yield f"{label} ranks better than Mamba4Rec.", _compared(record, label, "HR@10", claims.ranks_better)
        gain = f"{label} gains {claims.PUBLISHED_GAIN:.1%} in HR@10 over Mamba4Rec, as published."
        yield gain, _compared(record, label, "HR@10", claims.gains_as_published)


def _long(record: Record) -> Iterator[tuple[str, list[Finding]]]:
    labels = (AS_DESCRIBED[0], "M2Rec (residual gate)", "residual, no text (control)")
    yield from _better(record, TRAINED_OUT.capitalize(), labels)


def _longer(record: Record) -> Iterator[tuple[str, list[Finding]]]:
    yield from _better(record, TRAINED_ON.capitalize(), (AS_DESCRIBED[0], "M2Rec (residual gate)"))


def _genuine(record: Record) -> Iterator[tuple[str, list[Finding]]]:
    yield from _better(record, "Where all times are genuine", (AS_DESCRIBED[0], "M2Rec (residual gate)"))


def _length(record: Record) -> Iterator[tuple[str, list[Finding]]]:
    positions = record["runs"][0]["options"]["max_len"]
    labels = (*AS_DESCRIBED, "M2Rec (residual gate)")
    yield from _better(record, f"With {positions} positions, {TRAINED_OUT}", labels)


def _better(record: Record, beginning: str, labels: Sequence[str]) -> Iterator[tuple[str, list[Finding]]]:
    for label in labels:
        claim = f"{beginning}, {label} ranks better than {record['compare_to']}."
        yield claim, _compared(record, label, "HR@10", claims.ranks_better)


def _settings(record: Record, beginning: str = "") -> Iterator[tuple[str, list[Finding]]]:
    """The setting that validation chooses, on every data set; and again where M2Rec as described is worse."""
    described, base = AS_DESCRIBED[0], record["compare_to"]
    labels = [label for label in dict.fromkeys(row["label"] for row in record["runs"]) if label != base]
    lost = {row["dataset"]: row for row in claims.comparisons(record, described, "NDCG@10") if claims.better(row) < 0}
    everywhere, won_back = [], []
    for chosen in claims.chosen_on_validation(record, labels):
        dataset = chosen.dataset
        seeds = f"{chosen.seeds} seed{'s' * (chosen.seeds != 1)}"
        among = f"chosen among the {chosen.among} of {chosen.all} settings that have {seeds}"
        for row in claims.comparisons(record, chosen.label, "NDCG@10"):
            if row["dataset"] == dataset:
                said = f"{chosen.label}, {among}: {claims.evidence(row)}"
                everywhere.append(Finding(dataset, claims.ranks_better(row), said))
                if dataset in lost:
                    before = f"{described}: {claims.evidence(lost[dataset])}; {chosen.label}: {claims.evidence(row)}"
                    won_back.append(Finding(dataset, claims.loses_nothing(row), before))
    yield beginning + f"The setting of M2Rec that validation chooses ranks better than {base}.", everywhere
    lost_to = f"Where {described} is worse than {base}, the setting that validation chooses loses nothing."
    yield beginning + lost_to, won_back


def _long_settings(record: Record) -> Iterator[tuple[str, list[Finding]]]:
    yield from _settings(record, f"{TRAINED_OUT.capitalize()}: ")


def _gate(record: Record) -> Iterator[tuple[str, list[Finding]]]:
    for label in ("residual, text", "scalar (Eq. 16)"):
        claim = f"{label} ranks better than {record['compare_to']}."
        yield claim, _compared(record, label, "NDCG@10", claims.ranks_better)


def _text(record: Record) -> Iterator[tuple[str, list[Finding]]]:
    base = record["compare_to"]
    for label, claim in (
        ("MiniLM, rows permuted", f"{base} ranks better than the same table with its rows permuted among the items."),
        ("TF-IDF", f"{base} ranks better than TF-IDF of the same text."),
    ):
        rows = [claims.turned(row) for row in claims.comparisons(record, label, "NDCG@10")]
        yield claim, [Finding(row["dataset"], claims.ranks_better(row), claims.evidence(row)) for row in rows]
    tuned = _compared(record, "MiniLM, tuned", "NDCG@10", claims.ranks_better)
    yield f"{base} tuned on the training part ranks better than {base} as it came.", tuned


def _stride(record: Record) -> Iterator[tuple[str, list[Finding]]]:
    for label in dict.fromkeys(row["label"] for row in record["runs"] if row["label"] != record["compare_to"]):
        yield f"{label} loses nothing against stride 1.", _compared(record, label, "NDCG@10", claims.loses_nothing)


def _filter(record: Record) -> Iterator[tuple[str, list[Finding]]]:
    found = _compared(record, "theta 0.1", "NDCG@10", claims.ranks_better)
    yield "The filter alone, without text, ranks better than no filter.", found


def _periods(record: Record) -> Iterator[tuple[str, list[Finding]]]:
    for label in ("theta 0.1 (inner)", "theta 0.1 (input)"):
        claim = f"A cutoff below the users' frequencies harms: {label} ranks worse than no filter."
        yield claim, _compared(record, label, "NDCG@10", _worse)


def _noise(record: Record) -> Iterator[tuple[str, list[Finding]]]:
    ours, theirs = AS_DESCRIBED[0], record["compare_to"]
    found = []
    for dataset in dict.fromkeys(row["dataset"] for row in record["analysis"]["rows"]):
        losses = {label: tables.losses(record["analysis"], dataset, label) for label in (ours, theirs)}
        seeds = sorted(losses[ours].keys() & losses[theirs].keys())
        if seeds:
            pairs = [(lost, losses[theirs][seed][key]) for seed in seeds for key, lost in losses[ours][seed].items()]
            smaller = [lost < other for lost, other in pairs]
            said = f"the smaller loss in {sum(smaller)} of {len(smaller)} pairs of noise and seed"
            said += f"; {len(seeds)} seed{'s' * (len(seeds) != 1)}"
            found.append(Finding(dataset, claims.everywhere(smaller, len(seeds)), said))
    yield f"{ours} loses a smaller share of its NDCG@10 to noise than {theirs}, whatever the noise.", found


def _cold_start(record: Record) -> Iterator[tuple[str, list[Finding]]]:
    for against, claim in (
        ("random order", "Vectors from their text rank unseen items better than a random order does."),
        ("own vectors", "Vectors from their text rank unseen items better than those that training left them."),
    ):
        yield (
            claim,
            [
                # An AUC near 0 makes any relative gain look large.
                Finding(
                    f"{row['dataset']}, {row['label']}",
                    claims.ranks_better(row),
                    claims.evidence(row | {"relative": None}),
                )
                for row in record["analysis"]["comparisons"]
                if row.get("against", "own vectors") == against  # what records of before had alone
            ],
        )


def _spectrum(record: Record) -> Iterator[tuple[str, list[Finding]]]:
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
            users = f"{row['users']:,} users with at least {row['length']} earlier events"
            slow.append(Finding(row["dataset"], more, f"{said} {chance:.3f}; {users}"))
    yield "The slowest peak in the spectrum of a cycle is at 1 / period.", cycles
    yield f"Below {theta:g} cycles per step users have more power than in random order.", slow
