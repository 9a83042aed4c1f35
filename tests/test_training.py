"""Training on a log whose structure a model can learn: every model and loss, and what a step does and does not do."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastm2rec import M2Rec, SequentialRecommender, Vocabulary
from fastm2rec.data import PrefixSamples, SequenceDataset
from fastm2rec.metrics import RankingMetrics
from fastm2rec.storage import load_tensors
from fastm2rec.training import DivergedError, Inputs, RunFolder, evaluate, evaluate_popularity, loop
from fastm2rec.training.evaluate import popularity, protocol
from fastm2rec.training.inputs import make_model
from fastm2rec.training.objective import AllPositions, Cloze, make_question
from fastm2rec.training.runtime import Runtime, derive
from fastm2rec.training.runtime import settings as runtime_settings
from tests import _runs

# 40 items in five groups: who knows the next group finds the item among 8, at NDCG@10 of about .5. Popularity knows
# nothing.
BIG = {"n_users": 120, "n_items": 40, "length": 14}
LEARN: dict[str, Any] = {"max_len": 8, "d_model": 16, "batch_size": 128, "epochs": 3, "lr": 0.01}
BERT: dict[str, Any] = {**LEARN, "batch_size": 24, "epochs": 12, "dropout": 0.0}


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("m2rec", LEARN),
        ("m2rec", {**LEARN, "gate": "scalar", "theta": 0.25, "mask": "soft", "amp": "bf16"}),
        ("mamba4rec", LEARN),
        ("mamba4rec", {**LEARN, "loss": "bce", "n_negatives": 4, "batch_size": 64, "dropout": 0.0, "epochs": 5}),
        ("mamba4rec", {**LEARN, "positions": "all", "batch_size": 16, "epochs": 6}),
        ("sasrec", LEARN),
        ("sasrec", {**LEARN, "positions": "all", "batch_size": 16, "epochs": 8, "amp": "bf16"}),
        ("bert4rec", BERT),
    ],
)
def test_every_model_learns_what_popularity_does_not_know(tmp_path: Path, model: str, options: dict[str, Any]) -> None:
    data = _runs.inputs(**BIG)
    result = _runs.run(tmp_path / "run", model, source=data, **options)
    by_popularity = evaluate_popularity(data.dataset, "test").compute()["NDCG@10"]
    best = SequentialRecommender.from_pretrained(tmp_path / "run" / "best")
    assert evaluate(best, data.dataset, "test").compute()["NDCG@10"] > 2 * by_popularity
    assert evaluate(best, data.dataset, "valid").compute()["NDCG@10"] == result.best
    lines = RunFolder(tmp_path / "run").metrics()
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert best.recommend([[1, 2, 3]], 3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("m2rec", {**LEARN, "d_state": 16}),
        ("m2rec", {**LEARN, "d_state": 16, "gate": "scalar", "gate_residual": True, "amp": "bf16"}),
        ("m2rec", {**LEARN, "d_state": 16, "filter_placement": "input", "theta": 0.25, "mask": "soft"}),
        ("mamba4rec", {**LEARN, "d_state": 16, "amp": "bf16"}),
        ("sasrec", LEARN),
    ],
)
def test_a_model_learns_on_a_gpu(tmp_path: Path, model: str, options: dict[str, Any]) -> None:
    data = _walk(**BIG)
    result = _runs.run(tmp_path / "run", model, source=data, **options, device="cuda")
    best = SequentialRecommender.from_pretrained(tmp_path / "run" / "best")
    reached = evaluate(best.to("cuda"), data.dataset, "valid").compute()["NDCG@10"]
    assert reached == pytest.approx(result.best, abs=0.02)  # bfloat16 in training
    by_popularity = evaluate_popularity(data.dataset, "test").compute()["NDCG@10"]
    best = best.to("cpu")
    if isinstance(best, M2Rec):
        best.impl = "reference"  # the CPU engine would be compiled first, for longer than all of this takes
    assert evaluate(best, data.dataset, "test").compute()["NDCG@10"] > 2 * by_popularity


def _walk(n_users: int, n_items: int, length: int) -> Inputs:
    """What `_runs.inputs` gives, made without polars, which a machine with a GPU may lack."""
    group = (torch.arange(length) + torch.randint(5, (n_users, 1))) % 5
    items = group + 5 * torch.randint(n_items // 5, (n_users, length)) + 1
    vocab = Vocabulary(list(range(1, n_items + 1)))
    offsets = length * torch.arange(n_users + 1)
    text = torch.randn(n_items + 1, 4)
    text[0] = 0
    return Inputs(SequenceDataset(items.flatten(), offsets, list(range(n_users)), vocab), text, ("memory",), "memory")


def test_lines_of_metrics_and_the_result_agree(tmp_path: Path) -> None:
    reported: list[str] = []
    config = _runs.config(epochs=5, eval_every=2)
    result = loop.train(config, tmp_path, inputs=_runs.inputs(), report=reported.append)
    lines = RunFolder(tmp_path).metrics()
    assert [(line["epoch"], line["step"]) for line in lines] == [(2, 6), (4, 12), (5, 15)]  # the last epoch, too
    assert len(reported) == 3
    assert all(set(line) == {"epoch", "step", "loss", "valid", "best", "learned", "clock"} for line in lines)
    assert all(
        set(line["valid"]) == {f"{name}@{k}" for name in ("HR", "NDCG", "MRR") for k in (10, 20)} for line in lines
    )
    best = max(line["valid"]["NDCG@10"] for line in lines)
    first = next(line for line in lines if line["valid"]["NDCG@10"] == best)
    assert (result.best, result.best_step) == (best, first["step"])
    assert (result.epochs, result.steps, result.early) == (5, 15, False)
    tops = [line["valid"]["NDCG@10"] for line in lines]
    assert [line["best"] for line in lines] == [top > max(tops[:i], default=-1) for i, top in enumerate(tops)]


def test_early_stopping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.1, 0.3, 0.2, 0.3, 0.4])  # an equal value is not a better one

    def scripted(*_: object, **__: object) -> Any:
        value = next(values)

        class Scripted:
            def compute(self) -> dict[str, float]:
                return {"NDCG@10": value, "HR@10": value}

        return Scripted()

    monkeypatch.setattr(loop, "evaluate", scripted)
    result = _runs.run(tmp_path / "run", epochs=10, patience=2)
    assert (result.best, result.best_step, result.epochs, result.early) == (0.3, 6, 4, True)
    resumed = _runs.run(tmp_path / "run", epochs=10, patience=2, resume="last")
    assert resumed == result
    more = _runs.run(tmp_path / "run", epochs=5, patience=3, resume="last")
    assert (more.best, more.epochs, more.early) == (0.4, 5, False)


@pytest.mark.parametrize("model", list(_runs.MODELS))
def test_the_seed_decides_every_bit(tmp_path: Path, model: str) -> None:
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        torch.manual_seed(len(name))  # the caller's state has no part in it
        before = torch.get_rng_state()
        _runs.run(tmp_path / name, model, seed=seed, loss="bce")
        assert torch.equal(torch.get_rng_state(), before)
    for file in ("last.safetensors", "previous.safetensors", "best/model.safetensors", "best/config.json", "run.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "same" / file).read_bytes(), file
    assert (tmp_path / "one" / "last.safetensors").read_bytes() != (
        tmp_path / "other" / "last.safetensors"
    ).read_bytes()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The gradients that each step of Adam is given, and its size: the list grows as a run goes on."""
    taken: list[dict[str, Any]] = []
    step = torch.optim.Adam.step

    def spy(self: torch.optim.Adam, *args: Any, **kwargs: Any) -> Any:
        gradients = [p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None]
        taken.append({"gradients": gradients, "norm": float(torch.nn.utils.get_total_norm(gradients))})
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    return taken


