"""`encode_last` on a GPU as CUDA graphs: one launch for a batch, where the kernels' own launches would take longer.

A graph has fixed shapes, so there is one for each bucket of rows and of slots, captured when it is first needed. A
batch is padded to its bucket with rows of one item; their results are dropped.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from .folded import FoldedM2Rec

# Rows of the largest graph; larger batches go through it in pieces.
MAX_ROWS = 256
MIN_SLOTS = 16
# Calls before a capture: they compile the kernels and make the allocations that are made once.
_WARM_UP = 3
_capturing = threading.Lock()  # captures of one process must not overlap


def bucket(size: int, least: int, most: int) -> int:
    """The power of two that `size` fits into, from `least` on, or `most` where that is less."""
    return min(most, max(least, 1 << (size - 1).bit_length()))


class GraphedEncoder:
    """`FoldedM2Rec.encode` of ids on the CPU, by graphs; any number of threads may call it.

    Args:
        model: on a CUDA device.
    """

    def __init__(self, model: FoldedM2Rec) -> None:
        self._model = model
        self._graphs: dict[tuple[int, int], _Graph] = {}

    def encode(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """item_ids [B, L <= max_len] and lengths [B], int64 on the CPU and known to be sound, to [B, D] on the GPU."""
        pieces = zip(item_ids.split(MAX_ROWS), lengths.split(MAX_ROWS), strict=True)
        found = [self._graph(*ids.shape).run(ids, n) for ids, n in pieces]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _graph(self, rows: int, slots: int) -> _Graph:
        shape = bucket(rows, 1, MAX_ROWS), bucket(slots, MIN_SLOTS, self._model.folded.max_len)
        graph = self._graphs.get(shape)
        if graph is None:
            with _capturing:
                graph = self._graphs.get(shape)
                if graph is None:
                    graph = self._graphs[shape] = _Graph(self._model, *shape)
        return graph


class _Graph:
    """One captured shape, with its buffers; `run` takes turns."""

    @torch.inference_mode(False)  # who makes it may be in that mode, who uses it later not
    @torch.no_grad()
    def __init__(self, model: FoldedM2Rec, rows: int, slots: int) -> None:
        device = model.folded.device
        self._lock = threading.Lock()
        self._host_ids = torch.ones(rows, slots, dtype=torch.int64).pin_memory()
        self._host_lengths = torch.ones(rows, dtype=torch.int64).pin_memory()
        self._ids = self._host_ids.to(device)
        self._lengths = self._host_lengths.to(device)
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP):
                model.encode(self._ids, self._lengths)
        self._stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile: only what this thread does can spoil the capture.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            self._out = model.encode(self._ids, self._lengths)

    def run(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        rows, slots = item_ids.shape
        current = torch.cuda.current_stream(self._ids.device)
        with self._lock:
            # The copies of the call before have been made: it waited for its stream below.
            self._host_ids[:rows, :slots] = item_ids
            self._host_lengths[:rows] = lengths
            self._host_lengths[rows:] = 1
            self._host_ids[rows:, 0] = 1
            with torch.cuda.stream(self._stream):
                self._ids.copy_(self._host_ids, non_blocking=True)
                self._lengths.copy_(self._host_lengths, non_blocking=True)
                self._graph.replay()
                query = self._out[:rows].clone()
            self._stream.synchronize()
        query.record_stream(current)
        return query
