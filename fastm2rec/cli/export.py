"""`fastm2rec export`: a trained model for ONNX Runtime, torch.export or FAISS, checked against the model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._arguments import PROGRAM, positive

if TYPE_CHECKING:
    from ..base import SequentialRecommender
    from ..model import M2Rec
    from ..recommender import Recommender

_ROWS = 256
_SEED = 0


def run(arguments: list[str]) -> int:
    from ..model import M2Rec
    from ..recommender import Recommender

    parser = argparse.ArgumentParser(
        f"{PROGRAM} export", description="Write a trained model for another runtime, and check what was written."
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="a run's folder, or a folder that save_pretrained wrote")
    add("--format", required=True, choices=["onnx", "torch", "faiss"],
        help="onnx or torch (.pt2): ids to query vectors; faiss: an index of the items")  # fmt: skip
    add("--out", required=True, type=Path, metavar="FILE", help="the file to write; for torch, FILE.pt2")
    add("--top-k", type=positive, metavar="K", help="onnx, torch: also give the K best items and their scores")
    add("--index", default="HNSW32", metavar="FACTORY",
        help="faiss: what index, in FAISS's words: Flat, HNSW32, IVF1024,Flat, ... (default: HNSW32)")  # fmt: skip
    add("-k", type=positive, default=10, help="faiss: the k of the recall that is printed (default: 10)")
    options = parser.parse_args(arguments)

    best = options.model / "best"
    model = _load(best if best.is_dir() else options.model)
    recommender = Recommender(model)
    item_ids, lengths = _histories(recommender)
    if options.format == "faiss":
        print(_write_index(recommender, options.out, options.index, options.k, item_ids, lengths))
    elif isinstance(model, M2Rec):
        print(_write_encoder(model, recommender, options.out, options.format, options.top_k, item_ids, lengths))
    else:
        raise ValueError(f"--format {options.format}: expected a one-layer m2rec, got a {model.model_type} model")
    if model.vocab is not None:
        print(f"its item ids are the places in the catalogue, from 1: {options.model}'s vocab.json names them")
    return 0


def _load(folder: Path) -> SequentialRecommender:
    from ..base import SequentialRecommender

    return SequentialRecommender.from_pretrained(folder)


def _histories(recommender: Recommender) -> tuple[Tensor, Tensor]:
    """Histories drawn at random, of every length: item_ids [B, L] with zeros behind them, and lengths [B]."""
    generator = torch.Generator().manual_seed(_SEED)
    lengths = torch.randint(1, recommender.max_len + 1, (_ROWS,), generator=generator)
    item_ids = torch.randint(1, recommender.n_items + 1, (_ROWS, recommender.max_len), generator=generator)
    return item_ids.masked_fill(torch.arange(recommender.max_len) >= lengths.unsqueeze(1), 0), lengths


def _write_encoder(
    model: M2Rec, recommender: Recommender, out: Path, kind: str, k: int | None, item_ids: Tensor, lengths: Tensor
) -> str:
    from ..export import run_onnx, save_onnx, save_program

    if kind == "onnx":
        save_onnx(model, out, k)
        found = run_onnx(out, item_ids, lengths)
    else:
        save_program(model, out, k)
        outputs = torch.export.load(out).module()(item_ids, lengths)
        found = [outputs] if k is None else list(outputs)
    expected = recommender.encode_ids(item_ids, lengths)
    error = (found[0] - expected).abs().max() / expected.abs().max()
    said = f"{out}: {out.stat().st_size:,} bytes; on {_ROWS} random histories its query vectors are off by {error:.1e} "
    said += "of the largest value"
    if k is not None:
        _, best = recommender.top(expected, k)
        same = (best.unsqueeze(2) == found[1].unsqueeze(1)).any(2).double().mean()
        said += f", and it finds {same:.2%} of the {k} best items"
    return said


def _write_index(recommender: Recommender, out: Path, factory: str, k: int, item_ids: Tensor, lengths: Tensor) -> str:
    from ..ann import ItemIndex
    from ..base import check_k

    check_k(k, recommender.n_items)
    ItemIndex.build(recommender.item_weight, factory).save(out)
    index = ItemIndex.load(out)
    recall = index.recall(recommender.encode_ids(item_ids, lengths), k, recommender.item_weight)
    return (
        f"{out}: {out.stat().st_size:,} bytes, {factory} of {index.n_items:,} items; recall@{k} against the exact "
        f"answer, on {_ROWS} random histories: {recall:.4f}"
    )