def test_clipping_bounds_the_gradient_and_keeps_its_direction(tmp_path: Path, steps: list[dict[str, Any]]) -> None:
    _runs.run(tmp_path / "free", clip=0.0)
    free = steps.copy()
    steps.clear()
    clip = min(step["norm"] for step in free) / 2
    _runs.run(tmp_path / "clipped", clip=clip)
    assert len(free) == len(steps) == 6
    # torch divides by the norm plus 1e-6, so the result is below the bound, up to float32 rounding.
    assert all(0.9 * clip < step["norm"] <= clip * (1 + 1e-6) for step in steps)
    scale = clip / (free[0]["norm"] + 1e-6)
    for ours, whole in zip(steps[0]["gradients"], free[0]["gradients"], strict=True):
        torch.testing.assert_close(ours, whole * scale, rtol=4 * 2.0**-23, atol=0)


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models in float64, where a sum in another order changes 1e-16 of it, and Adam, whose eps is 1e-8, makes at most
    lr * 1e-8 out of that; a wrong weight of a piece changes percents. `CLOSE` lies between."""
    monkeypatch.setattr(loop, "make_model", lambda config, inputs: make_model(config, inputs).double())


CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-9}


def _weights(folder: Path) -> dict[str, Tensor]:
    return {name: value for name, value in load_tensors(folder / "last.safetensors")[0].items() if "model/" in name}


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("model", "options"), [("mamba4rec", {}), ("sasrec", {"positions": "all"}), ("m2rec", {"spectrum": "valid"})]
)
def test_pieces_of_a_batch_do_not_change_the_step(tmp_path: Path, model: str, options: dict[str, Any]) -> None:
    for name, micro_batch in (("whole", 1000), ("pieces", 7), ("single", 1)):  # 7 leaves an odd piece
        _runs.run(tmp_path / name, model, micro_batch=micro_batch, dropout=0.0, epochs=1, **options)
    whole = _weights(tmp_path / "whole")
    for name in ("pieces", "single"):
        for key, value in _weights(tmp_path / name).items():
            torch.testing.assert_close(value, whole[key], **CLOSE, msg=key)
        ours, theirs = (RunFolder(tmp_path / run).metrics()[0] for run in (name, "whole"))
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
        assert ours["valid"] == theirs["valid"]


@pytest.mark.parametrize("positions", ["last", "all"])
def test_the_loss_is_the_mean_over_targets(tmp_path: Path, positions: str) -> None:
    # With a learning rate of next to nothing the model stays what it was, so the mean over an epoch can be computed.
    _runs.run(tmp_path, positions=positions, lr=1e-30, epochs=1, dropout=0.0)
    model = make_model(_runs.config(dropout=0.0), _runs.inputs()).double()
    samples = PrefixSamples(_runs.inputs().dataset, model.max_len)
    if positions == "all":  # the last 6 of the 7 targets of each user, from the sequence that starts one item later
        samples.targets = samples.targets.view(24, 7)[:, 1:].flatten()
        samples.user_of = samples.user_of.view(24, 7)[:, 1:].flatten()
    batch = samples.batch(torch.arange(len(samples)))
    item_ids, lengths = batch.item_ids, batch.lengths
    if positions == "all":
        first = samples.dataset.offsets[batch.users] + 1
        lengths = samples.targets - first
        slots = torch.arange(6)
        item_ids = samples.dataset.items[first[:, None] + slots].masked_fill(slots >= lengths[:, None], 0)
    with torch.no_grad():
        scores = model(item_ids, lengths) @ model.item_weight[1:].t()
        expected = torch.nn.functional.cross_entropy(scores, batch.targets - 1)
    # float32 against float64: a sum of at most 168 losses of about 3.
    assert RunFolder(tmp_path).metrics()[0]["loss"] == pytest.approx(float(expected), rel=168 * 2.0**-24)


def test_prefixes_per_user(tmp_path: Path) -> None:
    assert _runs.run(tmp_path / "all", epochs=1, batch_size=24).steps == 7  # 24 users with 7 training targets each
    assert _runs.run(tmp_path / "two", epochs=1, batch_size=24, prefixes_per_user=2).steps == 2
    for options in ({"model": "bert4rec"}, {"positions": "all"}):
        with pytest.raises(ValueError, match="prefixes_per_user: expected None .* samples are whole sequences, got 2"):
            _runs.run(tmp_path / "none", prefixes_per_user=2, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("model", "why"), [("m2rec", "low-pass filter mixes"), ("bert4rec", "both directions")])
def test_a_loss_at_every_position_is_refused_where_it_leaks(tmp_path: Path, model: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"positions: expected 'last' with model={model}, got 'all'; .*{why}"):
        _runs.run(tmp_path / "run", model, positions="all")
    assert not (tmp_path / "run").exists()


def test_m2rec_without_a_filter_or_with_one_that_passes_all_may_train_at_every_position(tmp_path: Path) -> None:
    for options in ({"filter_placement": "none"}, {"theta": 0.5}):
        name = "-".join(options)
        assert _runs.run(tmp_path / name, "m2rec", positions="all", epochs=1, **options).steps == 3


def test_all_positions_ask_for_what_prefixes_ask_for() -> None:
    dataset = _runs.inputs().dataset
    question = AllPositions(dataset, 6)
    item_ids, lengths, targets = question.batch(torch.arange(3))
    for row in range(3):
        events = dataset.sequence(row)[:-2].tolist()[-7:]  # less validation and test
        n = int(lengths[row])
        assert n == len(events) - 1
        assert item_ids[row].tolist() == events[:-1] + [0] * (item_ids.shape[1] - n)
        assert targets[row].tolist() == events[1:] + [0] * (targets.shape[1] - n)


def test_cloze_masks_what_it_asks_for_and_nothing_held_out() -> None:
    dataset = _runs.inputs().dataset
    question = Cloze(dataset, 6, mask_prob=0.25, mask_token=99)
    order = question.epoch_indices(0, 5)
    assert torch.equal(torch.bincount(order), torch.full((24,), 4))
    assert not torch.equal(order[:24], order[24:48])
    assert torch.equal(order, question.epoch_indices(0, 5))
    assert not torch.equal(order, question.epoch_indices(1, 5))
    last_only = 0
    for _ in range(40):
        item_ids, lengths, targets = question.batch(torch.arange(24))
        masked = item_ids == 99
        assert torch.equal(masked, targets != 0)
        assert masked.any(dim=1).all()
        restored = torch.where(masked, targets, item_ids)
        for row in range(24):
            assert restored[row, : lengths[row]].tolist() == dataset.sequence(row)[:-2].tolist()[-7:]
        last_only += int(((masked.sum(dim=1) == 1) & masked[:, -1]).sum())
    # Half of the sequences, and some more by chance: P(last alone) = .25 * .75^6, P(none) = .75^7. Five deviations.
    share = 0.5 + 0.5 * (0.25 * 0.75**6 + 0.75**7)
    assert abs(last_only / 960 - share) < 5 * math.sqrt(share * (1 - share) / 960)


def test_diverging_is_noticed_and_the_older_checkpoint_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = torch.optim.Adam.step
    calls = 0

    def poisoned(self: torch.optim.Adam, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        step(self, *args)
        if calls == 5:
            with torch.no_grad():
                self.param_groups[0]["params"][0][3] = float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", poisoned)
        told = (
            "after step 5: the weights are not finite: .* in item_embedding.weight; the checkpoint of step 4 is kept. A"
        )
        with pytest.raises(DivergedError, match=told):
            _runs.run(tmp_path / "run", checkpoint_every=1, epochs=2)
        calls = 0
        with pytest.raises(
            DivergedError, match="step 6: the loss or its gradient is not finite: .*checkpoint of step 3"
        ):
            _runs.run(tmp_path / "late", epochs=2)
    _runs.run(tmp_path / "run", checkpoint_every=1, epochs=2, resume="last")
    _runs.run(tmp_path / "whole", checkpoint_every=1, epochs=2)
    assert (tmp_path / "run/last.safetensors").read_bytes() == (tmp_path / "whole/last.safetensors").read_bytes()


@pytest.mark.parametrize("lr", [1e30, 1e39])
def test_a_wild_learning_rate_diverges(tmp_path: Path, lr: float) -> None:
    with pytest.raises(DivergedError, match=r"step [12].* not finite.* no checkpoint was written before"):
        _runs.run(tmp_path, lr=lr)
    assert not list(tmp_path.glob("*.safetensors"))
    assert not (tmp_path / "best").exists()


def test_a_model_with_nan_is_not_evaluated() -> None:
    model = make_model(_runs.config(), _runs.inputs())
    with torch.no_grad():
        model.item_weight[5, 0] = float("nan")
    with pytest.raises(ValueError, match="the scores hold NaN or infinity"):
        evaluate(model, _runs.inputs().dataset)


def test_evaluation_ranks_the_held_out_item() -> None:
    dataset = _runs.inputs().dataset
    model = make_model(_runs.config(), _runs.inputs()).train()
    for split, place in (("valid", -2), ("test", -1)):
        for mask_history in (False, True):
            expected = RankingMetrics()
            for user in range(dataset.n_users):
                events = dataset.sequence(user).tolist()
                history, target = events[:place], events[place]
                model.eval()
                with torch.no_grad():
                    recent = history[-model.max_len :]
                    query = model(torch.tensor([recent]), torch.tensor([len(recent)]))
                scores = (query.double() @ model.item_weight.double().t())[0]
                better = scores[1:] > scores[target]
                if mask_history:
                    better[torch.tensor(history) - 1] = False
                expected.update(1 + better.sum())
            model.train()
            ours = evaluate(model, dataset, split, mask_history=mask_history, batch_size=7)  # type: ignore[arg-type]
            assert ours.compute() == expected.compute()
            assert model.training


def test_popularity_counts_the_training_part_alone() -> None:
    dataset = _runs.inputs().dataset
    expected = torch.zeros(dataset.n_items + 1, dtype=torch.int64)
    for user in range(dataset.n_users):
        for item in dataset.sequence(user)[:-2].tolist():
            expected[item] += 1
    assert torch.equal(popularity(dataset), expected)
    order = sorted(range(1, dataset.n_items + 1), key=lambda item: -int(expected[item]))
    ranks = [order.index(int(dataset.sequence(user)[-1])) + 1 for user in range(dataset.n_users)]
    by_hand = RankingMetrics()
    by_hand.update(torch.tensor(ranks))
    assert evaluate_popularity(dataset, "test").compute() == by_hand.compute()


def test_more_processes_than_users_or_samples() -> None:
    """One user for three processes: two have nothing to rank, and all three get the counts of all."""
    whole = _runs.inputs().dataset
    one = SequenceDataset(whole.items[:10], whole.offsets[:2], whole.users[:1], whole.vocab)
    model = make_model(_runs.config("m2rec"), _runs.inputs())
    counts = []
    for rank in range(3):
        runtime = Runtime("cpu")
        runtime.rank, runtime.processes = rank, 3
        counts.append(evaluate(model, one, mask_history=True, runtime=runtime).counts)
    assert torch.equal(sum(counts), evaluate(model, one, mask_history=True).counts)  # type: ignore[arg-type]


_FAULTS = """
import resource, sys, torch
from fastm2rec.training.runtime import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        tensors = [torch.ones(2**22) for _ in range(4)]  # 64 MB, of which glibc gives most back
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
plain = faults()
keep_freed_memory()
faults()
print(plain, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other allocators")
def test_freed_memory_is_kept() -> None:
    """The second round of the same tensors touches no new page."""
    done = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True)
    plain, kept = map(int, done.stdout.split())
    if plain < 1000:
        pytest.skip("this C library keeps memory by itself")
    assert kept < plain / 10


