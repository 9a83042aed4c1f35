"""From instructions to what the machine does for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import matrices
from .arithmetic import RAW, TYPES, Type, operation
from .machine import EXIT, Machine, Mask, Step
from .program import Address, EmulationError, Immediate, Instruction, Operand, Program, Register, Special

Action = Callable[[Machine, Mask], Any]
_HINTS = {"nc", "volatile", "weak"}


def steps(program: Program) -> list[Step]:
    """The whole program, ready to run.

    Raises:
        EmulationError: an instruction is not known, with its text.
    """
    made = []
    for instruction in program.instructions:
        try:
            made.append(_step(instruction, program))
        except (EmulationError, KeyError, TypeError, ValueError) as error:
            raise EmulationError(f"{program.name}, {instruction.where}: {instruction.text}: {error}") from error
    return made


def _step(instruction: Instruction, program: Program) -> Step:
    name = instruction.opcode.split(".")[0]
    if name == "bra":
        return Step(_guarded(instruction, lambda m, mask: mask), program.labels[str(instruction.operands[0])])
    if name == "ret":
        return Step(_guarded(instruction, lambda m, mask: mask), EXIT)
    if instruction.opcode == "mov.b64" and instruction.operands[1] in program.parameters:
        to, number = _register(instruction.operands[0], 64), program.parameters.index(str(instruction.operands[1]))
        return Step(_guarded(instruction, lambda m, mask: m.put(to, np.asarray(number, np.uint64), mask)))
    if instruction.opcode.startswith("ld.param."):
        return Step(_guarded(instruction, _parameter(instruction, program)))
    return Step(_guarded(instruction, _action(instruction)))


def _guarded(instruction: Instruction, action: Action) -> Action:
    if instruction.guard is None:
        return action
    predicate, negated = instruction.guard

    def run(m: Machine, mask: Mask) -> Any:
        held = m.registers[predicate.index]
        return action(m, mask & ~held if negated else mask & held)

    return run


def _action(instruction: Instruction) -> Action:
    opcode, operands = instruction.opcode, instruction.operands
    for start, make in _SPECIAL:
        if opcode.startswith(start):
            return make(opcode, operands)
    if opcode.startswith("mov.") and any(isinstance(operand, tuple) for operand in operands):
        return _repack(operands)
    what = operation(opcode)
    target = _register(operands[0], what.output.bits)
    if len(operands) != 1 + len(what.inputs):
        raise EmulationError(f"expected {len(what.inputs)} operands, got {len(operands) - 1}")
    narrow = opcode.startswith("cvt.")
    read = [_reader(operand, type, narrow) for operand, type in zip(operands[1:], what.inputs, strict=True)]
    function, encode = what.function, what.output.encode

    def run(m: Machine, mask: Mask) -> None:
        m.put(target, encode(function(*[one(m) for one in read])), mask)

    return run


def _register(operand: Operand, bits: int) -> int:
    if not isinstance(operand, Register) or operand.bits != bits:
        raise EmulationError(f"expected a register of {bits} bits, got {operand}")
    return operand.index


def _reader(operand: Operand, type: Type, narrow: bool = False) -> Callable[[Machine], Any]:
    """Values of an operand; `narrow` allows a wider register, of which the lower bits are read."""
    if isinstance(operand, Immediate):
        constant = type.decode(RAW[type.bits].type(operand.bits & ((1 << type.bits) - 1)))
        return lambda m: constant
    if isinstance(operand, Special):
        name = operand.name
        return lambda m: type.decode(m.special[name])
    decode, word = type.decode, RAW[type.bits]
    if narrow and isinstance(operand, Register) and operand.bits > type.bits:
        wider = operand.index
        return lambda m: decode(m.registers[wider].astype(word))
    index = _register(operand, type.bits)
    return lambda m: decode(m.registers[index])


def _list(operand: Operand) -> tuple[Operand, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def _registers(operand: Operand, bits: int) -> list[int]:
    return [_register(one, bits) for one in _list(operand)]


def _repack(operands: tuple[Operand, ...]) -> Action:
    """mov from several registers to one, or from one to several; the first has the lowest bits."""
    to, source = (_list(operand) for operand in operands)

    def run(m: Machine, mask: Mask) -> None:
        if len(to) == 1:
            assert isinstance(to[0], Register)
            part = RAW[to[0].bits // len(source)]
            raw = [_reader(one, _unsigned(part.itemsize * 8))(m) for one in source]
            whole = np.stack(np.broadcast_arrays(*raw, np.empty(m.threads, part)), axis=-1)[:, :-1]
            m.put(to[0].index, np.ascontiguousarray(whole).view(RAW[to[0].bits])[:, 0], mask)
        else:
            assert isinstance(source[0], Register)
            bits = source[0].bits // len(to)
            parts = np.ascontiguousarray(m.registers[source[0].index])[:, None].view(RAW[bits])
            for i, one in enumerate(to):
                if one != "_":
                    m.put(_register(one, bits), parts[:, i], mask)

    return run


def _unsigned(bits: int) -> Type:
    return TYPES[f"b{bits}"]


def _address(operand: Operand, bits: int) -> Callable[[Machine, np.ndarray], np.ndarray]:
    """Addresses of these threads."""
    if not isinstance(operand, Address) or isinstance(operand.base, str):
        raise EmulationError(f"expected an address, got {operand}")
    offset, base = RAW[bits].type(operand.offset & ((1 << bits) - 1)), operand.base
    if isinstance(base, Immediate):
        start = base.bits + operand.offset
        return lambda m, thread: np.full(thread.size, start, RAW[bits])
    index = _register(base, bits)
    return lambda m, thread: m.registers[index][thread] + offset


def _space(opcode: str) -> tuple[bool, str]:
    """Is it shared memory, and the type of a word."""
    _, space, *parts = opcode.split(".")
    known = {*_HINTS, "v2", "v4", parts[-1]}
    if space not in ("global", "shared") or any(part not in known and "::" not in part for part in parts):
        raise EmulationError("unknown kind of access")
    return space == "shared", parts[-1]


def _load(opcode: str, operands: tuple[Operand, ...]) -> Action:
    shared, kind = _space(opcode)
    bytes_ = TYPES[kind].bits // 8
    to = [one for one in _list(operands[0]) if isinstance(one, Register)]
    at = _address(operands[1], 32 if shared else 64)

    def run(m: Machine, mask: Mask) -> None:
        thread = np.flatnonzero(mask)
        if not thread.size:
            return
        address, who = at(m, thread), m.who(thread)
        if shared:
            words = m.shared.load(address, bytes_, len(to), who, m.block[thread])
        else:
            words = m.memory.load(address, bytes_, len(to), who)
        for i, register in enumerate(to):
            held = m.registers[register.index].copy()
            held[thread] = _extended(words[:, i], kind, register.bits)
            m.registers[register.index] = held

    return run


def _store(opcode: str, operands: tuple[Operand, ...]) -> Action:
    shared, kind = _space(opcode)
    bits = TYPES[kind].bits
    at = _address(operands[0], 32 if shared else 64)
    values = _list(operands[1])

    def read(m: Machine, operand: Operand) -> np.ndarray:
        raw = m.registers[operand.index] if isinstance(operand, Register) else _reader(operand, _unsigned(bits))(m)
        return np.broadcast_to(raw, (m.threads,)).astype(RAW[bits])

    def run(m: Machine, mask: Mask) -> None:
        thread = np.flatnonzero(mask)
        if not thread.size:
            return
        words = np.stack([read(m, operand)[thread] for operand in values], axis=1)
        address, who = at(m, thread), m.who(thread)
        if shared:
            m.shared.store(address, bits // 8, words, who, m.block[thread])
        else:
            m.memory.store(address, bits // 8, words, who)

    return run


def _parameter(instruction: Instruction, program: Program) -> Action:
    """Parameters are numbered, and the number of one is its address."""
    kind = instruction.opcode.split(".")[-1]
    to, source = instruction.operands
    if not isinstance(to, Register) or not isinstance(source, Address) or source.offset:
        raise EmulationError(f"expected a register and a parameter, got {to} and {source}")
    index, bits, base, word = to.index, to.bits, source.base, RAW[TYPES[kind].bits]
    number = np.uint64(program.parameters.index(base)) if isinstance(base, str) else None

    def run(m: Machine, mask: Mask) -> None:
        which = number if number is not None else _reader(base, _unsigned(64))(m)
        m.put(index, _extended(m.parameters[which].astype(word), kind, bits), mask)

    return run


def _extended(raw: np.ndarray, kind: str, bits: int) -> np.ndarray:
    """A word in a register that may be wider."""
    return TYPES[kind].decode(raw).astype(f"i{bits // 8}").view(RAW[bits]) if kind[0] == "s" else raw.astype(RAW[bits])


def _asynchronous_copy(opcode: str, operands: tuple[Operand, ...]) -> Action:
    to, source, size, *valid = operands
    assert isinstance(size, Immediate)
    there, here = _address(to, 32), _address(source, 64)
    read = _reader(valid[0] if valid else size, _unsigned(32))

    def run(m: Machine, mask: Mask) -> None:
        thread = np.flatnonzero(mask)
        if not thread.size:
            return
        count = np.broadcast_to(read(m), (m.threads,))[thread]
        if not np.isin(count, (0, size.bits)).all():
            raise EmulationError(f"expected copies of 0 or {size.bits} bytes, got {sorted(set(count.tolist()))}")
        m.copy(size.bits, there(m, thread), here(m, thread), count == 0, thread)

    return run


def _group(opcode: str, operands: tuple[Operand, ...]) -> Action:
    """cp.async.commit_group, wgmma.wait_group and their kin."""
    kind = opcode.split(".")[0]
    if "commit_group" in opcode:
        return lambda m, mask: m.commit(kind, mask)
    last = operands[0]
    assert isinstance(last, Immediate)
    if kind == "cp":
        return lambda m, mask: m.wait_for_copies(last.bits, mask)
    return lambda m, mask: m.wait_for_products(last.bits, mask)


def _barrier(opcode: str, operands: tuple[Operand, ...]) -> Action:
    if operands != (Immediate(0),):
        raise EmulationError("expected barrier 0, of a whole block")
    return lambda m, mask: m.barrier(mask)


def _shuffle(opcode: str, operands: tuple[Operand, ...]) -> Action:
    kind = opcode.split(".")[2]
    to, source, lane, clamp, members = operands
    if kind not in ("bfly", "idx") or clamp != Immediate(31) or members != Immediate(-1):
        raise EmulationError("expected a whole warp's bfly or idx")
    target, index, read = _register(to, 32), _register(source, 32), _reader(lane, _unsigned(32))

    def run(m: Machine, mask: Mask) -> None:
        m.whole(mask)
        own = np.tile(np.arange(32, dtype=np.uint32), m.threads // 32)
        chosen = (own ^ read(m) if kind == "bfly" else np.broadcast_to(read(m), own.shape)) & np.uint32(31)
        m.put(target, m.registers[index][np.arange(m.threads) // 32 * 32 + chosen], mask)

    return run


def _held(m: Machine, registers: list[int], warps: np.ndarray) -> np.ndarray:
    """[warps, registers, 32]."""
    return np.stack([m.registers[i].reshape(-1, 32)[warps] for i in registers], axis=1)


def _keep(m: Machine, registers: list[int], warps: np.ndarray, held: np.ndarray) -> None:
    """The inverse."""
    for i, register in enumerate(registers):
        new = m.registers[register].reshape(-1, 32).copy()
        new[warps] = held[:, i]
        m.registers[register] = new.reshape(-1)


def _load_matrices(opcode: str, operands: tuple[Operand, ...]) -> Action:
    """ldmatrix: lanes 0 to 7 give the addresses of the first matrix' rows, 8 to 15 those of the second."""
    to, at, transposed = _registers(operands[0], 32), _address(operands[1], 32), ".trans" in opcode

    def run(m: Machine, mask: Mask) -> None:
        warps = m.whole(mask)
        thread = (warps[:, None] * 32 + np.arange(8 * len(to))).reshape(-1)
        rows = m.shared.load(at(m, thread), 2, 8, m.who(thread), m.block[thread])
        _keep(m, to, warps, matrices.from_rows(rows.reshape(len(warps), len(to), 8, 8), transposed))

    return run


