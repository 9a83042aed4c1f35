"""The emulator: it computes what a GPU does, it finds faults made on purpose, and the launches that ship have none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests._emulator import EmulationError, Kernel
from tests._emulator.arithmetic import operation

# %rd3 and %rd4 point to this thread's element of x and y, %r1 is four times the thread's number, %r2 is its x.
PROGRAM = """
.visible .entry toy(
	.param .u64 .ptr .global .align 1 toy_param_0,
	.param .u64 .ptr .global .align 1 toy_param_1
)
{
	.reg .pred 	%p<4>;
	.reg .b16 	%rs<4>;
	.reg .b32 	%r<80>;
	.reg .b64 	%rd<16>;
	ld.param.b64 	%rd0, [toy_param_0];
	ld.param.b64 	%rd1, [toy_param_1];
	mov.u32 	%r0, %tid.x;
	mul.wide.u32 	%rd2, %r0, 4;
	add.s64 	%rd3, %rd0, %rd2;
	add.s64 	%rd4, %rd1, %rd2;
	shl.b32 	%r1, %r0, 2;
	ld.global.b32 	%r2, [ %rd3 + 0 ];
BODY
	ret;
}
"""
WARPS = 2
REVERSED = "sub.s32 %r3, 252, %r1;"  # the place of the thread at the other end


def run(body: str, warps: int = WARPS, blocks: int = 1, shared: int = 1024) -> tuple[Tensor, Tensor]:
    """x, one number for each thread, and what the program leaves in y, of the same size and NaN at first."""
    x = torch.arange(32.0 * warps) + 1
    y = torch.full_like(x, torch.nan)
    kernel = Kernel(PROGRAM.replace("BODY", body), warps, shared)
    kernel.run((blocks, 1, 1), np.array([(i, 0, 0) for i in range(blocks)]), [("x", x), ("y", y)])
    return x, y


def test_threads_exchange_values_through_shared_memory() -> None:
    x, y = run(f"st.shared.b32 [%r1], %r2; bar.sync 0; {REVERSED} ld.shared.b32 %r4, [%r3]; st.global.b32 [%rd4], %r4;")
    assert torch.equal(y, x.flip(0))


def test_copies_that_are_waited_for() -> None:
    x, y = run(
        "cp.async.ca.shared.global [%r1 + 0], [%rd3 + 0], 0x4, 4; cp.async.commit_group; cp.async.wait_group 0;"
        f"bar.sync 0; {REVERSED} ld.shared.b32 %r4, [%r3]; st.global.b32 [%rd4], %r4;"
    )
    assert torch.equal(y, x.flip(0))


def test_copies_that_are_not_waited_for() -> None:
    copied = "cp.async.ca.shared.global [%r1], [%rd3], 0x4, 4; cp.async.commit_group;"
    _, y = run(f"{copied} cp.async.wait_group 1; ld.shared.b32 %r4, [%r1]; st.global.b32 [%rd4], %r4;")
    assert y.isnan().all()


def test_threads_part_and_meet() -> None:
    """Each thread goes round as often as its number says; even ones take another branch on the way."""
    _, y = run(
        """
	mov.b32 	%r5, 0;
	mov.b32 	%r6, 0f00000000;
$again:
	and.b32 	%r7, %r5, 1;
	setp.eq.b32 	%p1, %r7, 0;
	@%p1 bra 	$even;
	add.f32 	%r6, %r6, 0f3F800000;
	bra.uni 	$met;
$even:
	add.f32 	%r6, %r6, 0f40000000;
$met:
	add.s32 	%r5, %r5, 1;
	setp.le.u32 	%p2, %r5, %r0;
	@%p2 bra 	$again;
	bar.sync 	0;
	st.global.b32 	[%rd4], %r6;