def test_the_protocol_in_words() -> None:
    text = protocol(_runs.config().data, _runs.inputs().dataset, "valid", mask_history=True, users=24)
    for part in (
        "synthetic",
        "5 events or more (k-core)",
        "the second to last item of each of 24 users",
        "all 20 items",
    ):
        assert part in text
    assert "less those of the history" in text


def test_tensorboard_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _runs.run(tmp_path, batch_size=4, tensorboard=True)  # 42 steps an epoch
    lines = RunFolder(tmp_path).metrics()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/step_loss")] == [50]
    for name in ("HR@10", "NDCG@20"):
        written = [(event.step, event.value) for event in events.Scalars(f"valid/{name}")]
        assert written == [(line["step"], pytest.approx(line["valid"][name])) for line in lines]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([line["loss"] for line in lines])
    _runs.run(tmp_path / "none")
    assert not (tmp_path / "none" / "tensorboard").exists()


def test_the_progress_bar_shows_loss_and_rate_on_a_terminal_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _runs.run(tmp_path / "quiet")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    monkeypatch.setattr("fastm2rec.training.monitor._REFRESH", 0.0)
    _runs.run(tmp_path / "shown", batch_size=2)  # long enough for tqdm, which draws ten times a second
    out, err = capsys.readouterr()
    assert out == ""
    assert "epoch 1/2" in err
    assert "samples/s" in err
    assert "loss " in err


