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
    if report.kernel in launch.mufu:
        most, elements = launch.mufu[report.kernel]
        mufu = report.per_element(report.loop_mix["mufu"], elements)
        if mufu > most:
            reasons.append(f"{mufu:.2f} MUFU per element, at most {most}")
    return reasons


def missing(launch: Launch, reports: Sequence[Report]) -> list[str]:
    """What the launch says of kernels that it does not launch."""
    launched = {report.kernel for report in reports}
    if not launched:
        return ["launched no kernel"]
    return [f"{name} was not launched" for name in sorted({*launch.dots, *launch.mufu} - launched)]
