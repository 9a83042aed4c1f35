"""The kernel benchmark: every peer computes the same function as the reference, and what is wrong gets no time."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import _bounds, _device_timing, _failure, _measure, _merge, _small, counters, kernels, roofline, sanitize
from bench._tree import tree_hash
from bench.peers import _cufft
from bench.peers._problem import INPUTS, Peer, Problem, Shape
from bench.peers.embed_norm import Joined
from bench.peers.last_state import problem as last_state_problem
from fastm2rec import ops

CPU = torch.device("cpu")
CEILINGS = _bounds.Ceilings(special=1e9, operations=1e9, bytes=1e9)
STATELESS = ("spectral_projection", "gated_fusion", "cross_entropy", "embed_norm", "output_ffn", "causal_conv1d")
# Without a target on CUDA: there they are torch's, or are made of ops that have rows, or are a part of one.
NO_TARGET = {"last_scan", "filtered_last_scan", "cross_entropy", "embed_norm", "output_ffn", "causal_conv1d"}


def _shape(op: str, phase: str = "forward") -> Shape:
    return Shape(op, phase, "float32", 2, 9, None if op in STATELESS else 4)


def _problem(shape: Shape) -> Problem:
    return importlib.import_module(f"bench.peers.{shape.op}").problem(shape, CPU, False)


def _errors(shape: Shape) -> dict[str, float]:
    """Of every peer that runs here, Triton's in the interpreter among them."""
    problem = _problem(shape)
    dy = _measure.gradient(problem, shape)
    expected = list(_measure.reference_results(problem, shape, dy))
    found = {}
    for peer in problem.peers:
        if peer.run is None or peer.mode != "eager" or (dy is not None and not peer.trains):
            continue
        error = _measure.error_of(_measure.caller(peer, problem, shape, dy)(0), expected)
        assert error <= _measure.TOLERANCE["float32"] + peer.error, peer.impl
        found[peer.impl] = error
    return found


@pytest.mark.parametrize("op", kernels.OPS)
def test_every_peer_computes_the_op(op: str) -> None:
    assert len(_errors(_shape(op))) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in kernels.OPS if op != "encode_last"])
def test_every_peer_has_the_gradients(op: str) -> None:
    assert len(_errors(_shape(op, "training"))) >= 2


def test_the_references_gradients_are_those_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows at a time, weights' gradients summed; the split changes the order of sums only."""
    shape = Shape("last_scan", "training", "float32", 5, 9, 4)
    problem = _problem(shape)
    dy = _measure.gradient(problem, shape)
    whole = list(_measure.reference_results(problem, shape, dy))
    monkeypatch.setattr(_measure, "REFERENCE_ROWS", 2)
    parts = list(_measure.reference_results(problem, shape, dy))
    assert len(whole) == 1 + sum(problem.learned)
    assert _measure.error_of(parts, whole) < 1e-6