def test_a_run_on_the_command_lines_own_data(tmp_path: Path) -> None:
    """Without data in memory the options name it; the generator needs no file."""
    result = loop.train(_runs.config(epochs=1, prefixes_per_user=1, batch_size=500), tmp_path, report=lambda line: None)
    assert result.steps == 1
    assert RunFolder(tmp_path).manifest()["data"]["users"] == 500


def test_a_gate_that_reads_text_needs_some(tmp_path: Path) -> None:
    data = _runs.inputs()
    without = type(data)(data.dataset)
    with pytest.raises(ValueError, match="gate='scalar' reads text embeddings of the items, and no file text"):
        _runs.run(tmp_path, "m2rec", gate="scalar", source=without)
    with pytest.raises(ValueError, match="--text is none; name a table with --text FILE, or train without text"):
        _runs.run(tmp_path, "m2rec", gate="scalar", text="none", source=without)
    assert _runs.run(tmp_path, "m2rec", gate="scalar", epochs=1).steps == 3


def test_an_unknown_device_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device: expected auto, cpu, cuda or cuda:N, got 'abacus'"):
        _runs.run(tmp_path, device="abacus")
    with pytest.raises(ValueError, match="device: cuda:99 was asked for, and torch sees "):
        _runs.run(tmp_path, device="cuda:99")


