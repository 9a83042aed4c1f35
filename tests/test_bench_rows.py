"""What becomes of rows: bounds, timings, ratios, tables, figures and the result file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import _bounds, _device_timing, _failure, _modes, _plot, _results, _table, _timing
from fastm2rec.config import BERT4RecConfig, M2RecConfig, SASRecConfig

CPU = torch.device("cpu")


def row(model: str, mode: str, batch: int, ms: float | None, dtype: str = "float32", **fields: object) -> _results.Row:
    made = _results.Row(model, "x", mode, dtype, batch, 7, 4, 50, skipped=None if ms else "no reason")
    made.median_ms = made.p20_ms = made.p80_ms = ms
    made.sequences_per_s = batch / ms * 1e3 if ms else None
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_the_table_compares_with_the_fastest_sasrec_of_the_same_shape() -> None:
    rows = [
        row("m2rec", "eager", 1, 3.0),
        row("sasrec", "eager", 1, 6.0),
        row("sasrec", "compiled", 1, 4.0, "bfloat16"),
    ]
    rows += [row("sasrec", "eager", 9, 1.0), row("m2rec", "compiled", 1, None)]
    rows += [row("sasrec", "eager", 1, 1.0, phase="training"), row("sasrec", "eager", 1, 1.0, n_items=9)]
    assert _results.best_peer(rows, rows[0]) == 4.0
    assert _results.fastest_sasrec(rows, rows[0]) is rows[2], "whatever its dtype"
    lines = _table.table(rows).splitlines()
    assert "0.75" in lines[2]
    assert "x SASRec, batch 1, length 7, 50 items: against x, compiled, bfloat16: 4 ms" in lines
    assert lines[-1] == "skipped: no reason: m2rec x compiled"


def test_memory_is_compared_within_a_dtype_and_a_loss() -> None:
    def held(model: str, peak: float, positions: str, dtype: str = "float32") -> _results.Row:
        made = row(model, "eager", 1, 1.0, dtype, peak_mem_mb=peak, positions=positions)
        return made

    rows = [held("m2rec", 3.0, "last"), held("sasrec", 6.0, "last"), held("sasrec", 1.0, "all")]
    rows += [held("sasrec", 2.0, "last", "bfloat16")]
    assert _table.least_memory(rows, rows[0]) == 6.0
    assert "0.50" in _table.table(rows, ("model", "peak", "memory_ratio")).splitlines()[2]


def test_a_result_file_is_whole_after_every_row(tmp_path: Path) -> None:
    writer = _results.Writer(tmp_path / "deep" / "x.json", CPU, "latency")
    for count in (1, 2):
        writer.add([row("m2rec", "eager", count, 1.0)])
        document = json.loads((tmp_path / "deep" / "x.json").read_text())
        assert [one["batch"] for one in document["rows"]] == list(range(1, count + 1))
    assert document["rows"][0]["script"] == "latency"
    assert document["rows"][0]["threads"] == torch.get_num_threads()


def test_quantiles_of_samples() -> None:
    timing = _timing.summarise([0.001 * i for i in range(1, 12)])
    assert (timing.median_ms, timing.p20_ms, timing.p80_ms) == pytest.approx((6.0, 3.0, 9.0))
    assert timing.samples == 11


def test_calls_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_timing, "CPU_SAMPLE_SECONDS", 0.0)  # one call a sample
    seen: list[str] = []
    calls = [lambda turn: seen.append("a"), lambda turn: seen.append("b")]
    timings = _timing.interleave(calls, CPU, seconds=0.0, least=3, most=50)
    assert "".join(seen[-6:]) == "ababab"
    assert seen[:-6].count("a") == seen[:-6].count("b") == 3, "each is warmed up"
    assert all(isinstance(timing, _timing.Timing) and timing.cpu_ms is not None for timing in timings)


class _Event:
    """An event of a GPU on which every call takes a millisecond."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def elapsed_time(self, other: object) -> float:
        return 1.0


