"""Slices of a batch over threads, without Python: what `threads.run` calls.

Slices are taken from a counter, by the caller and by the threads of torch's OpenMP library: after each of torch's own
operations these wait for more work without leaving their cores, for milliseconds, and would take half of a core from
any other thread. Were each slice a call from Python, two threads would wait for its lock about as long as a short
kernel takes: 0.2 ms on two cores.

    @sliced
    def forward(first, last, scratch, x, y): ...

`forward` then takes the fields of a `Schedule` in place of its first three arguments.

On an x86 processor a kernel's numbers that are too small to be normal count as 0, those that it reads and those that it
makes. The tails of decayed gradients are such: to compute with them took an Intel half as long again as all else in the
backward scan.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.np.arrayobj import populate_array

from .compiler import entry, part
from .simd import address, intrinsic


class Schedule(NamedTuple):
    """What a kernel takes first."""

    counters: np.ndarray  # int64 [2], zeros: the next slice, the next thread
    memory: np.ndarray  # [threads, size], flat: the scratch of each thread
    size: int
    total: int  # of what is to be sliced
    step: int  # of it in a slice
    threads: int


_NAME = "fastm2rec_parallel"
# Of the register that says how a thread computes: what is not normal is 0 as a result, and as an operand.
_NORMAL = (1 << 15) | (1 << 6) if llvmlite.binding.get_default_triple().startswith("x86_64") else 0
_Entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Parallel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


@_Parallel
def _alone(function, data, threads, flags):
    _Entry(function)(data)


@functools.cache
def openmp() -> bool:
    """Is there `GOMP_parallel` in the OpenMP library that torch has loaded? LLVM's and Intel's have it as well."""
    return _parallel() is not None


def _parallel() -> Any:
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    names = {line.split()[-1] for line in maps.splitlines() if "omp" in line.rpartition("/")[2]}
    folder = str(Path(torch.__file__).parent)
    for name in sorted(names, key=lambda name: not name.startswith(folder)):
        try:
            return ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
    return None


# Compiled kernels refer to it by name, those from the disk as well. Without OpenMP it is never called.
llvmlite.binding.add_symbol(_NAME, ctypes.cast(_parallel() or _alone, ctypes.c_void_p).value)


def sliced(kernel: Any) -> Any:
    """Compile `kernel(first, last, scratch, ...)`, and what calls it for all slices of a `Schedule`."""
    # numba finds what it has kept on the disk by file, name and line, and by what a function encloses, which would be
    # another object in every process: the caller has the kernel's place, and encloses nothing.
    code = _call.__code__.replace(
        co_filename=kernel.__code__.co_filename, co_firstlineno=kernel.__code__.co_firstlineno,
        co_name=kernel.__name__, co_qualname=kernel.__qualname__,
    )  # fmt: skip
    caller = FunctionType(code, {"_slices": slices_of(part(kernel)), "__name__": kernel.__module__})
    caller.__doc__ = kernel.__doc__
    return entry(caller)


def _call(*arguments):
    _slices(arguments)  # type: ignore[name-defined] # noqa: F821


def slices_of(kernel: Any) -> Any:
    """The intrinsic that calls a `part` for all slices: of a tuple, the fields of a `Schedule` and then its arguments.

    For whoever has several of them to do, one after the other, in one call from Python.
    """

    @intrinsic
    def run(typingctx, arguments):
        memory, rest = arguments.types[1], arguments.types[6:]
        called = types.Dispatcher(kernel).get_call_type(typingctx, (types.intp, types.intp, memory, *rest), {})

        def codegen(context, builder, signature, values):
            fields = cgutils.unpack_tuple(builder, values[0])
            data = cgutils.alloca_once(builder, ir.LiteralStructType([field.type for field in fields]))
            for i, field in enumerate(fields):
                builder.store(field, cgutils.gep_inbounds(builder, data, 0, i))
            worker = _worker(context, builder.module, kernel, called, arguments.types, data.type)
            pointer = builder.bitcast(data, cgutils.voidptr_t)
            several = builder.icmp_signed(">", fields[5], ir.Constant(fields[5].type, 1))
            with builder.if_else(several) as (then, otherwise):
                with then:
                    kind = ir.FunctionType(
                        ir.VoidType(), [worker.type, cgutils.voidptr_t, cgutils.int32_t, cgutils.int32_t]
                    )
                    parallel = cgutils.get_or_insert_function(builder.module, kind, _NAME)
                    many = builder.trunc(fields[5], cgutils.int32_t)
                    builder.call(parallel, [worker, pointer, many, ir.Constant(cgutils.int32_t, 0)])
                with otherwise:
                    builder.call(worker, [pointer])

        return types.void(arguments), codegen

    return run


def _worker(context, module, kernel, called, kinds, data):
    """The function that each thread runs, of a pointer to the arguments of all."""
    compiled = kernel.overloads[called.args]
    context.active_code_library.add_linking_library(compiled.library)
    worker = ir.Function(
        module, ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t]), module.get_unique_name(f"{kernel.__name__}_worker")
    )
    worker.linkage = "internal"
    builder = ir.IRBuilder(worker.append_basic_block("entry"))
    fields = builder.bitcast(worker.args[0], data)
    counters, memory, size, count, step, _, *rest = (
        builder.load(cgutils.gep_inbounds(builder, fields, 0, i)) for i in range(len(kinds))
    )

    def taken(which):
        place = address(context, builder, kinds[0], counters, ir.Constant(cgutils.intp_t, which))
        return builder.atomic_rmw("add", place, ir.Constant(cgutils.intp_t, 1), "monotonic")

    whole = context.make_array(kinds[1])(context, builder, memory)
    scratch = context.make_array(kinds[1])(context, builder)
    bytes_ = ir.Constant(cgutils.intp_t, kinds[1].dtype.bitwidth // 8)
    own = builder.gep(whole.data, [builder.mul(taken(1), size)])
    populate_array(scratch, data=own, shape=[size], strides=[bytes_], itemsize=bytes_, meminfo=None)
    head, body, done = (worker.append_basic_block(name) for name in ("next", "slice", "done"))
    before = _compute_normally(builder) if _NORMAL else None
    builder.branch(head)
    builder.position_at_end(head)
    first = builder.mul(taken(0), step)
    builder.cbranch(builder.icmp_signed("<", first, count), body, done)
    builder.position_at_end(body)
    end = builder.add(first, step)
    last = builder.select(builder.icmp_signed("<", end, count), end, count)
    function = context.declare_function(module, compiled.fndesc)
    context.call_conv.call_function(
        builder, function, called.return_type, called.args, [first, last, scratch._getvalue(), *rest]
    )
    builder.branch(head)
    builder.position_at_end(done)
    if before is not None:
        _control(builder, "ldmxcsr", before)
    builder.ret_void()
    return worker


def _compute_normally(builder):
    """From here on without what is not normal; where the register's former contents are."""
    before, place = (cgutils.alloca_once(builder, cgutils.int32_t) for _ in range(2))
    _control(builder, "stmxcsr", before)
    builder.store(builder.or_(builder.load(before), ir.Constant(cgutils.int32_t, _NORMAL)), place)
    _control(builder, "ldmxcsr", place)
    return before


def _control(builder, instruction, place):
    kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.sse.{instruction}")
    builder.call(function, [builder.bitcast(place, cgutils.voidptr_t)])
