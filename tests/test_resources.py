"""The gates on what compiled kernels need: every op passes them, and kernels made to break one are told apart.

Compiling takes a process without Triton's interpreter, which the other tests run in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import _gates, _results, _sass, resources
from bench.launches._launch import ops

pytest.importorskip("triton")
from bench import _report

SASS = """
	code for sm_90a
		Function : toy
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
                                                                          /* 0x000fe20000000800 */
        /*0010*/                   MUFU.EX2 R0, R1 ;                      /* 0x0000000100007308 */
        /*0020*/                   LDG.E R2, [R4] ;                       /* 0x0000000100007308 */
        /*0030*/             @!P0 BRA 0x20 ;                              /* 0x0000000100007308 */
        /*0040*/                   MUFU.RCP R0, R1 ;                      /* 0x0000000100007308 */
        /*0050*/             @P1   MUFU.EX2 R0, R1 ;                      /* 0x0000000100007308 */
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, R24 ;     /* 0x0000000100007308 */
        /*0070*/                   BRA.DIV ~URZ, 0x100 ;                  /* 0x0000000100007308 */
        /*0080*/                   FFMA R0, R1, R2, R3 ;                  /* 0x0000000100007308 */
        /*0090*/             @UP2  UIADD3 UR4, UR4, 0x1, URZ ;            /* 0x0000000100007308 */
        /*00a0*/                   BRA.U !UP0, 0x80 ;                     /* 0x0000000100007308 */
        /*00b0*/             @P3 BRA 0x40 ;                               /* 0x0000000100007308 */
        /*00c0*/                   MUFU.EX2 R0, R1 ;                      /* 0x0000000100007308 */
        /*00d0*/             @P4 BRA 0x120 ;                              /* 0x0000000100007308 */
        /*00e0*/                   STG.E.128 [R2], R4 ;                   /* 0x0000000100007308 */
        /*00f0*/                   EXIT ;                                 /* 0x0000000100007308 */
        /*0100*/                   WARPSYNC.COLLECTIVE R0, 0x110 ;        /* 0x0000000100007308 */
        /*0110*/                   BRA 0x80 ;                             /* 0x0000000100007308 */
        /*0120*/                   MUFU.RSQ R0, R1 ;                      /* 0x0000000100007308 */
        /*0130*/                   BRA 0xe0 ;                             /* 0x0000000100007308 */
        /*0140*/                   BRA 0x140;                             /* 0x0000000100007308 */
        /*0150*/                   NOP;                                   /* 0x0000000100007308 */
"""

LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'toy' for 'sm_90a'
ptxas info    : Function properties for toy
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, {stack} bytes cumulative stack size
"""


def _addresses(code: list[_sass.Instruction], body: frozenset[int]) -> set[int]:
    return {code[i].address for i in body}


def test_instructions_carry_guards_and_targets() -> None:
    code = _sass.instructions(SASS)
    assert [instruction.address for instruction in code] == list(range(0, 0x150, 0x10)), "padding is left out"
    by_address = {instruction.address: instruction for instruction in code}
    assert by_address[0x50] == _sass.Instruction(0x50, "P1", "MUFU.EX2", "R0, R1")
    assert {address: one.target() for address, one in by_address.items() if one.target() is not None} == {
        0x30: 0x20, 0x70: 0x100, 0xA0: 0x80, 0xB0: 0x40, 0xD0: 0x120, 0x110: 0x80, 0x130: 0xE0, 0x140: 0x140,
    }  # fmt: skip
    assert {address for address, one in by_address.items() if not one.falls_through()} == {0xF0, 0x110, 0x130, 0x140}
    assert {kind: _sass.count(code, kind) for kind in _sass.KINDS} == {
        "dot": 1, "mufu": 5, "ffma": 1, "ldg": 1, "stg": 1, "lds": 0, "sts": 0, "shfl": 0, "bar": 0,
    }  # fmt: skip


@pytest.mark.parametrize("opcode", ["HMMA.16816.F32", "HGMMA.64x64x16.F32", "UTCHMMA", "UTCQMMA.2CTA", "DMMA.884"])
def test_dots_of_every_generation_are_seen(opcode: str) -> None:
    assert _sass.count([_sass.Instruction(0, None, opcode, "")], "dot") == 1


