"""Published test values, to stand beside those measured here. None was measured by this package."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from bench.experiments import tables

_M2REC = "M2Rec's repository, figure of results"
# Data set, our label, HR@10 and NDCG@10 as published ("" where it was not), source.
VALUES = (
    ("ml-1m", "GRU4Rec", ".2934", ".1642", _M2REC),
    ("ml-1m", "SASRec", ".2977", ".1687", _M2REC),
    ("ml-1m", "BERT4Rec", ".2958", ".1674", _M2REC),
    ("ml-1m", "Mamba4Rec", ".3121", ".1822", _M2REC),
    ("ml-1m", "Mamba4Rec, 2 layers", ".3253", "", "TiM4Rec's repository, issue 1"),
    ("ml-1m", "M2Rec (inner)", ".3224", ".1867", _M2REC),
    ("foursquare-nyc", "GRU4Rec", ".0355", ".0214", _M2REC),
    ("foursquare-nyc", "SASRec", ".0360", ".0223", _M2REC),
    ("foursquare-nyc", "BERT4Rec", ".0367", ".0225", _M2REC),
    ("foursquare-nyc", "Mamba4Rec", ".0544", ".0278", _M2REC),
    ("foursquare-nyc", "M2Rec (inner)", ".0578", ".0294", _M2REC),
    ("amazon-beauty", "SASRec", ".0842", "", "RecBole-style pipelines, cross-entropy"),
    ("amazon-beauty", "Mamba4Rec", ".0734 to .0914", "", "several pipelines"),
)

_NOTE = """\
Published test values beside those of this table. They come from other preparations of the data and other training,
most of them from longer sequences, so only their order can be compared. Whether the models here were trained out,
the column *still rising* says. The check-ins of New York here are a subset of frequent venues and users, with their
repeat visits."""
_OF_DATA = " What the top of this page says of a copy of the data bears on this comparison, too."


def beside(record: Mapping[str, Any]) -> str:
    """A table of the published values of the data sets and models that `record` has; empty without any."""
    rows = []
    for dataset, label, hits, gain, source in VALUES:
        own = [row["test"] for row in record["runs"] if (row["dataset"], row["label"]) == (dataset, label)]
        if own:
            here = [f"{statistics.fmean(test[name] for test in own):.4f}" for name in ("HR@10", "NDCG@10")]
            rows.append([dataset, label, hits, gain, *here, source])
    header = ["data set", "model", "published HR@10", "NDCG@10", "HR@10 here", "NDCG@10 here", "source"]
    note = _NOTE + (_OF_DATA if tables.notes(record.get("data", {})) else "")
    return f"{note}\n\n{tables.markdown(header, rows, left=2)}" if rows else ""
