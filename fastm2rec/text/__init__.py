"""Text embeddings of items: from metadata to a table that the gates read, and encoders tuned on the interactions.

sentence-transformers does the encoding and the training; it is imported when a model is loaded, not before.
"""

from .embed import Embedded, embed_items
from .encoder import DEFAULT_MODEL, Encoder, load_encoder
from .items import item_table
from .template import DEFAULT_TEMPLATE, Template
from .tune import TuneResult, training_pairs, tune_encoder

__all__ = [
    "DEFAULT_MODEL",
    "DEFAULT_TEMPLATE",
    "Embedded",
    "Encoder",
    "Template",
    "TuneResult",
    "embed_items",
    "item_table",
    "load_encoder",
    "training_pairs",
    "tune_encoder",
]