def test_loops_are_ways_back_not_branches_back() -> None:
    """Code moved behind the end returns by branches back (0x110, 0x130), which close no loop of their own."""
    code = _sass.instructions(SASS)
    inner = {0x80, 0x90, 0xA0}
    outer = {0x40, 0x50, 0x60, 0x70, *inner, 0xB0, 0x100, 0x110}
    found = {frozenset(_addresses(code, body)) for body in _sass.loops(code)}
    assert found == {frozenset({0x20, 0x30}), frozenset(inner), frozenset(outer)}


def test_the_hottest_loop_has_the_special_functions_and_not_its_inner_loop() -> None:
    hottest = _sass.hottest_loop(_sass.instructions(SASS))
    assert [one.address for one in hottest] == [0x40, 0x50, 0x60, 0x70, 0xB0, 0x100, 0x110]
    assert _sass.count(hottest, "mufu") == 2
    without = SASS.replace("MUFU", "FADD").replace("HGMMA", "FADD")
    assert [one.address for one in _sass.hottest_loop(_sass.instructions(without))] == [0x80, 0x90, 0xA0], "deeper"
    straight = [one for one in _sass.instructions(SASS) if not one.opcode.startswith("BRA")]
    assert _sass.hottest_loop(straight) == straight, "all of it where nothing repeats"


def test_the_log_of_ptxas() -> None:
    assert _report.parse_log(LOG.format(stack=0, stores=0, loads=0, registers=72)) == (72, 0)
    assert _report.parse_log(LOG.format(stack=96, stores=100, loads=28, registers=255)) == (255, 128)
    with pytest.raises(RuntimeError, match="expected ptxas -v to name registers and spills, got ''"):
        _report.parse_log("")


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "columns", "blocks"),
    [
        (90, 8, 128, 0, 0, 2),  # 8 * 32 * 128 = half of the registers
        (90, 8, 129, 0, 0, 1),  # rounded up to 136
        (90, 1, 16, 0, 0, 32),  # the most blocks there can be
        (90, 4, 16, 0, 0, 16),  # 64 warps
        (90, 4, 32, 232448, 0, 1),  # the most shared memory that one block can have, on each architecture
        (80, 4, 32, 166912, 0, 1),
        (90, 4, 32, 232448 // 2, 0, 1),  # two blocks lack room for what the system takes of each
        (90, 4, 32, 233472 // 2 - 1024, 0, 2),
        (100, 4, 32, 0, 256, 2),  # half of the tensor memory
        (90, 4, 32, 262144, 0, 0),
    ],
)
def test_blocks_on_a_multiprocessor(
    arch: int, warps: int, registers: int, shared: int, columns: int, blocks: int
) -> None:
    assert _report.blocks_per_sm(arch, warps, registers, shared, columns) == blocks


def _compile(root: Path, command: list[str], out: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command, "--json", str(out)],
        cwd=root, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done, json.loads(out.read_text()) if out.exists() else {}


@pytest.fixture(scope="module")
def toys(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("toys") / "rows.json"
    done, document = _compile(root, ["-m", "tests._toy_launches"], out)
    assert done.returncode == 1, f"some of them fail their gates: {done.stderr}"
    return document


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "failed"),
    [
        ("exponentials", []),
        ("too many exponentials", ["1.00 MUFU per element, at most 0.9"]),
        ("shuffles", []),
        ("too many shuffles", ["0.16 SHFL per element, at most 0.15"]),  # five steps over 32 lanes of 32 elements
        ("dot", []),
        ("no dot where one is meant", ["no tensor-core instruction"]),
        ("two specialisations", []),
        ("not launched", ["other_kernel was not launched"]),
        ("nothing", ["launched no kernel"]),
    ],
)
def test_toys_pass_or_fail_for_their_reason(toys: dict[str, Any], case: str, failed: list[str]) -> None:
    for arch in _gates.ARCHS:
        rows = [row for row in toys["rows"] if (row["case"], row["arch"]) == (case, arch)]
        assert [reason for row in rows for reason in row["failed"]] == failed, arch


