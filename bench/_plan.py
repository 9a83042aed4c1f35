"""What `run_all.py` runs, most valuable first: the core rows that have targets, then everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench import _merge

# The peers whose ratios are targets; all others come in the second pass.
OURS, ASSEMBLED, SASREC, PUBLISHED = "triton", "torch.fft + mamba_ssm", "last query", "as published"


@dataclass(frozen=True)
class Step:
    """One call of a script.

    Args:
        script: its name, without .py.
        weight: its share of its pass's time, in relation to the others.
        core: belongs to the first pass.
        models, lengths, batches, dtypes, impls: what it is asked for; empty where the script has its own.
        flags: further words.
        compiles: only what is computed by these is compiled; empty for all.
        quick: torch.compile is not given its search among kernels: seconds, not minutes.
    """

    script: str
    weight: float
    core: bool = False
    models: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    impls: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    compiles: tuple[str, ...] = ()
    quick: bool = False

    @property
    def name(self) -> str:
        return " ".join([self.script, *self.words(self.lengths)])

    @property
    def compares_models(self) -> bool:
        """Is its script one of those that share their options and their driver?"""
        return bool(self.models) or self.script == "scaling"

    def words(self, lengths: Sequence[int]) -> list[str]:
        """The command line, for these of its lengths."""
        found: list[str] = []
        for flag, values in (
            ("--models", self.models), ("--seq-len", lengths), ("--batch", self.batches), ("--dtype", self.dtypes),
            ("--impls", self.impls), ("--compile", self.compiles),
        ):  # fmt: skip
            if values:
                found += [flag, *map(str, values)]
        return [*found, *["--quick"] * self.quick, *self.flags]

    def missing(self, rows: Sequence[dict[str, Any]]) -> tuple[int, ...]:
        """The lengths at which some model has no row yet, or one that time did not allow.

        A script writes all rows of a shape at once.
        """
        own = [row for row in rows if self._asks_for(row)]
        done, late = (
            {
                tuple(row.get(name) for name in ("model", "seq_len", "batch", "dtype"))
                for row in own
                if _merge.is_final(row) == final
            }
            for final in (True, False)
        )
        done -= late
        return tuple(
            length
            for length in self.lengths
            if any(
                (model, length, batch, dtype) not in done
                for model in self.models
                for batch in self.batches
                for dtype in self.dtypes
            )
        )

    def _asks_for(self, row: dict[str, Any]) -> bool:
        if self.impls and row["impl"] not in self.impls:
            return False
        compiled = "compiled" in row["mode"]
        if compiled and self.compiles and row["impl"] not in self.compiles:
            return False
        if self.quick:  # what the search had no time for is another step's
            return bool(row.get("quick")) or not compiled
        return not row.get("quick")


PAIR, OTHERS, BF16 = ("m2rec", "sasrec"), ("bert4rec", "mamba4rec"), ("bfloat16",)
CUDA = (
    Step("kernels", 4, core=True, flags=("--core",)),
    Step("throughput", 3, True, PAIR, (200,), (4096,), BF16, (OURS, ASSEMBLED, SASREC, PUBLISHED), (), (SASREC,), True),
    Step("train_step", 3, True, PAIR, (200,), (2048,), BF16, (OURS, ASSEMBLED, SASREC), quick=True),
    Step("latency", 3, True, PAIR, (200, 50, 800, 1600), (1,), BF16, (OURS, SASREC), quick=True),
    Step("throughput", 3, True, PAIR, (50, 800, 1600), (4096,), BF16, (OURS, SASREC), quick=True),
    Step("memory", 2, True, PAIR, (200,), (2048,), BF16, (OURS, ASSEMBLED, SASREC), ("--phases", "training"), (), True),
    # The same rows once more, SASRec with everything that torch.compile can do.
    Step("throughput", 6, False, PAIR, (200, 50, 800, 1600), (4096,), BF16, (OURS, SASREC)),
    Step("train_step", 4, False, PAIR, (200,), (2048,), BF16, (OURS, ASSEMBLED, SASREC)),
    Step("latency", 6, False, PAIR, (200, 50, 800, 1600), (1,), BF16, (OURS, SASREC)),
    Step("kernels", 4),
    Step("latency", 3, False, (*PAIR, *OTHERS), (50, 200, 800), (1, 32, 256), ("bfloat16", "float32")),
    Step("throughput", 3, False, (*PAIR, *OTHERS), (50, 200, 800), (256, 4096), ("bfloat16", "float32")),
    Step("train_step", 2, False, (*PAIR, *OTHERS), (50, 200), (2048,), ("bfloat16", "float32")),
    Step("scaling", 3),
    Step("memory", 1, False, (*PAIR, *OTHERS), (50, 200), (2048,), BF16),
    Step("kernels", 2, flags=("--autotune",)),
    Step("sanitize", 2),
    Step("counters", 2),
)
FP32 = ("float32",)
CPU = (
    Step("kernels", 3, core=True, flags=("--core",)),
    Step("latency", 3, True, PAIR, (50, 200), (1, 32), FP32),
    Step("throughput", 2, False, PAIR, (50,), (32,), FP32, ("cpu", SASREC)),
    Step("train_step", 2, False, PAIR, (50,), (32,), FP32, ("cpu", SASREC)),
    Step("memory", 2, False, PAIR, (50,), (32,), FP32, ("cpu", SASREC)),
    Step("kernels", 1),
    Step("scaling", 1),
)


def steps(device: str) -> tuple[Step, ...]:
    """For "cuda" or "cpu"."""
    return CUDA if device == "cuda" else CPU