def _store_matrices(opcode: str, operands: tuple[Operand, ...]) -> Action:
    """stmatrix, likewise."""
    at, source, transposed = _address(operands[0], 32), _registers(operands[1], 32), ".trans" in opcode

    def run(m: Machine, mask: Mask) -> None:
        warps = m.whole(mask)
        thread = (warps[:, None] * 32 + np.arange(8 * len(source))).reshape(-1)
        rows = matrices.to_rows(_held(m, source, warps), transposed).reshape(-1, 8)
        m.shared.store(at(m, thread), 2, rows, m.who(thread), m.block[thread])

    return run


def _product(opcode: str, operands: tuple[Operand, ...]) -> Action:
    """mma.sync: d = a b + c."""
    (rows, columns, depth), kind = matrices.shape_of(opcode), matrices.kind_of(opcode)
    if (rows, columns) not in ((16, 8), (8, 8)) or ".row.col." not in opcode:
        raise EmulationError("expected m16n8 or m8n8, row.col")
    sums = "f64" if kind == "f64" else "f32"
    d, a, b, c = (_registers(operand, 64 if kind == "f64" else 32) for operand in operands)

    def run(m: Machine, mask: Mask) -> None:
        warps = m.whole(mask)
        left = matrices.gathered(_held(m, a, warps), "a", kind, (rows, depth))
        right = matrices.gathered(_held(m, b, warps), "b", kind, (depth, 8))
        before = matrices.gathered(_held(m, c, warps), "d", sums, (rows, 8))
        _keep(m, d, warps, matrices.scattered(matrices.product(left, right, before)))

    return run