def test_settings_are_put_back() -> None:
    def state() -> tuple[object, ...]:
        return (
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        )

    before = state()
    threads = torch.get_num_threads() + 1

    def interrupted() -> None:
        with runtime_settings(threads, deterministic=True):
            assert state() == (threads, True, False)
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert state() == before


def test_derived_seeds_do_not_collide() -> None:
    seeds = {derive(seed, step, rank) for seed in range(12) for step in range(120) for rank in range(3)}
    assert len(seeds) == 12 * 120 * 3
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive(1, 23) != derive(12, 3)
    # A change of this value changes every published run.
    assert derive(0, "model") == 7950438430984455888


def test_the_question_is_as_the_options_say() -> None:
    data = _runs.inputs()

    def kind(model: str, **options: Any) -> str:
        config = _runs.config(model, **options)
        return type(make_question(config, make_model(config, data), data.dataset)).__name__

    assert kind("m2rec") == "Prefixes"
    assert kind("sasrec", positions="all") == "AllPositions"
    assert kind("bert4rec") == "Cloze"


SEVERAL = """
import json, sys
from pathlib import Path
from tests import _runs
from fastm2rec.training import loop
from fastm2rec.training.inputs import make_model

loop.make_model = lambda config, inputs: make_model(config, inputs).double()
for name, options in json.loads(sys.argv[2]).items():
    _runs.run(Path(sys.argv[1]) / name, dropout=0.0, **options)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("in_float64")
@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
def test_two_processes_take_the_steps_of_one(tmp_path: Path, root: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "m2rec": {"model": "m2rec", "micro_batch": 11},  # in pieces, the last of other sizes in the two processes
        "all": {"model": "sasrec", "positions": "all"},
        # 168 prefixes in batches of 167 leave one sample: a process has none.
        "idle": {"model": "sasrec", "batch_size": 167},
    }
    script = tmp_path / "several.py"
    script.write_text(SEVERAL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(tmp_path / "two"), json.dumps(cases)],
        capture_output=True, text=True, check=False, cwd=root, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, options in cases.items():
        _runs.run(tmp_path / "one" / name, dropout=0.0, **options)
        one, two = (RunFolder(tmp_path / count / name) for count in ("one", "two"))
        assert two.manifest()["processes"] == 2
        for ours, theirs in zip(two.metrics(), one.metrics(), strict=True):
            assert ours["valid"] == theirs["valid"]
            assert ours["step"] == theirs["step"]
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
        expected = _weights(one.path)
        for key, value in _weights(two.path).items():
            torch.testing.assert_close(value, expected[key], **CLOSE, msg=f"{name}: {key}")