"""
    )
    rounds = torch.arange(64) + 1
    assert torch.equal(y, (rounds // 2 + 2 * ((rounds + 1) // 2)).float())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            f"st.shared.b32 [%r1], %r2; {REVERSED} ld.shared.b32 %r4, [%r3];",
            "ld.shared.b32 %r4, .%r3.: shared memory: warp 0 of block 0 reads what another one writes, without",
        ),
        (
            f"st.shared.b32 [%r1], %r2; bar.sync 0; {REVERSED} ld.shared.b32 %r4, [%r3]; st.shared.b32 [%r1], %r4;",
            "shared memory: warp 0 of block 0 writes what another one touches, without a barrier",
        ),
        ("mov.b32 %r3, 0; st.shared.b32 [%r3], %r2;", "warp 0 of block 0 writes at once what another one writes"),
        (
            "cp.async.ca.shared.global [%r1], [%rd3], 0x4, 4; cp.async.commit_group; cp.async.wait_group 0;"
            f"{REVERSED} ld.shared.b32 %r4, [%r3];",
            "reads what another one writes, without a barrier",
        ),
        ("st.global.b32 [%rd4 + 4], %r2;", "global memory: 4 bytes at .256 of y, which has 256 bytes"),
        ("ld.global.b32 %r4, [%rd3 + -4];", "global memory: 4 bytes at -4 of x, which has 256 bytes"),
        ("ld.global.b64 %rd5, [%rd3];", "global memory: 8 bytes at [0-9]*, which is not a multiple of that"),
        ("st.shared.b32 [%r1 + 1000], %r2;", "shared memory: 4 bytes at 1000 to 1252, a block has 1024"),
        ("st.shared.b32 [%r1 + 2], %r2;", "shared memory: 4 bytes at 2, which is not a multiple of that"),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 0;", "a barrier that only some of a block's threads reach"),
        ("frobnicate.b32 %r4, %r2;", "frobnicate.b32 %r4, %r2: unknown instruction"),
        ("setp.lt.u32 %p1, %r0, 8; @%p1 bar.warp.sync -1;", "some threads of 32 that belong together are missing"),
        ("st.global.b32 [%rd4], %r99;", "unknown register '%r99'"),
    ],
)  # fmt: skip
def test_faults_are_found(body: str, message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        run(body)


def test_blocks_may_not_write_to_one_place() -> None:
    fault = "mov.u32 %r3, %ctaid.x; st.global.b32 [%rd4], %r3;"
    with pytest.raises(EmulationError, match="tensor y: warp 0 of block 0 writes at once what another one writes"):
        run(fault, blocks=2)
    run(fault, blocks=1)


def test_threads_that_have_left_are_not_waited_for() -> None:
    x, y = run("setp.lt.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0; st.global.b32 [%rd4], %r2;")
    assert y[:32].isnan().all()
    assert torch.equal(y[32:], x[32:])


SUMS = ", ".join(f"%r{i}" for i in range(40, 44))
OVERWRITTEN = f"""
	mov.b32 	%r3, 0;
	mov.b32 	%r40, 0f00000000;
	mov.b32 	%r41, 0f00000000;
	mov.b32 	%r42, 0f00000000;
	mov.b32 	%r43, 0f00000000;
	st.shared.b32 	[%r1], %r3;
	bar.sync 	0;
	mov.b64 	%rd6, 0x0000000800080000;
	mov.pred 	%p1, -1;
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{SUMS}}}, {{%r3, %r3, %r3, %r3}}, %rd6, %p1, 1, 1, 0;
	wgmma.commit_group.sync.aligned;
	bar.sync 	0;
	WAIT
	st.shared.b32 	[%r1], %r2;
	wgmma.wait_group.sync.aligned 0;