@pytest.mark.parametrize("is_lost", [False, True])
def test_times_of_a_gpu_outlive_a_call_that_fails(is_lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One fails at once, one in the fourth round: the others have their times, all of them or those so far."""
    monkeypatch.setattr(_device_timing, "FILL_BYTES", 8)
    slept: list[int] = []
    for name, value in (("Event", _Event), ("synchronize", lambda device: None), ("_sleep", slept.append)):
        monkeypatch.setattr(torch.cuda, name, value)
    calls = {"good": 0, "bad": 0}
    monkeypatch.setattr(_failure, "is_lost", lambda device: is_lost and calls["bad"] > _device_timing.WARM_UP + 3)

    def good(turn: int) -> None:
        calls["good"] += 1

    def bad(turn: int) -> None:
        calls["bad"] += 1
        if calls["bad"] > _device_timing.WARM_UP + 3:
            raise RuntimeError("an illegal memory access")

    def broken(turn: int) -> None:
        raise ValueError("no such kernel")

    timings = _device_timing.interleave([good, bad, broken, good], CPU, seconds=60.0, least=3, most=5)
    assert timings[2] == "ValueError: no such kernel"
    assert timings[1] == ("lost the GPU: " if is_lost else "") + "RuntimeError: an illegal memory access"
    for timing in (timings[0], timings[3]):
        assert isinstance(timing, _timing.Timing)
        assert (timing.median_ms, timing.samples) == (1.0, 3 if is_lost else 5)
    assert set(slept) == {_device_timing.HEAD_START_CYCLES}


def test_the_bound_is_the_slowest_resource() -> None:
    ceilings = _bounds.Ceilings(special=10.0, operations=100.0, bytes=1000.0, launch_s=3.0)
    assert ceilings.bound(_bounds.Work(special=20, operations=100, bytes=100, launches=0)) == (
        "special functions",
        2000.0,
    )
    assert ceilings.bound(_bounds.Work(special=1, operations=100, bytes=5000)) == ("memory", 5000.0)
    assert ceilings.bound(_bounds.Work(special=1, operations=1, bytes=1)) == ("launch", 3000.0)


def test_work_against_counts_by_hand() -> None:
    config = M2RecConfig(n_items=10, d_model=8, d_state=4, expand=2, d_conv=4, text_dim=8, max_len=6)
    exact = _bounds.inference(config, 3, 6, 4)
    assert exact.special == 3 * 6 * 16 * (4 + 3)
    assert exact.bytes == 4 * (10 * 8 + 3 * 10) + 8 * 3 * 6
    nodes = _bounds.inference(config, 3, 6, 4, folded=True, nodes=5)
    assert nodes.special == 3 * 6 * 16 * (2 + 3)
    # in_proj is gone at 6 positions for x and at one for z; the scan's 4 E N became 2 E K N.
    assert exact.operations - nodes.operations == 3 * (7 * 2 * 8 * 16 - 6 * 16 * (2 * 5 * 4 - 4 * 4))
    forgets = _bounds.inference(config, 3, 6, 4, forgets=True)
    assert forgets.special == 3 * 6 * 16 * 3
    assert exact.operations - forgets.operations == 3 * 6 * 16 * 4 * 4
    half = _bounds.inference(M2RecConfig(**{**config.to_dict(), "stride": 2}), 3, 6, 4)
    assert half.special == exact.special / 2


def test_a_transformers_operations_are_those_that_torch_counts() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from fastm2rec.baselines import BERT4Rec

    config = BERT4RecConfig(n_items=10, d_model=8, n_heads=2, max_len=6)
    model = BERT4Rec(config).eval()
    ids, lengths = torch.randint(1, 11, (3, 6)), torch.full((3,), 6)
    # The counter knows the products of plain attention, not those of a CPU's fused kernel.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        query = model.encode(ids, lengths)
        query @ model.item_weight[1:].t()
    # BERT4Rec reads a mask token beside its 6 items, and its head has one product more than is counted.
    assert _bounds.inference(config, 3, 7, 4).operations == counter.get_total_flops() - 3 * 2 * 8 * 8


def test_a_loss_at_all_positions_is_more_work() -> None:
    config = SASRecConfig(n_items=100, d_model=8)

    def work(queries: int, everywhere: bool) -> _bounds.Work:
        return _bounds.training(config, 2, 20, queries=queries, everywhere=everywhere, parameters=1000)

    last, everywhere = work(1, False), work(20, True)
    assert last.bytes == everywhere.bytes == 8 * 4 * 1000 + 8 * 2 * 20
    forward = _bounds.inference(config, 2, 20, 4)
    assert last.operations == 3 * forward.operations
    assert everywhere.operations - last.operations > 3 * 2 * 19 * 2 * 8 * 100, "19 more scorings, and a whole layer"


def test_compiled_functions_do_not_share_their_code() -> None:
    def made(factor: float) -> object:
        def run(x: torch.Tensor) -> torch.Tensor:
            return x * factor

        return _modes.compiled(run, CPU)

    first, second = (made(factor)._torchdynamo_orig_callable for factor in (1.0, 2.0))  # type: ignore[attr-defined]
    assert first.__code__ is not second.__code__


@pytest.mark.parametrize(
    ("search", "graphs", "mode"),
    [
        (True, True, "max-autotune"),
        (True, False, "max-autotune-no-cudagraphs"),
        (False, True, "reduce-overhead"),
        (False, False, "default"),
    ],
)
def test_a_row_says_whether_the_compiler_searched(
    search: bool, graphs: bool, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, object] = {}
    monkeypatch.setattr(torch, "compile", lambda function, **words: given.update(words))
    cuda = torch.device("cuda")
    _modes.compiled(lambda x: x, cuda, graphs, search)
    assert given["mode"] == mode
    assert _modes.named("compiled", cuda, search) == ("compiled" if search else "compiled, no search")
    assert _modes.named("graph", cuda, search) == "graph"
    assert _modes.named("compiled", CPU, search) == "compiled", "there is no search on a CPU"
    _modes.compiled(lambda x: x, CPU, graphs, search)
    assert given["mode"] == "default"


@pytest.mark.parametrize("lengths", [[7], [7, 9]])
@pytest.mark.parametrize("figure", [_plot.LATENCY, _plot.THROUGHPUT, _plot.MEMORY])
def test_figures(figure: _plot.Figure, lengths: list[int], tmp_path: Path) -> None:
    rows = [row("m2rec", "eager", batch, 3.0, peak_mem_mb=1.0, seq_len=n) for batch in (1, 2) for n in lengths]
    rows.append(row("sasrec", "compiled", 1, 2.0, "bfloat16", peak_mem_mb=2.0))
    _plot.draw(tmp_path / "x.png", rows, "a title", figure)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_no_figure_without_a_measured_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at least one measured row"):
        _plot.draw(tmp_path / "x.png", [], "", _plot.LATENCY)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("flags", "name", "folder"),
    [
        ("fma avx2", "Zed(R) 7 without AVX-512, 2 threads", "cpu-zed-7-without-avx-512"),
        ("fma avx2 avx512f", "Zed(R) 7, 2 threads", "cpu-zed-7"),
        ("fma avx2 avx512f amx_bf16", "Zed(R) 7, AMX, 2 threads", "cpu-zed-7"),
        ("asimd", "Zed(R) 7, 2 threads", "cpu-zed-7"),
    ],
)
def test_a_processor_is_named_by_what_it_can(
    flags: str, name: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"processor : 0\nmodel name : Zed(R) 7\nflags : {flags}\n"
    monkeypatch.setattr(_results.Path, "read_text", lambda path: text)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert _results.device_name(CPU) == name
    assert _results.record_folder(name, "cpu").name == folder
    assert _results.result_path("latency", CPU, None, record=True).parent.name == folder


def test_what_emulates_half_precision_may_compute_in_single(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.float32: 1.0, torch.bfloat16: 50.0}

    def best(call: Any, threads: int | None = None) -> float:
        return seconds[call.args[0].dtype] if hasattr(call, "args") else 1.0

    monkeypatch.setattr(_bounds, "_best", best)
    single, half = (_bounds.measure_ceilings(CPU, dtype).operations for dtype in (torch.float32, torch.bfloat16))
    assert half == single
    seconds[torch.bfloat16] = 0.5
    assert _bounds.measure_ceilings(CPU, torch.bfloat16).operations == 2 * single
