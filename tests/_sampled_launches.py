"""Executes the first and last blocks of the launches that ship, in the emulator.

    python tests/_sampled_launches.py --arch 90

Tensors hold anything, and no value is looked at. What it finds are accesses out of bounds, races, and barriers that not
all threads reach, at the sizes and with the pipelines that are used. --core takes only those that the tests compile.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.launches._launch import collect, ops
from tests._emulator import EmulationError, Emulator, activate


class _Sampling(Emulator):
    def blocks(self, grid: tuple[int, int, int]) -> np.ndarray:
        return np.array(list(itertools.product(*(sorted({0, size - 1}) for size in grid))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--arch", type=int, default=90, choices=(80, 90), help="compute capability, default 90")
    parser.add_argument("--ops", nargs="+", default=ops(), choices=ops(), metavar="OP", help="only these")
    parser.add_argument("--core", action="store_true", help="only the launches that the tests compile")
    arguments = parser.parse_args()
    activate(_Sampling(arguments.arch))
    launches = [one for one in collect(arguments.ops) if one.core or not arguments.core]
    failed = 0
    for launch in launches:
        start = time.perf_counter()
        try:
            launch.run()
            found = "ok"
        except EmulationError as error:
            found, failed = str(error), failed + 1
        print(f"{launch.op}: {launch.name}: {found} ({time.perf_counter() - start:.1f} s)", flush=True)
    print(f"{len(launches)} launches for sm_{arguments.arch}, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
