"""The experiments' own computations, each beside one by other means: GRU4Rec, what a run logs, the bootstrap, noise,
cold start, ties and spectra."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.experiments import bootstrap, claims, cold_start, noise, ranks, spectrum, tables, text_tables, ties
from fastm2rec import GRU4RecConfig, M2Rec, SequentialRecommender, build_model
from fastm2rec.data import SequenceDataset, load_dataset, load_text_table, read_log
from fastm2rec.text import load_encoder
from fastm2rec.training import RunFolder
from fastm2rec.training.config import DataConfig
from tests import _runs
from tests._encoders import small_model


def test_gru4rec_is_the_recurrence_written_out() -> None:
    model = build_model("gru4rec", {"n_items": 9, "max_len": 5, "d_model": 3, "gru_width": 4, "dropout": 0.0}).double()
    w = {name: value.detach() for name, value in model.state_dict().items()}
    ids, lengths = torch.tensor([[2, 9, 4, 0, 0], [7, 7, 1, 3, 5]]), torch.tensor([3, 5])
    for row, n in enumerate(lengths.tolist()):
        h = torch.zeros(4, dtype=torch.float64)
        for item in ids[row, :n].tolist():
            a = w["gru.weight_ih_l0"] @ w["item_embedding.weight"][item] + w["gru.bias_ih_l0"]
            b = w["gru.weight_hh_l0"] @ h + w["gru.bias_hh_l0"]
            reset, update = torch.sigmoid(a[:4] + b[:4]), torch.sigmoid(a[4:8] + b[4:8])
            h = (1 - update) * torch.tanh(a[8:] + reset * b[8:]) + update * h
        query = w["linear.weight"] @ h + w["linear.bias"]
        torch.testing.assert_close(model.encode(ids, lengths)[row], query, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model.hidden(ids, lengths)[row, n - 1], query, rtol=1e-12, atol=1e-12)


def test_gru4rec_is_saved_loaded_and_trained(tmp_path: Path) -> None:
    first = _runs.run(tmp_path / "a", "gru4rec", epochs=12, lr=0.02)
    assert RunFolder(tmp_path / "a").metrics()[0]["valid"]["NDCG@10"] < first.best, "the walk can be learned"
    loaded = SequentialRecommender.from_pretrained(tmp_path / "a" / "best")
    assert isinstance(loaded.config, GRU4RecConfig)
    assert loaded.is_causal
    with pytest.raises(ValueError, match="^gru_width: expected an integer of at least 1, got 0$"):
        GRU4RecConfig(gru_width=0)
    with pytest.raises(ValueError, match="^n_items: expected at least 1, got 0$"):
        build_model("gru4rec", {})


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"gate": "none"}, {"encoder.layers.0.filter.theta"}),
        ({"gate": "vector", "mask": "soft"}, {"encoder.layers.0.filter.theta", "fusion.alpha", "fusion.beta"}),
        ({"gate": "context", "filter_placement": "none"}, set()),
    ],
)
def test_what_gate_and_filter_learn_is_in_the_metrics(options: dict, names: set[str], tmp_path: Path) -> None:
    _runs.run(tmp_path, "m2rec", epochs=3, lr=0.05, **options)
    lines = RunFolder(tmp_path).metrics()
    assert all(line["learned"].keys() == names for line in lines)
    best = SequentialRecommender.from_pretrained(tmp_path / "best").state_dict()
    line = next(line for line in reversed(lines) if line["best"])
    for name, value in line["learned"].items():
        if name.endswith("theta"):
            logit = best.get("encoder.layers.0.filter.theta_logit")
            assert value == pytest.approx(0.1 if logit is None else 0.5 / (1 + math.exp(-float(logit))))
        else:
            assert value == pytest.approx(float(best[name].mean()))
            assert value != 0.5, "it has moved"


def test_ranks_of_users_are_those_of_the_evaluation(tmp_path: Path) -> None:
    from fastm2rec.training import evaluate

    _runs.run(tmp_path, "sasrec")
    model = SequentialRecommender.from_pretrained(tmp_path / "best")
    found = ranks.user_ranks(model, _runs.inputs().dataset, "test")
    assert ranks.metrics(found) == evaluate(model, _runs.inputs().dataset, "test").compute()
    for name, value in ranks.metrics(found).items():
        if not name.startswith("MRR"):
            assert ranks.per_user(found.numpy(), name).mean() == pytest.approx(value)
    n = _runs.inputs().dataset.n_items
    below = [sum(other > rank for other in range(1, n + 1)) / (n - 1) for rank in found.tolist()]
    assert ranks.per_user(found.numpy(), f"AUC@{n}").tolist() == pytest.approx(below)
    assert ranks.per_user(np.array([(n + 1) / 2]), f"AUC@{n}") == 0.5, "the middle rank"
    ranks.save(tmp_path / "ranks.npz", test=found, valid=found + 70_000)
    loaded = ranks.load(tmp_path / "ranks.npz")
    assert np.array_equal(loaded["test"], found.numpy())
    assert np.array_equal(loaded["valid"], found.numpy() + 70_000), "more than 16 bits"


def test_bootstrap_interval_is_that_of_the_paired_mean() -> None:
    generator = np.random.default_rng(1)
    hits = generator.random((2, 4000)) < 0.3
    flipped = np.where(generator.random((2, 4000)) < 0.1, True, hits)
    ours = {seed: np.where(flipped[seed], 1, 99) for seed in range(2)}
    theirs = {seed: np.where(hits[seed], 1, 99) for seed in range(2)} | {7: np.ones(4000, int)}
    found = bootstrap.compare(ours, theirs, "HR@10")
    gains = (flipped.astype(float) - hits).mean(axis=0)
    error = gains.std() / math.sqrt(4000)  # of a mean over users; the interval is 1.96 of them on each side
    assert found["difference"] == pytest.approx(gains.mean())
    assert found["by_seed"].keys() == {"0", "1"}
    # A 2.5 % quantile of 2000 draws is off by about 0.06 standard errors.
    assert found["low"] == pytest.approx(gains.mean() - 1.96 * error, abs=0.3 * error)
    assert found["high"] == pytest.approx(gains.mean() + 1.96 * error, abs=0.3 * error)
    assert found["relative"] == pytest.approx(gains.mean() / hits.mean())
    turned, other = claims.turned(found), bootstrap.compare(theirs, ours, "HR@10")
    assert turned["by_seed"] == other["by_seed"]
    for name in ("difference", "low", "high", "relative", "relative_low", "relative_high"):
        # A quantile between two draws is not the same after 1 / x; draws lie some 1e-4 of the interval apart.
        assert turned[name] == pytest.approx(other[name], rel=1e-3), name
    same = bootstrap.compare(theirs, theirs, "NDCG@10")
    assert (same["difference"], same["low"], same["high"]) == (0, 0, 0)
    with pytest.raises(ValueError, match="expected a seed in common"):
        bootstrap.compare({0: ours[0]}, {1: ours[1]}, "HR@10")


def test_noise_is_added_to_what_is_read_and_to_nothing_else(tmp_path: Path) -> None:
    _runs.run(tmp_path, "bert4rec")
    model: Any = SequentialRecommender.from_pretrained(tmp_path / "best")
    ids = torch.tensor([[3, 5, 0], [1, model.n_items + 1, 2]])  # an item, padding, BERT4Rec's mask token
    table = model.item_embedding.weight.detach()
    with noise.noisy_embeddings(model, 0.5, seed=1):
        added = torch.stack([model.item_embedding(ids).detach() for _ in range(2000)]) - table[ids]
    std = 0.5 * float(table[1 : model.n_items + 1].std())
    assert not added[:, 0, 2].any(), "padding"
    assert not added[:, 1, 1].any(), "the mask"
    # The standard deviation of n = 16,000 normal draws is off by a relative 1 / sqrt(2 n) = 0.6 %; six of these.
    assert float(added[:, 0, 0].std()) == pytest.approx(std, rel=6 / math.sqrt(2 * added[:, 0, 0].numel()))
    assert torch.equal(model.item_embedding(ids), table[ids]), "gone outside"


def test_items_are_replaced_at_the_given_rate() -> None:
    ids = torch.full((400, 50), 7)
    ids[:, 40:] = 0
    replaced = noise.Replace(1000, 0.2, seed=0)(ids, torch.full((400,), 40))
    assert not replaced[:, 40:].any()
    changed = (replaced[:, :40] != 7).double()
    assert float(changed.mean()) == pytest.approx(0.2 * 0.999, abs=5 * math.sqrt(0.2 * 0.8 / changed.numel()))
    assert 1 <= int(replaced[:, :40].min()) <= int(replaced.max()) <= 1000


def test_vectors_from_text_are_those_of_the_least_squares(tmp_path: Path) -> None:
    text = torch.cat([torch.zeros(1, 6), torch.randn(80, 6)])
    exact = torch.cat([torch.zeros(1, 3), 2 + text[1:] @ torch.randn(6, 3)])
    seen = torch.arange(1, 61)
    table = exact.clone()
    table[61:] = 99.0
    found = cold_start.vectors_from_text(table, text, seen)
    assert torch.equal(found[:61], table[:61]), "seen ones and padding stay"
    # The weakest penalty, 1 against about 60 of each standardised feature, shrinks by some 2 %.
    torch.testing.assert_close(found[61:], exact[61:], rtol=0.1, atol=0.3)
    x, y = torch.randn(30, 4).double(), torch.randn(30, 2).double()
    weight = cold_start.ridge(x, y, 3.0)
    stacked = torch.cat([torch.cat([x, torch.ones(30, 1)], dim=1), math.sqrt(3.0) * torch.eye(5)[:4].double()])
    expected = torch.linalg.lstsq(stacked, torch.cat([y, torch.zeros(4, 2).double()])).solution
    torch.testing.assert_close(weight, expected)


def test_groups_cover_every_value_once() -> None:
    values = np.array([0, 1, 5, 6, 20, 21, 500])
    groups = cold_start.grouped(values, [0, 5, 20])
    assert [name for name, _ in groups] == ["0", "1 to 5", "6 to 20", "over 20"]
    assert np.array_equal(sum(at.astype(int) for _, at in groups), np.ones(7))
    assert [values[at].tolist() for _, at in groups] == [[0], [1, 5], [6, 20], [21, 500]]


@pytest.mark.parametrize("length", [28, 35])
def test_power_is_parseval_s(length: int) -> None:
    x = torch.randn(5, length, 3, dtype=torch.float64)
    t = torch.arange(length)
    centred = (x - x.mean(dim=1, keepdim=True)).numpy()
    by_sums = []
    for k in range(1, length // 2 + 1):
        wave = np.exp(-2j * np.pi * k * t.numpy() / length)
        both = 1 if 2 * k == length else 2
        by_sums.append(both * (np.abs(np.einsum("nld,l->nd", centred, wave)) ** 2).sum(axis=1).mean())
    # Parseval: all of them together are L times the energy.
    assert sum(by_sums) == pytest.approx(length * (centred**2).sum(axis=(1, 2)).mean())
    np.testing.assert_allclose(spectrum.power(x).numpy(), np.array(by_sums) / sum(by_sums), rtol=1e-10)


def test_a_cycle_of_seven_has_its_peak_at_a_seventh() -> None:
    circle, unrelated = spectrum.cycle(7)
    for row in (circle, unrelated):
        assert row["peak"] == pytest.approx(1 / 7)
        peaks = {place + 1 for place, value in enumerate(row["power"]) if value >= 0.5 * max(row["power"])}
        assert peaks <= {10, 20, 30}, "of 70 positions: 1/7 and its multiples"
    assert max(circle["power"]) > 0.7
    flat = spectrum.power(spectrum.shuffled(torch.tensor([[[math.sin(2 * math.pi * t / 7)] for t in range(70)]] * 300)))
    # Each bin is a mean over 300 users of an exponential variable: 6 % off, six of these.
    assert float(flat[:34].max()) < (2 / 69) * (1 + 6 / math.sqrt(300))


@pytest.mark.parametrize("placement", ["inner", "input"])
def test_what_is_around_the_filter_is_what_the_model_computes(placement: str, tmp_path: Path) -> None:
    _runs.run(tmp_path, "m2rec", filter_placement=placement, theta=0.2)
    model = SequentialRecommender.from_pretrained(tmp_path / "best").double()
    assert isinstance(model, M2Rec)
    ids = torch.randint(1, model.n_items + 1, (4, model.max_len))
    before, after = spectrum.around_the_filter(model, ids)
    bins = torch.fft.rfft(before, dim=1)
    kept = torch.arange(model.max_len // 2 + 1) / model.max_len <= 0.2
    filtered = torch.fft.irfft(bins * kept[:, None], n=model.max_len, dim=1)
    torch.testing.assert_close(after, filtered, rtol=1e-6, atol=1e-9)
    x = model.input_norm(model.item_embedding(ids))
    if placement == "inner":
        block: Any = model.encoder.layers[0].mamba
        u = (x @ block.in_proj.weight.T)[..., : model.config.d_inner].transpose(1, 2)
        taps = block.conv1d.weight.shape[2]
        x = F.conv1d(F.pad(u, (taps - 1, 0)), block.conv1d.weight, block.conv1d.bias, groups=u.shape[1]).transpose(1, 2)
    torch.testing.assert_close(before, x)


def test_the_share_of_slow_power_is_chance_in_random_order() -> None:
    x = torch.randn(2000, 20, 3)
    share = spectrum.slow_share(x, 0.1)
    assert share["chance"] == pytest.approx(4 / 19), "two of ten frequencies, the last of which stands alone"
    assert share["low"] - (share["high"] - share["low"]) < share["chance"] < share["high"] * 2 - share["low"]
    assert spectrum.slow_share(x.cumsum(dim=1), 0.1)["low"] > 0.5, "a random walk is slow"


def test_tfidf_is_that_of_the_words_written_out() -> None:
    pytest.importorskip("sklearn")
    words = ["soap", "rose", "oil", "hair", "nail", "red"]
    texts = [" ".join([words[i], words[j], words[j]]) for i in range(6) for j in range(i)]
    counts = np.array([[text.split().count(word) for word in words] for text in texts], dtype=float)
    weights = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0)
    weights *= np.log((1 + len(texts)) / (1 + (counts > 0).sum(axis=0))) + 1
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    left, values, _ = np.linalg.svd(weights, full_matrices=False)
    for width in (3, 5):
        kept = left[:, :width] * values[:width]
        made = text_tables.tfidf(texts, width)
        assert made.shape == (len(texts), width)
        # float32, and a randomised SVD of five iterations: the last singular values are close to each other.
        np.testing.assert_allclose(made @ made.T, kept @ kept.T, atol=2e-2)
    assert torch.equal(made, text_tables.tfidf(texts, 5)), "the same every time"
    # Turned: no feature has much more variance than another, as the singular vectors have.
    assert float(made.var(dim=0).max() / made.var(dim=0).min()) < float(
        np.var(kept, axis=0).max() / np.var(kept, axis=0).min()
    )


def test_permuted_rows_are_the_same_rows() -> None:
    table = torch.arange(300.0).view(100, 3)
    made = text_tables.permuted(table)
    assert made.sort(dim=0).values.equal(table)
    # A random order keeps a place with probability 1 / n, so about one of the hundred.
    assert int((made == table).all(dim=1).sum()) < 10
    assert made.equal(text_tables.permuted(table))


@pytest.mark.slow
def test_text_tables_of_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("datasets")
    model = small_model()
    monkeypatch.setattr(text_tables, "FULL", {"synthetic": "{title}, {categories: }"})
    arguments = ["--data", str(tmp_path), "--work", str(tmp_path), "--datasets", "synthetic", "--model", model]
    assert text_tables.main([*arguments, "--pairs", "192"]) == 0  # three steps, the first at a learning rate of 0
    folder = tmp_path / "text" / "synthetic"
    files = {path.stem: path for path in folder.glob("*.safetensors")}
    assert files.keys() == set(text_tables.NAMES)
    loaded = load_dataset("synthetic", text="auto")
    rows = {name: load_text_table(path) for name, path in files.items()}
    assert all(table.items == list(loaded.dataset.vocab.items) for table in rows.values())
    assert loaded.items is not None
    full = text_tables.Template("{title}, {categories: }")
    for name, folder_or_name, template in (
        ("titles", model, text_tables.Template("{title}")),
        ("tuned", str(folder / "tuned-encoder"), full),
    ):
        texts = [template.render(row) for row in loaded.items.head(3).iter_rows(named=True)]
        made = load_encoder(folder_or_name, device="cpu").encode(texts)
        np.testing.assert_allclose(rows[name].embeddings[:3], made, atol=1e-5)
    untuned = load_encoder(model, device="cpu").encode(texts)
    assert np.abs(untuned - made).max() > 1e-3, "tuned"
    before = {path: path.stat().st_mtime_ns for path in files.values()}
    assert text_tables.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before, "made once"


def test_ties_are_events_of_one_user_and_time(tmp_path: Path) -> None:
    """In the order of the sequences, which is not that of the file."""
    lines = ["b,1,7", "a,1,5", "b,2,7", "a,2,5", "a,3,9", "a,4,5", "b,3,8", "b,4,8"]
    (tmp_path / "log.csv").write_text("user,item,timestamp\n" + "\n".join(lines))
    config = DataConfig(dataset="table", data=str(tmp_path / "log.csv"), user_min=0, item_min=0)
    found = ties.tied(config)
    assert found is not None
    # b: items 1 and 2 at 7, 3 and 4 at 8; a: items 1, 2 and 4 at 5, 3 at 9.
    assert found.tolist() == [False, True, False, True, False, True, True, False]
    SequenceDataset.from_log(read_log(tmp_path / "log.csv", "table")).save(tmp_path / "prepared")
    assert ties.tied(DataConfig(dataset="prepared", data=str(tmp_path / "prepared"))) is None


def test_what_is_known_about_the_data_is_said_beside_its_sizes() -> None:
    facts = {"users": 6040, "items": 3416, "events": 999_611, "median_length": 96}
    start, note = next(iter(tables.NOTES.items()))
    assert note in tables.datasets([{"data": {"ml-1m": {**facts, "fingerprint": start + "611326feddd0"}}}])
    assert note not in tables.datasets([{"data": {"ml-1m": {**facts, "fingerprint": "0" * 24}}}])