@pytest.mark.slow
def test_toys_that_spill_or_need_too_much_or_do_not_compile(toys: dict[str, Any]) -> None:
    def rows(case: str) -> list[dict[str, Any]]:
        found = [row for row in toys["rows"] if row["case"] == case]
        assert [row["arch"] for row in found] == list(_gates.ARCHS)
        return found

    for row in rows("spilling"):
        assert row["registers"] <= 64
        assert row["spill_bytes"] > 0
        assert row["failed"] == [f"spills {row['spill_bytes']} bytes"]
    for row in rows("too much shared memory"):
        assert row["blocks_per_sm"] == 0
        assert row["failed"] == [f"262144 bytes of shared memory, at most {_gates.SHARED_BYTES[row['arch']]}"]
    for row in rows("does not compile"):
        assert row["failed"][0].startswith("CompileTimeAssertionFailure: ")
        assert row["failed"][0].endswith("this kernel never compiles")


@pytest.mark.slow
def test_the_report_of_a_toy(toys: dict[str, Any]) -> None:
    """The loop with the exponentials is found between one without and code that has more of them."""
    for row in (row for row in toys["rows"] if row["case"] == "exponentials"):
        # 8192 elements of 4 warps are 64 a lane: so many exponentials, and a quarter of the loads, four floats wide.
        assert row["loop_mix"] | {"mufu": 64, "ldg": 16, "stg": 0, "dot": 0} == row["loop_mix"]
        assert row["mufu_per_element"] == 1.0
        assert row["mufu_cycles"] == 64 * 8  # four warps on four schedulers
        assert row["issue_cycles"] == row["loop_instructions"] > 64 + 16
        assert row["bound"] == "mufu"
    kernels = [row["kernel"] for row in toys["rows"] if row["case"] == "two specialisations" and row["arch"] == 90]
    assert kernels == ["product_kernel", "product_kernel (2)"], "a specialisation launched twice is listed once"
    assert set(toys["ptxas"]) == {str(arch) for arch in _gates.ARCHS}
    assert toys["triton"]


@pytest.mark.slow
@pytest.mark.parametrize("op", ops())
def test_gates(op: str, root: Path, tmp_path: Path) -> None:
    done, document = _compile(root, ["bench/resources.py", "--core", "--ops", op], tmp_path / "rows.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["arch"] for row in document["rows"]} == set(_gates.ARCHS)
    for row in document["rows"]:
        assert row["spill_bytes"] == 0
        assert row["shared"] <= {80: 166912, 90: 232448, 100: 232448}[row["arch"]]
        assert row["blocks_per_sm"] >= 1


def test_records_hold_every_op_and_no_failure(root: Path) -> None:
    for path in sorted((root / "bench" / "results" / "resources").glob("*.json")):
        rows = json.loads(path.read_text())["rows"]
        assert [row for row in rows if row["failed"]] == [], path.name
        assert {(row["op"], row["arch"]) for row in rows} == {(op, arch) for op in ops() for arch in _gates.ARCHS}


def test_a_record_is_named_after_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resources, "unavailable", lambda: None)
    monkeypatch.setattr(_results, "ROOT", tmp_path)
    kernel = tmp_path / "kernels" / "op.py"
    kernel.parent.mkdir()
    kernel.write_text("pass\n")
    assert resources.main(["--record"], launches=[]) == 0
    (path,) = (tmp_path / "bench" / "results" / "resources").iterdir()
    document = json.loads(path.read_text())
    assert path.name == f"triton-{document['triton']}.json"
    assert {"schema", "triton", "ptxas", "torch", "commit", "kernels_tree", "created", "rows"} <= set(document)
    # Of `git init; git add kernels; git write-tree --prefix=kernels/`, though nothing here is committed.
    assert document["kernels_tree"] == "d3f826f02236"
    assert f"rows: {path}" in capsys.readouterr().out


def test_the_interpreter_is_refused(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "bench/resources.py"],
        cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: TRITON_INTERPRET is set, and Triton's interpreter compiles nothing: unset it\n"


def test_the_absence_of_triton_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert resources.main([]) == 2
    assert "triton is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--record", "--arch", "90"], "--record: expected none of --arch, --ops and --core"),
        (["--arch", "75"], "invalid choice: 75"),
        (["--ops", "no_such_op"], "invalid choice: 'no_such_op'"),
        (["--jobs", "0"], "--jobs: expected at least 1, got 0"),
    ],
)
def test_flags_that_make_no_sense(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        resources.parse(flags)
    assert message in capsys.readouterr().err
