"""A folded model for other runtimes: torch.export's .pt2 and ONNX, in plain operations.

The graph takes dense item ids [B, L] (int64, 1 to n_items, what stands behind a row's length is not read) and lengths
[B] (int64, 1 to L), and gives query vectors [B, D]; with `k` also the k best items and their scores, [B, k] each, items
of the history included. B and L, up to max_len, are free. The filter is a product with a constant matrix, no FFT, and
the scan is the closed form of its last state: reverse sums of the steps and an exponential, no loop over time.
"""

from __future__ import annotations

import importlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .folded import Folded, fold
from .model import M2Rec
from .reference.encode_last import encode_last
from .storage import PathLike, atomic_write_bytes

OPSET = 18


class ExportableEncoder(nn.Module):
    """A folded one-layer M2Rec as a module of plain operations, in float32.

    Args:
        model: the trained model.
        k: also give the k best items; None for query vectors alone.

    Raises:
        ValueError: a model that cannot be folded, or a k outside 1..n_items.
    """

    def __init__(self, model: M2Rec, k: int | None = None) -> None:
        super().__init__()
        if k is not None and not 1 <= k <= model.n_items:
            raise ValueError(f"k: expected 1 to {model.n_items}, the size of the catalogue, got {k}")
        folded = fold(model).to("cpu", torch.float32)
        self.k = k
        self.max_len = folded.max_len
        self._weights = _Weights(folded)
        if k is not None:
            self.register_buffer("item_weight", model.item_weight.detach().to("cpu", torch.float32, copy=True))

    def forward(self, item_ids: Tensor, lengths: Tensor) -> Any:
        """item_ids [B, L] and lengths [B] to the query [B, D], or to (query, items [B, k], scores [B, k])."""
        query = encode_last(item_ids, lengths, self._weights)
        if self.k is None:
            return query
        scores, places = (query @ self.item_weight[1:].t()).topk(self.k, dim=1)  # type: ignore[index]
        return query, places + 1, scores


class _Weights(nn.Module):
    """`Folded` with its tensors as buffers, under the same names."""

    def __init__(self, folded: Folded) -> None:
        super().__init__()
        for name, value in vars(folded).items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            elif name != "nodes":
                setattr(self, name, value)


def export_program(model: M2Rec, k: int | None = None) -> torch.export.ExportedProgram:
    """The model as torch.export's program, with dynamic B and L; see the module for what it takes and gives.

    Raises:
        ValueError: as `ExportableEncoder`.
    """
    module = ExportableEncoder(model, k).eval()
    rows = torch.export.Dim("batch", min=1, max=2**16)
    shapes: dict[str, Any] = {"item_ids": {0: rows}, "lengths": {0: rows}}
    slots = min(3, module.max_len)
    if slots > 1:
        shapes["item_ids"][1] = torch.export.Dim("length", min=1, max=module.max_len)
    example = torch.ones(2, slots, dtype=torch.int64), torch.tensor([1, slots])
    with torch.no_grad():
        return torch.export.export(module, example, dynamic_shapes=shapes)


def save_program(model: M2Rec, path: PathLike, k: int | None = None) -> None:
    """Write a .pt2 file, which `torch.export.load` reads; whole or not at all.

    Raises:
        ValueError: as `ExportableEncoder`, or a name that does not end in .pt2.
        StorageError: it could not be written.
    """
    if Path(path).suffix != ".pt2":
        raise ValueError(f"path: expected a name that ends in .pt2, as torch.export.load wants it, got {path}")
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(export_program(model, k), buffer)
    atomic_write_bytes(path, buffer.getvalue())


def save_onnx(model: M2Rec, path: PathLike, k: int | None = None) -> None:
    """Write an ONNX file with the weights in it (2 GB at most); whole or not at all.

    Inputs `item_ids` and `lengths`, outputs `query` and, with `k`, `items` and `scores`.

    Raises:
        ImportError: the extra `onnx` is not installed.
        ValueError: as `ExportableEncoder`.
        StorageError: it could not be written.
    """
    for package in ("onnx", "onnxscript"):
        _need(package)
    program = export_program(model, k)
    names = ["query"] if k is None else ["query", "items", "scores"]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        made = Path(folder) / "model.onnx"
        torch.onnx.export(
            program,
            (),
            made,
            input_names=["item_ids", "lengths"],
            output_names=names,
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
        atomic_write_bytes(path, made.read_bytes())


def run_onnx(path: PathLike, item_ids: Tensor, lengths: Tensor) -> list[Tensor]:
    """The outputs of an ONNX file in ONNX Runtime, on the CPU.

    Raises:
        ImportError: the extra `onnx` is not installed.
    """
    runtime = _need("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {"item_ids": item_ids.numpy(), "lengths": lengths.numpy()})
    return [torch.from_numpy(output) for output in found]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on torch's own code and on packages that are not needed."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", message="No complete tensor found")
            yield
    finally:
        log.setLevel(level)


def _need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        message = f"ONNX needs {package}: pip install 'fastm2rec[onnx]'"
        raise ImportError(message, name=package) from error
