"""From raw logs to training samples: readers, k-core, sequences, splits, and what a data set is made of."""

from .catalog import NAMES, Loaded, load_dataset
from .download import download
from .files import DataError
from .log import SequenceDataset, k_core, order
from .readers import read_items, read_log
from .samples import Batch, PrefixSamples, Sequences, SequenceSamples
from .synthetic import Synthetic, synthetic
from .text_table import AlignedText, TextTable, align, find_text_table, load_text_table, save_text_table

__all__ = [
    "NAMES",
    "AlignedText",
    "Batch",
    "DataError",
    "Loaded",
    "PrefixSamples",
    "SequenceDataset",
    "SequenceSamples",
    "Sequences",
    "Synthetic",
    "TextTable",
    "align",
    "download",
    "find_text_table",
    "k_core",
    "load_dataset",
    "load_text_table",
    "order",
    "read_items",
    "read_log",
    "save_text_table",
    "synthetic",
]
