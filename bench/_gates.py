"""What a kernel must keep to so that it ships. The only place with these numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # launches take their limits from here
    from bench._report import Report
    from bench.launches._launch import Launch

ARCHS = (80, 90, 100)
SPILL_BYTES = 0
# Bytes of shared memory that one block can have, by compute capability.
SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448}

# Special-function instructions per (t, e, n) of the last state: one exponential, and what is left of SiLU and softplus
# when N states share them; with nodes the exponentials are a dot.
MUFU_EXACT = 1.25
MUFU_NODES = 0.35
# Shuffles per (t, e, n) of the scan at all positions: a lane has all states of a channel, or 32 of them. With another
# layout, which another version of Triton may choose, it is 4 or 5.
SHUFFLES = 0.1


def failures(launch: Launch, report: Report) -> list[str]:
    """Why this kernel of this launch may not ship; empty where it may."""
    reasons = []
    if report.spill_bytes > SPILL_BYTES:
        reasons.append(f"spills {report.spill_bytes} bytes")
    limit = SHARED_BYTES[report.arch]
    if report.shared > limit:
        reasons.append(f"{report.shared} bytes of shared memory, at most {limit}")
    if report.kernel in launch.dots and not report.dots:
        reasons.append("no tensor-core instruction")
    for limits, kind in ((launch.mufu, "mufu"), (launch.shuffles, "shfl")):
        if report.kernel in limits:
            most, elements = limits[report.kernel]
            found = report.per_element(report.loop_mix[kind], elements)
            if found > most:
                reasons.append(f"{found:.2f} {kind.upper()} per element, at most {most}")
    return reasons


def missing(launch: Launch, reports: Sequence[Report]) -> list[str]:
    """What the launch says of kernels that it does not launch."""
    launched = {report.kernel for report in reports}
    if not launched:
        return ["launched no kernel"]
    return [f"{name} was not launched" for name in sorted({*launch.dots, *launch.mufu, *launch.shuffles} - launched)]
