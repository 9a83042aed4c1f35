"""PTX as text, read into instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class EmulationError(Exception):
    """What a GPU would do wrong, or what the emulator does not know."""


@dataclass(frozen=True)
class Register:
    """A register's place among all; `bits` is 1 for predicates."""

    index: int
    bits: int


@dataclass(frozen=True)
class Immediate:
    """A constant's bit pattern: of a float32 or float64 if it is written as one."""

    bits: int


@dataclass(frozen=True)
class Special:
    """%tid.x and its kin."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset]; the base is a register, an address, or the name of a parameter."""

    base: Register | Immediate | str
    offset: int


Operand = Register | Immediate | Special | Address | str | tuple["Operand", ...]


@dataclass(frozen=True)
class Instruction:
    """`guard` is the predicate and whether it is negated; `where` the Python line it comes from."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: tuple[Register, bool] | None
    text: str
    where: str


@dataclass
class Program:
    """One kernel: labels are indices of instructions, registers their widths, parameters their names."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: list[int] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)


_SPECIAL = {"tid.x", *(f"{of}.{axis}" for of in ("ctaid", "nctaid") for axis in "xyz")}
_WIDTHS = {"pred": 1, "b16": 16, "b32": 32, "b64": 64}
_SCOPE = re.compile(r"^\{\s*(\.reg.*)\}$")
_GUARD = re.compile(r"@(!?)(%\w+)\s+")


def parse(text: str) -> Program:
    """Read the text of one kernel.

    Raises:
        EmulationError: something in it is not understood.
    """
    entry = re.search(r"\.entry\s+(\S+)\((.*?)\)", text, re.S)
    if entry is None:
        raise EmulationError("expected PTX with an entry, found none")
    program = Program(entry[1])
    program.parameters += [parameter.split()[-1] for parameter in entry[2].split(",")]
    return _Reader(program, text).read(text[entry.end() :])


class _Reader:
    def __init__(self, program: Program, text: str) -> None:
        self._program = program
        self._files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
        self._names: dict[str, Register] = {}

    def read(self, body: str) -> Program:
        where = "?"
        for line in body[body.index("{") + 1 : body.index("\n}")].splitlines():
            code = line.partition("//")[0].strip()
            if code.startswith(".loc"):
                _, file, row, *_ = code.split()
                where = f"{self._files.get(file, '?').rpartition('/')[2]}:{row}"
            elif code.startswith(".reg"):
                self._declare(code)
            elif code.endswith(":"):
                self._program.labels[code[:-1]] = len(self._program.instructions)
            elif not code.startswith("."):
                # A scope is on one line, and its registers have names that are declared anew in the next.
                for statement in _SCOPE.sub(r"\1", code).split(";"):
                    if statement.strip().startswith(".reg"):
                        self._declare(statement.strip())
                    elif statement.strip():
                        self._program.instructions.append(self._instruction(statement.strip(), where))
        return self._program

    def _declare(self, code: str) -> None:
        found = re.fullmatch(r"\.reg \.(\w+)\s+([%\w]+)(<(\d+)>)?;?", code)
        if found is None or found[1] not in _WIDTHS:
            raise EmulationError(f"unknown declaration {code!r}")
        for name in [f"{found[2]}{i}" for i in range(int(found[4]))] if found[4] else [found[2]]:
            self._names[name] = Register(len(self._program.registers), _WIDTHS[found[1]])
            self._program.registers.append(_WIDTHS[found[1]])

    def _instruction(self, text: str, where: str) -> Instruction:
        rest, guard = text, None
        if found := _GUARD.match(text):
            guard, rest = (self._names[found[2]], found[1] == "!"), text[found.end() :]
        opcode, _, rest = rest.replace("\t", " ").partition(" ")
        operands = tuple(self._operand(part) for part in _split(rest))
        return Instruction(opcode, operands, guard, " ".join(text.split()), where)

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return tuple(self._operand(part) for part in _split(text[1:-1]))
        if text.startswith("["):
            base, _, offset = (part.strip() for part in text[1:-1].partition("+"))
            return Address(self._base(base), int(offset or "0", 0))
        if text in self._names:
            return self._names[text]
        if text.startswith("%"):
            if text[1:] not in _SPECIAL:
                raise EmulationError(f"unknown register {text!r}")
            return Special(text[1:])
        return self._constant(text) or text

    def _base(self, text: str) -> Register | Immediate | str:
        return self._names.get(text) or self._constant(text) or text

    def _constant(self, text: str) -> Immediate | None:
        if text == "global_smem":
            return Immediate(0)
        if re.fullmatch(r"0f[0-9A-Fa-f]{8}|0d[0-9A-Fa-f]{16}", text):
            return Immediate(int(text[2:], 16))
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
            return Immediate(int(text.rstrip("U"), 0))
        return None


def _split(text: str) -> list[str]:
    """At the commas that are in no braces or brackets."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [part for part in [*parts, text[start:].strip()] if part]
