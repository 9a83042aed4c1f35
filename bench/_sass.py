"""Machine code as cuobjdump prints it: instructions, loops, and what the hottest loop does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.MULTILINE)
_ENDS = ("BRA", "EXIT", "RET", "JMP")

# Columns of the mix. A dot is warp-wide (HMMA), of a warp group (HGMMA) or of the tensor core's own memory (UTCHMMA).
KINDS = {
    "dot": r"(H|HG|I|IG|Q|QG|D|O|UTC\w*)MMA",
    "mufu": "MUFU",
    "ffma": "FFMA",
    "ldg": "LDG|LD$|UTMALDG",
    "stg": "STG|ST$|UTMASTG",
    "lds": "LDS",
    "sts": "STS",
    "shfl": "SHFL",
    "bar": "BAR",
}
# A loop inside another is taken to run so often each time: only the order of loops depends on it.
_ASSUMED_TRIPS = 8


@dataclass(frozen=True)
class Instruction:
    """`guard` is the predicate before an instruction that may be skipped, or None."""

    address: int
    guard: str | None
    opcode: str
    operands: str

    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.opcode.startswith(("BRA", "JMP")) else None
        return int(found.group(1), 16) if found else None

    def falls_through(self) -> bool:
        """May the next instruction run after this one? Uniform branches carry their condition as an operand."""
        return self.guard is not None or "," in self.operands or not self.opcode.startswith(_ENDS)


def instructions(text: str) -> list[Instruction]:
    """The instructions of the one kernel in cuobjdump's output, the padding at the end left out."""
    found = [
        Instruction(int(address, 16), guard or None, opcode, operands.strip())
        for address, guard, opcode, operands in _LINE.findall(text)
    ]
    while found and found[-1].opcode == "NOP":
        found.pop()
    return found


def count(code: Sequence[Instruction], kind: str) -> int:
    """How many instructions are of a kind of `KINDS`."""
    pattern = re.compile(KINDS[kind])
    return sum(1 for instruction in code if pattern.match(instruction.opcode.split(".")[0]))


def loops(code: Sequence[Instruction]) -> list[frozenset[int]]:
    """The loops, as indices into `code`: what lies on a way from a branch back to a place that leads to it.

    A branch back alone makes no loop: ptxas moves rarely run code behind the kernel's end, and returns from there.
    """
    following = _successors(code)
    preceding: list[list[int]] = [[] for _ in code]
    reachable = _reach([0], following) if code else set()
    for i in reachable:
        for j in following[i]:
            preceding[j].append(i)
    by_head: dict[int, set[int]] = {}
    for i in sorted(reachable):
        for head in following[i]:
            if head <= i and i not in _reach([0], following, without=head):
                by_head.setdefault(head, {head}).update(_reach([i], preceding, without=head))
    return [frozenset(body) for body in by_head.values()]


def _successors(code: Sequence[Instruction]) -> list[list[int]]:
    index = {instruction.address: i for i, instruction in enumerate(code)}
    following: list[list[int]] = []
    for i, instruction in enumerate(code):
        after = [i + 1] if instruction.falls_through() and i + 1 < len(code) else []
        target = instruction.target()
        following.append(after if target is None or target not in index else [*after, index[target]])
    return following


def _reach(start: Sequence[int], edges: Sequence[Sequence[int]], without: int = -1) -> set[int]:
    seen = {i for i in start if i != without}
    stack = list(seen)
    while stack:
        for j in edges[stack.pop()]:
            if j != without and j not in seen:
                seen.add(j)
                stack.append(j)
    return seen


def hottest_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """One iteration of the loop with most special functions, then dots, then instructions; all code without a loop.

    Loops inside it are left out: how often they run cannot be seen here.
    """
    found = sorted(loops(code), key=len)
    own: dict[frozenset[int], list[Instruction]] = {body: [] for body in found}
    for i, instruction in enumerate(code):
        innermost = next((body for body in found if i in body), None)
        if innermost is not None:
            own[innermost].append(instruction)

    def heat(body: frozenset[int]) -> tuple[int, ...]:
        trips = _ASSUMED_TRIPS ** sum(body <= other for other in found)
        return tuple(trips * n for n in (count(own[body], "mufu"), count(own[body], "dot"), len(own[body])))

    return own[max(found, key=heat)] if found else list(code)