def test_a_wrong_peer_and_one_that_fails_get_no_time() -> None:
    shape = _shape("spectral_projection")
    problem = _problem(shape)

    def wrong(*arguments: torch.Tensor) -> torch.Tensor:
        return problem.reference(*arguments) * 1.01

    def failing(*arguments: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel\nand more")

    def silent(*arguments: torch.Tensor) -> torch.Tensor:
        return torch.full_like(problem.reference(*arguments), math.nan)

    peers = [
        Peer("right", "eager", problem.reference), Peer("wrong", "eager", wrong), Peer("failing", "eager", failing),
        Peer("nan", "eager", silent), Peer("late", "compiled", wrong), Peer("triton", "eager", wrong),
    ]  # fmt: skip
    rows = _measure.measure(shape, problem, peers, CPU, CEILINGS, seconds=0.0, stop=0.0)
    assert [row.median_ms is not None for row in rows] == [True, False, False, False, False, False]
    assert rows[0].bound_share == pytest.approx((rows[0].bound_ms or 0) / (rows[0].median_ms or 1))
    reasons = [row.skipped or "" for row in rows]
    assert reasons[1].startswith("wrong: differs from its reference by 1.0e-02")
    assert reasons[2] == "RuntimeError: no such kernel ... and more"
    assert reasons[3].startswith("wrong: differs from its reference by inf")
    assert "--budget-seconds" in reasons[4]
    assert reasons[5] == "Triton's interpreter is never timed"


@pytest.mark.parametrize("when", [1, 4])
def test_a_peer_that_loses_the_gpu(when: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its check, or while it is warmed up: the others' times are another process's to take."""
    shape = _shape("gated_fusion")
    problem = _problem(shape)
    calls = {"bad": 0, "good": 0}

    def fail() -> None:
        if calls["bad"] >= when:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def good(*arguments: torch.Tensor) -> torch.Tensor:
        fail()
        return problem.reference(*arguments)

    def bad(*arguments: torch.Tensor) -> torch.Tensor:
        calls["bad"] += 1
        return good(*arguments)

    monkeypatch.setattr(_failure, "is_lost", lambda device: calls["bad"] >= when)
    peers = [Peer("one", "eager", good), Peer("bad", "eager", bad), Peer("two", "eager", good)]
    rows = _measure.measure(shape, problem, peers, CPU, CEILINGS, seconds=0.0, stop=0.0)
    assert [row.skipped for row in rows] == [
        _failure.WAITING,
        "lost the GPU: RuntimeError: CUDA error: an illegal memory access was encountered",
        _failure.WAITING,
    ]
    assert [_merge.is_final(dataclasses.asdict(row)) for row in rows] == [False, True, False]


def test_the_work_of_the_last_state_by_hand() -> None:
    """B=2, L=9, E=128: N exponentials and softplus' two functions a place; u, delta and B are read."""
    places = 2 * 9
    exact, nodes = (
        last_state_problem(_shape("last_state"), CPU, False).work,
        next(p for p in last_state_problem(_shape("last_state"), CPU, False).peers if "nodes" in p.impl).work,
    )
    assert nodes is not None
    assert exact.special == places * 128 * (4 + 2)
    assert nodes.special == places * 128 * (2 + 2)
    assert exact.bytes == nodes.bytes == places * (128 + 128 + 4) * 4


def test_the_work_of_the_training_ops_by_hand() -> None:
    """B=2, L=9, D=64: a score is an exponential and three products; an item is read twice and its gradient written."""
    loss = _problem(_shape("cross_entropy", "training")).work
    assert loss.special == 2 * 3706 + 2
    assert loss.operations == 3 * 2 * 2 * 3706 * 64
    assert loss.bytes == 4 * (2 * 2 * 64 + 3706 * 64 + 3707 * 64) + 8 * 2
    norm = _problem(_shape("embed_norm", "training")).work
    assert norm.operations == 18 * 64 * (7 + 14)
    assert norm.bytes == 4 * 64 * (2 * (18 + 18 + 2) + 3707) + 2 * 8 * 18
    # E=128, D=64, H=256: three products, forward and twice backward; two LayerNorms.
    ffn = _problem(_shape("output_ffn", "training")).work
    assert ffn.special == 2 * 256
    assert ffn.operations == 2 * (6 * 64 * (128 + 256 + 256) + 2 * 64 * (7 + 11))
    assert ffn.bytes == 2 * 4 * (64 * (128 + 2 * 256) + 5 * 64 + 256 + 2 * (128 + 64))
    # R=1, N=4, E=128: on the columns 2 (64 + 128) a place and 128 (128 + 4) a row, the scan 2 (4 + N) + 2 * 4 + 4 N.
    scan = _problem(_shape("filtered_last_scan", "forward")).work
    assert scan.operations == 18 * 2 * (64 + 128) + 2 * 128 * (128 + 4) + 18 * 128 * (2 * (4 + 4) + 2 * 4 + 4 * 4)
    assert scan.special == 18 * 128 * (4 + 3)
    assert scan.bytes == 4 * 18 * 64
    # E=128: 4 taps for y, dx and dw, a bias and its gradient; x and y, and x, dy and dx.
    conv = _problem(_shape("causal_conv1d", "training")).work
    assert conv.operations == 18 * 128 * (3 * 2 * 4 + 2)
    assert conv.bytes == 4 * 18 * 128 * 5


def test_a_loss_over_padding_and_a_wrong_last_position_are_found() -> None:
    """What the two ops return has no row for each of the batch, or is two tensors: all of it is compared."""
    loss = _shape("cross_entropy", "training")

    def with_padding(query: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(query @ weight.t(), targets, reduction="sum").expand(len(query))

    norm = _shape("embed_norm", "training")

    def first_is_newest(ids: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor, *norm: Any) -> torch.Tensor:
        x, _ = ops.embed_norm(ids, lengths, table, *norm, impl="reference")
        return Joined.apply(x, x[:, 0].clone())

    for shape, wrong in ((loss, with_padding), (norm, first_is_newest)):
        problem = _problem(shape)
        peers = [Peer("right", "eager", problem.reference), Peer("wrong", "eager", wrong)]
        rows = _measure.measure(shape, problem, peers, CPU, CEILINGS, seconds=0.0, stop=0.0)
        assert rows[0].median_ms is not None
        assert (rows[1].skipped or "").startswith("wrong: differs from its reference by")


def test_a_loss_of_more_rows_than_the_reference_takes_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cpu", "--ops", "cross_entropy", "--batch", "513", "--seq-len", "7"]
    kernels.main(flags)
    said = capsys.readouterr().out
    assert "cross_entropy training, float32, B=513\n" in said.replace(" ()", ""), "no length"
    assert "batch: expected at most 512" in said


def test_a_run_resumes_row_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, figure = tmp_path / "kernels.json", tmp_path / "roofline.png"
    flags = ["--device", "cpu", "--core", "--ops", "spectral_projection", "--phase", "forward", "--batch", "2"]
    flags += ["--seq-len", "9", "--eager-only", "--out", str(out)]
    kernels.main([*flags, "--budget-seconds", "0"])
    unreached = json.loads(out.read_text())["rows"]
    assert not any(row["median_ms"] for row in unreached)
    late = {row["impl"] for row in unreached if "--budget-seconds" in row["skipped"]}
    assert {"cpu", "torch.fft", "matrix products"} <= late
    kernels.main([*flags, "--resume", "--plot", str(figure)])
    document = json.loads(out.read_text())
    assert {"schema", "device", "torch", "triton", "python", "commit", "kernels_tree", "created"} <= document.keys()
    measured = {row["impl"]: row for row in document["rows"] if row["median_ms"]}
    assert set(measured) == {"cpu", "torch.fft", "matrix products"}
    for row in measured.values():
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    assert "x fastest" in capsys.readouterr().out
    assert figure.read_bytes().startswith(b"\x89PNG")
    kernels.main([*flags, "--resume"])
    again = {row["impl"]: row for row in json.loads(out.read_text())["rows"] if row["median_ms"]}
    assert again == measured, "a row that is there is not measured again"
    keys = [kernels.key(row) for row in json.loads(out.read_text())["rows"]]
    assert len(keys) == len(set(keys))


def test_what_may_end_the_process_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with every other row written, and is not tried a second time."""
    out = tmp_path / "kernels.json"
    flags = ["--device", "cpu", "--core", "--ops", "spectral_projection", "last_scan", "--batch", "2", "--seq-len", "9"]
    flags += ["--phase", "forward", "--eager-only", "--out", str(out), "--resume"]
    ended: list[list[dict[str, Any]]] = []

    def crash(*arguments: torch.Tensor) -> torch.Tensor:
        ended.append(json.loads(out.read_text())["rows"])
        raise SystemExit("a segmentation fault")

    monkeypatch.setattr(_cufft, "peers", lambda *_: [Peer("cuFFT (CuPy)", "eager", crash, foreign=True)])
    with pytest.raises(SystemExit, match="a segmentation fault"):
        kernels.main(flags)
    (rows,) = ended
    assert {row["op"] for row in rows if row["median_ms"]} == {"spectral_projection", "last_scan"}
    assert [row["impl"] for row in rows if row["skipped"] == kernels.ENDED] == ["cuFFT (CuPy)"]
    kernels.main(flags)
    assert len(ended) == 1
    monkeypatch.setattr(
        _cufft, "peers", lambda *_: [Peer("another", "eager", torch.nn.functional.linear, foreign=True)]
    )
    kernels.main(flags)
    (row,) = [row for row in json.loads(out.read_text())["rows"] if row["impl"] == "another"]
    assert row["skipped"].startswith("wrong: ")
    assert row["peak_mem_mb"] is None


def test_every_op_with_a_foreign_peer_is_known() -> None:
    for op in kernels.OPS:
        assert any(peer.foreign for peer in _problem(_shape(op)).peers) == (op in kernels.FOREIGN)


def test_every_input_is_seen_before_the_times_begin() -> None:
    assert _device_timing.WARM_UP >= INPUTS


HOST = """
#include <cstdio>
#include <cstring>
typedef float cufftReal; struct cufftComplex { float x, y; };
#define __device__
static unsigned __float_as_uint(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }
static float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
CALLBACKS
int main() {
    static NUMBER data[3 * 10 * 4];
    cufftComplex bins[3 * 4 * 6];
    for (int i = 0; i < 120; i++) { store_output(0, i, i * 10.03f, data, 0); }
    for (int i = 0; i < 72; i++) { bins[i] = {i + 1.f, 0.f}; }
    for (int i = 0; i < 120; i++) { printf("%.9g ", load_input(0, i, data, 0)); }
    for (int i = 0; i < 72; i++) { printf("%.9g ", load_bins(bins, i, 0, 0).x); }
    // b = 2, c = 3, t = 7 of [B, L, C] is offset (b * C + c) * L + t
    data[(2 * 10 + 7) * 4 + 3] = 0;
    printf("%.9g", load_input(0, (2 * 4 + 3) * 10 + 7, data, 0));
}
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_callbacks_of_cufft_on_the_host(dtype: str, tmp_path: Path) -> None:
    """B=3, C=4, L=10: transposed while written, rounded like torch, and read back; 2 of 6 bins pass."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    sources = _cufft.sources(Shape("spectral_projection", "forward", dtype, 3, 10, None), channels=4, kept=2)
    code = "".join(sources).replace("#include <cufftXt.h>", "")
    code = HOST.replace("CALLBACKS", code).replace("NUMBER", "float" if dtype == "float32" else "unsigned short")
    (tmp_path / "x.cpp").write_text(code)
    subprocess.run([compiler, "-o", str(tmp_path / "x"), str(tmp_path / "x.cpp")], check=True)
    said = subprocess.run([str(tmp_path / "x")], check=True, capture_output=True, text=True).stdout
    numbers = torch.tensor([float(word) for word in said.split()])
    offsets = torch.arange(120.0)
    written = (offsets * torch.tensor(10.03) / 10).to(getattr(torch, dtype)).float()
    assert torch.equal(numbers[:120], written), "what is stored at an offset is loaded from it"
    assert torch.equal(numbers[120:192].view(12, 6)[:, :2], torch.arange(1.0, 73.0).view(12, 6)[:, :2])
    assert not numbers[120:192].view(12, 6)[:, 2:].any()
    assert numbers[192] == 0, "the offset of a place in [B, L, C]"


def test_core_shapes_are_those_of_the_targets() -> None:
    core = kernels.CORE["cuda"]
    assert core[0] == Shape("spectral_projection", "forward", "bfloat16", 2048, 200, None)
    assert {shape.op for shape in core} == set(kernels.OPS) - NO_TARGET
    assert all(shape.dtype == "bfloat16" for shape in core)
    assert len({*core, *kernels.REST["cuda"]}) == len(core) + len(kernels.REST["cuda"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume"], "--resume: expected --out FILE"),
        (["--batch", "0"], "--batch: expected at least 1, got 0"),
        (["--ops", "fft"], "invalid choice: 'fft'"),
    ],
)
def test_wrong_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.parse(flags)
    assert message in capsys.readouterr().err


def test_no_roofline_without_a_bound(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at least one measured row with a bound"):
        roofline.draw([{"device": "x", "torch": "y", "rows": []}], tmp_path / "x.png")


def test_the_tree_is_named_as_git_names_it(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "a.py").write_text("x = 1\n")
    (folder / "deep.py").write_bytes(b"\xff\n")  # sorts before the folder of the same name
    (folder / "deep" / "er" / "b.sh").write_text("")
    (folder / "deep" / "er" / "b.sh").chmod(0o755)
    (folder / "link").symlink_to("a.py")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "a.pyc").write_bytes(b"1")
    git = ["git", "-c", "core.excludesFile=/dev/null"]
    try:
        subprocess.run([*git, "init", "-q"], cwd=folder, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("git is not installed")
    (folder / ".git" / "info" / "exclude").write_text("__pycache__\n")
    subprocess.run([*git, "add", "."], cwd=folder, check=True)
    written = subprocess.run([*git, "write-tree"], cwd=folder, check=True, capture_output=True, text=True)
    (folder / ".git").rename(tmp_path / ".git-elsewhere")
    assert tree_hash(folder) == written.stdout.strip()


def test_small_shapes_call_every_triton_peer() -> None:
    """In the interpreter: what compute-sanitizer is given runs, with masked lanes and a last tile that is not full."""
    shape = _small.shapes("last_state", hot=False)[0]
    assert shape.seq_len % 16
    assert {s.phase for s in _small.shapes("selective_scan", hot=False)} == {"forward", "training"}
    assert _small.run("gated_fusion", CPU) == 4


def test_tools_that_are_missing_are_said_to_be(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("PATH", "")
    assert sanitize.main([]) == 0
    assert counters.main([]) == 0
    said = capsys.readouterr().out
    assert "skipped: compute-sanitizer is not installed" in said
    assert "skipped: ncu is not installed" in said


def test_counters_are_read_from_ncus_table() -> None:
    assert {"last_state_exact_kernel", "fused_kernel", "_forward_kernel"} <= set(counters.kernel_names())
    text = """3 calls
==PROF== Disconnected
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","fused_kernel","GPU Speed Of Light Throughput","Duration","ns","9"
"1","fused_kernel","GPU Speed Of Light Throughput","Duration","ns","7"
"1","fused_kernel","Launch Statistics","Registers Per Thread","register/thread","128"
"""
    assert counters.read(text) == [{"kernel": "fused_kernel", "ns": "7", "regs": "128"}]
    assert counters.read("no table") == []


@pytest.mark.gpu
@pytest.mark.parametrize("op", _small.OPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu(op: str, dtype: str, device: torch.device) -> None:
    for shape in _small.shapes(op, hot=False):
        if shape.dtype != dtype:
            continue
        problem = importlib.import_module(f"bench.peers.{op}").problem(shape, device, False)
        peers = [dataclasses.replace(peer) for peer in problem.peers if not peer.mode.startswith("compiled")]
        rows = _measure.measure(shape, problem, peers, device, CEILINGS, seconds=0.0, stop=0.0)
        wrong = [f"{row.impl}: {row.skipped}" for row in rows if (row.skipped or "").startswith("wrong")]
        assert not wrong
        assert any(row.median_ms for row in rows if row.impl.startswith("triton"))