"""


def test_an_operand_that_changes_under_an_asynchronous_product() -> None:
    with pytest.raises(EmulationError, match="a product of block 0 reads what another one writes, without a barrier"):
        run(OVERWRITTEN.replace("WAIT", ""), warps=4)
    with pytest.raises(EmulationError, match="shared memory has changed under an asynchronous product"):
        run(OVERWRITTEN.replace("WAIT", "").replace("wgmma.wait", "bar.sync 0; wgmma.wait"), warps=4)
    run(OVERWRITTEN.replace("WAIT", "wgmma.wait_group.sync.aligned 0; bar.sync 0;"), warps=4)


def _computed(opcode: str, *operands: int) -> int:
    what = operation(opcode)
    words = [
        kind.decode(np.array([value & (1 << kind.bits) - 1], f"u{kind.bits // 8}"))
        for kind, value in zip(what.inputs, operands, strict=True)
    ]
    return int(what.output.encode(what.function(*words))[0])


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("bfe.s32", (0b1100, 2, 2), 0xFFFFFFFF),
        ("bfe.u32", (0b1100, 2, 2), 0b11),
        ("shr.s32", (-8, 40), 0xFFFFFFFF),
        ("shr.u32", (-8, 40), 0),
        ("shl.b32", (1, 32), 0),
        ("mul.hi.s32", (-(1 << 20), 1 << 20), 0xFFFFFF00),
        ("mul.wide.s32", (-3, 5), (1 << 64) - 15),
        ("div.s32", (-7, 2), (1 << 32) - 3),
        ("rem.s32", (-7, 2), (1 << 32) - 1),
        ("prmt.b32", (0x33221100, 0x77665544, 0x7B01), 0x77000011),
        ("cvt.s64.s32", (-5,), (1 << 64) - 5),
        ("cvt.rzi.s32.f32", (_bits(-2.75),), (1 << 32) - 2),
        ("cvt.rn.bf16.f32", (_bits(1 + 2**-8),), 0x3F80),  # ties to even
        ("cvt.rn.bf16.f32", (_bits(1 + 3 * 2**-8),), 0x3F82),
        ("cvt.rn.bf16x2.f32", (_bits(1), _bits(2)), 0x3F804000),
        ("cvt.rna.tf32.f32", (_bits(1 + 2**-11),), _bits(1 + 2**-10)),  # ties away from zero
        ("fma.rn.f32", (_bits(1 + 2**-12), _bits(1 + 2**-12), _bits(-1 - 2**-11)), _bits(2**-24)),
        ("ex2.approx.ftz.f32", (_bits(-130),), 0),
        ("ex2.approx.f32", (_bits(-130),), _bits(2.0**-130)),
        ("max.f32", (_bits(np.nan), _bits(-1)), _bits(-1)),
        ("setp.ltu.f32", (_bits(np.nan), _bits(1)), 1),
        ("setp.lt.f32", (_bits(np.nan), _bits(1)), 0),
        ("setp.num.f32", (_bits(np.nan), _bits(1)), 0),
    ],
)  # fmt: skip
def test_arithmetic(opcode: str, operands: tuple[int, ...], expected: int) -> None:
    with np.errstate(all="ignore"):
        assert _computed(opcode, *operands) == expected


def _compiled(root: Path, *command: str, **environment: str) -> str:
    """The output of a Python process in which Triton compiles."""
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], cwd=root, env=own | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90"])
def test_launches_that_ship_stay_within_bounds_and_race_nowhere(arch: str, root: Path) -> None:
    out = _compiled(root, "tests/_sampled_launches.py", "--arch", arch, "--core")
    assert out.endswith(f" launches for sm_{arch}, 0 failed\n")


@pytest.mark.slow
def test_compiled_kernels_are_as_good_as_the_interpreted_ones(root: Path) -> None:
    """A few of the kernels' own tests; with FASTM2REC_TEST_ARCH set, pytest runs any of them so."""
    chosen = "70-64-none or 2-24-63-32 or (inner and 50x11) or (test_loses_no_more and 50 and fields0)"
    files = [f"tests/test_{name}_kernel.py" for name in ("gated_fusion", "last_state", "spectral_projection")]
    files += ["tests/test_encode_last_kernel.py", "tests/test_selective_scan_kernel.py"]
    out = _compiled(root, "-m", "pytest", "-q", *files, "-k", chosen, FASTM2REC_TEST_ARCH="90")
    assert " passed" in out