def _group_product(opcode: str, operands: tuple[Operand, ...]) -> Action:
    """wgmma.mma_async: d = a b, or a b + d, by four warps; a from registers or shared memory, b from shared memory."""
    (_, columns, depth), kind = matrices.shape_of(opcode), matrices.kind_of(opcode)
    width = 4 if kind == "tf32" else 2
    d, a, b, accumulate, *rest = operands
    result, right = _registers(d, 32), _register(b, 64)
    held_in_registers = isinstance(a, tuple)
    left = _registers(a, 32) if isinstance(a, tuple) else [_register(a, 64)]
    added = _reader(accumulate, TYPES["pred"])
    scales, turned = rest[:2], rest[2:]
    expected = 0 if kind == "tf32" else 1 if held_in_registers else 2
    if any(scale != Immediate(1) for scale in scales) or len(turned) != expected:
        raise EmulationError("expected factors of 1, and which operands are transposed")
    k_last = [one == Immediate(0) for one in turned] or [True, True]

    def load(m: Machine, register: int, thread: np.ndarray, shape: tuple[int, int], k_last: bool) -> np.ndarray:
        places = matrices.operand_places(m.registers[register][thread], shape, width, k_last)
        raw = m.read_for_product(places.reshape(thread.size, -1), width, thread)
        return matrices.words(raw, kind).reshape(places.shape)

    def run(m: Machine, mask: Mask) -> None:
        groups, warps = m.whole(mask, 128), m.whole(mask)
        thread = groups * 128
        if held_in_registers:
            first = matrices.gathered(_held(m, left, warps), "a", kind, (16, depth))
        else:
            first = load(m, left[0], thread, (64, depth), k_last[0]).reshape(-1, 16, depth)
        second = load(m, right, thread, (columns, depth), k_last[-1]).swapaxes(1, 2)
        before = matrices.gathered(_held(m, result, warps), "d", "f32", (16, columns))
        kept = np.broadcast_to(added(m), (m.threads,))[thread].repeat(4)[:, None, None]
        total = matrices.product(first, second.repeat(4, axis=0), np.where(kept, before, np.float32(0)))
        _keep(m, result, warps, matrices.scattered(total))

    return run


def _whole_warps(opcode: str, operands: tuple[Operand, ...]) -> Action:
    """bar.warp.sync, and what orders things that are in order here."""
    return lambda m, mask: m.whole(mask)


_SPECIAL: tuple[tuple[str, Callable[[str, tuple[Operand, ...]], Action]], ...] = (
    ("ld.", _load),
    ("st.", _store),
    ("bar.sync", _barrier),
    ("bar.warp.sync", _whole_warps),
    ("cp.async.ca.shared.global", _asynchronous_copy),
    ("cp.async.cg.shared.global", _asynchronous_copy),
    ("cp.async.commit_group", _group),
    ("cp.async.wait_group", _group),
    ("fence.proxy.async", _whole_warps),
    ("shfl.sync.", _shuffle),
    ("ldmatrix.", _load_matrices),
    ("stmatrix.", _store_matrices),
    ("mma.sync.", _product),
    ("wgmma.fence.", _whole_warps),
    ("wgmma.commit_group.", _group),
    ("wgmma.wait_group.", _group),
    ("wgmma.mma_async.", _group_product),
)
