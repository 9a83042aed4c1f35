"""What every sequential recommender here can do: score, recommend, be saved and be loaded.

A saved model is a folder: `config.json`, `model.safetensors` and, where they are known, the catalogue's own ids in
`vocab.json` and its items' counts in `popularity.safetensors`. Both files of tensors carry a digest of the other two,
so files of different models cannot be mixed up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ._topk import top_k
from ._values import extremes, readable
from .config import BERT4RecConfig, GRU4RecConfig, M2RecConfig, SASRecConfig
from .storage import PathLike, StorageError, load_tensors, read_json, save_tensors, write_json
from .vocab import ItemId, Unknown, Vocabulary

CONFIG_FILE = "config.json"
TENSORS_FILE = "model.safetensors"
VOCAB_FILE = "vocab.json"
POPULARITY_FILE = "popularity.safetensors"


class Recommendation(NamedTuple):
    """An item, by the user's own id, and its score (a dot product: higher is better, the scale is the model's own)."""

    item: ItemId
    score: float


class SequentialRecommender(nn.Module):
    """A model that maps a user's item history to a query vector, scored against one vector per item.

    Subclasses set `config` and define `encode`, `hidden`, `item_weight` and `is_causal`. `vocab`, if set, translates
    between the user's item ids and the dense ids 1..n_items. `popularity`, if set, is how often each item occurs in the
    training data: [n_items + 1] int64.
    """

    config: M2RecConfig | SASRecConfig | GRU4RecConfig
    vocab: Vocabulary | None = None
    popularity: Tensor | None = None

    @property
    def n_items(self) -> int:
        """Catalogue size; item ids are 1..n_items."""
        return self.config.n_items

    @property
    def max_len(self) -> int:
        """L, how many of the most recent items are read."""
        return self.config.max_len

    @property
    def model_type(self) -> str:
        """The word for this architecture in `config.json`."""
        return self.config.model_type

    @property
    def is_causal(self) -> bool:
        """Does position t of `hidden` depend on items up to t only, so that a loss at every position is sound?"""
        raise NotImplementedError

    @property
    def item_weight(self) -> Tensor:
        """[n_items + 1, D], the vectors that queries are scored against; row 0 is padding."""
        raise NotImplementedError

    def encode(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """The query vector of each row: item_ids [B, L <= max_len] int64, right-padded with 0, lengths [B], to [B, D].

        Raises:
            TypeError, ValueError: as `check_batch`.
        """
        raise NotImplementedError

    def hidden(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """`encode` at every position: [B, L, D], of which row `lengths - 1` is `encode`'s result.

        Raises:
            TypeError, ValueError: as `check_batch`.
        """
        raise NotImplementedError

    def forward(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """`encode`."""
        return self.encode(item_ids, lengths)

    def check_batch(self, item_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The batch as int64, or an error that names what is wrong with it.

        Values are read on a GPU with FASTM2REC_CHECK=1 only, as its queue would stop, and not inside a compiled graph.

        Raises:
            TypeError: ids or lengths that are not integers.
            ValueError: wrong shapes, more than max_len columns, lengths outside 1..L, ids outside 1..n_items (behind a
                row's length, outside 0..n_items).
        """
        if item_ids.is_floating_point() or item_ids.dtype == torch.bool:
            raise TypeError(f"item_ids: expected integers, got {item_ids.dtype}")
        if item_ids.dim() != 2 or not 1 <= item_ids.shape[1] <= self.max_len:
            raise ValueError(f"item_ids: expected shape [B, 1..{self.max_len}], got {list(item_ids.shape)}")
        check_lengths(lengths, *item_ids.shape)
        if item_ids.numel() and readable(item_ids):
            low, high = extremes(item_ids)
            if low < 0 or high > self.n_items:
                raise ValueError(
                    f"item_ids: expected ids from 1 to {self.n_items} (0 is padding), got {low if low < 0 else high}"
                )
            if low == 0:
                slots = torch.arange(item_ids.shape[1], device=item_ids.device)
                unexpected = (slots < lengths.to(item_ids.device).unsqueeze(1)) & (item_ids == 0)
                if unexpected.any():
                    row = int(unexpected.any(dim=1).nonzero()[0])
                    raise ValueError(
                        f"item_ids: expected items in the first lengths[{row}] slots of row {row}, got padding"
                    )
        return item_ids.long(), lengths.to(item_ids.device, torch.int64)

    def score(self, query: Tensor) -> Tensor:
        """query [B, D] against every item: [B, n_items + 1], with -inf for padding in column 0."""
        scores = query @ self.item_weight.t().to(query.dtype)
        scores[:, 0] = -torch.inf
        return scores

    @torch.no_grad()
    def recommend(
        self,
        histories: Iterable[Iterable[object]],
        k: int = 10,
        *,
        exclude_seen: bool = True,
        unknown: Unknown = "error",
        batch_size: int = 256,
    ) -> list[list[Recommendation]]:
        """The k best items for each history, best first.

        Args:
            histories: one sequence per user, oldest item first, of ids as the user knows them (through `vocab`; dense
                ids 1..n_items where the model has none). Of a long history the last `max_len` items are read.
            k: how many, 1 to n_items.
            exclude_seen: leave out every item of the whole history, also beyond `max_len`. A user who has seen all
                but a few items gets only those few.
            unknown: "error" or "skip" for ids that are not in the catalogue.
            batch_size: histories that are scored at once.

        Raises:
            UnknownItemError: an id that is not in the catalogue, with `unknown="error"`.
            ValueError: an empty history, a k outside 1..n_items, or scores that are NaN.
            TypeError: `histories` is not a sequence of sequences.
        """
        check_k(k, self.n_items)
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        vocab = self.vocab if self.vocab is not None else Vocabulary(range(1, self.n_items + 1))
        dense = [row for row, _ in read_histories(histories, vocab, unknown)]
        training = self.training
        self.eval()
        try:
            return [
                row
                for start in range(0, len(dense), batch_size)
                for row in self._recommend(dense[start : start + batch_size], k, exclude_seen)
            ]
        finally:
            self.train(training)

    def _recommend(self, dense: list[list[int]], k: int, exclude_seen: bool) -> Iterator[list[Recommendation]]:
        weight = self.item_weight
        device = weight.device
        recent = [torch.tensor(row[-self.max_len :]) for row in dense]
        item_ids = nn.utils.rnn.pad_sequence(recent, batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in recent], device=device)
        seen = None
        if exclude_seen:
            rows = torch.tensor([place for place, row in enumerate(dense) for _ in row], device=device)
            seen = rows, torch.tensor([item for row in dense for item in row], device=device)
        query = self.encode(item_ids, lengths)
        yield from named(*top_k(query, weight.to(query.dtype), k, seen), self.vocab)

    def save_pretrained(self, folder: PathLike) -> None:
        """Write the model to `folder`, made if need be. Saving again over the same architecture replaces the weights.

        Raises:
            StorageError: nothing was lost. The folder holds a model of another architecture or catalogue, the disk is
                full, or the folder cannot be written.
        """
        folder = Path(folder)
        config = {"model_type": self.model_type, **self.config.to_dict()}
        vocab = None if self.vocab is None else {"items": self.vocab.items, "titles": self.vocab.titles}
        for name, value in ((CONFIG_FILE, config), (VOCAB_FILE, vocab)):
            path = folder / name
            if path.exists() and read_json(path) != value:
                raise StorageError(f"{path} belongs to another model; save to an empty folder")
        if vocab is not None:
            write_json(folder / VOCAB_FILE, vocab)
        write_json(folder / CONFIG_FILE, config)
        metadata = {"format": "pt", "digest": _digest(config, vocab)}
        if self.popularity is None:
            (folder / POPULARITY_FILE).unlink(missing_ok=True)
        else:
            save_tensors(folder / POPULARITY_FILE, {"counts": self.popularity}, metadata)
        save_tensors(folder / TENSORS_FILE, self.state_dict(), metadata)

    @classmethod
    def from_pretrained(
        cls, source: PathLike, *, revision: str | None = None, device: str | torch.device = "cpu"
    ) -> Self:
        """The model that `save_pretrained` wrote, in evaluation mode. Nothing in the files is executed.

        Args:
            source: a folder, or the name of a Hugging Face hub repository ("owner/name"; needs huggingface-hub).
            revision: branch, tag or commit of the hub repository.
            device: where the parameters go.

        Raises:
            StorageError: a file is missing, truncated, malformed or not finite, the files do not belong together, or
                the folder holds another kind of model than this class.
        """
        folder = _local_folder(source, revision)
        config = read_json(folder / CONFIG_FILE)
        vocab = Vocabulary.load(folder / VOCAB_FILE) if (folder / VOCAB_FILE).exists() else None
        table = None if vocab is None else {"items": vocab.items, "titles": vocab.titles}
        digest = _digest(config, table)

        def load(file: str) -> dict[str, Tensor]:
            tensors, metadata = load_tensors(folder / file)
            if metadata.get("digest") != digest:
                raise StorageError(f"{folder}: {file} was not saved with this {CONFIG_FILE} and {VOCAB_FILE}")
            return tensors

        tensors = load(TENSORS_FILE)
        model = _build_for_loading(config, folder)
        if not isinstance(model, cls):
            raise StorageError(f"{folder} holds a {model.model_type} model, not a {cls.__name__}")
        load_state(model, tensors, folder / TENSORS_FILE)
        model.vocab = vocab
        if (folder / POPULARITY_FILE).exists():
            model.popularity = _counts(load(POPULARITY_FILE), model.n_items, folder / POPULARITY_FILE)
        return model.to(device).eval()


def build_model(model_type: str, config: Mapping[str, Any], text: Tensor | None = None) -> SequentialRecommender:
    """A freshly initialised model.

    Args:
        model_type: "m2rec", "sasrec", "bert4rec" or "gru4rec".
        config: the fields of that model's config dataclass.
        text: frozen text embeddings [n_items + 1, T], for an "m2rec" whose gate reads text.

    Raises:
        ValueError: an unknown model type, or as the config and the model raise.
    """
    # Imported here: model and baselines build on this module.
    if model_type == "m2rec":
        from .model import M2Rec

        return M2Rec(M2RecConfig.from_dict(config), text)
    if text is not None:
        raise ValueError(f"text: expected None with model_type={model_type!r}, which reads no text, got a tensor")
    if model_type == "sasrec":
        from .baselines import SASRec

        return SASRec(SASRecConfig.from_dict(config))
    if model_type == "bert4rec":
        from .baselines import BERT4Rec

        return BERT4Rec(BERT4RecConfig.from_dict(config))
    if model_type == "gru4rec":
        from .baselines import GRU4Rec

        return GRU4Rec(GRU4RecConfig.from_dict(config))
    raise ValueError(f"model_type: expected one of m2rec, sasrec, bert4rec, gru4rec, got {model_type!r}")


def load_state(model: nn.Module, tensors: Mapping[str, Tensor], path: PathLike) -> None:
    """Load `tensors`, read from `path`, into `model`: every one, of the right shape, and finite.

    Raises:
        StorageError: the message names the file and the tensor.
    """
    own = model.state_dict()
    for problem, names in (("lacks", own.keys() - tensors.keys()), ("has unknown", tensors.keys() - own.keys())):
        if names:
            raise StorageError(f"{path} {problem} {', '.join(sorted(names))}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise StorageError(f"{path}: {name}: expected shape {list(own[name].shape)}, got {list(tensor.shape)}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise StorageError(f"{path}: {name} holds NaN or infinity")
    model.load_state_dict(dict(tensors))


def check_lengths(lengths: Tensor, batch: int, seqlen: int) -> None:
    """Check the number of real items of each row of a [batch, seqlen] tensor.

    Raises:
        TypeError: not integers.
        ValueError: not `batch` of them, or a value outside 1..seqlen (read as in `check_batch`).
    """
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths: expected integers, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths: expected shape [{batch}], got {list(lengths.shape)}")
    if batch and readable(lengths):
        low, high = extremes(lengths)
        if low < 1 or high > seqlen:
            raise ValueError(f"lengths: expected values from 1 to {seqlen}, got {low if low < 1 else high}")


def _build_for_loading(config: Any, folder: Path) -> SequentialRecommender:
    """An uninitialised model of the shape that `config` describes; a text table is still to be loaded."""
    try:
        fields = {name: value for name, value in config.items() if name != "model_type"}
        text = None
        if config["model_type"] == "m2rec" and M2RecConfig.from_dict(fields).uses_text:
            text = torch.zeros(fields["n_items"] + 1, fields["text_dim"])
        return build_model(config["model_type"], fields, text)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{folder / CONFIG_FILE} does not describe a model: {error}") from error


def check_k(k: object, n_items: int) -> None:
    """Check how many items are asked for.

    Raises:
        ValueError: not an integer from 1 to n_items.
    """
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= n_items:
        raise ValueError(f"k: expected an integer from 1 to {n_items}, the size of the catalogue, got {k!r}")


def read_histories(
    histories: Iterable[Iterable[object]], vocab: Vocabulary, unknown: Unknown, *, allow_empty: bool = False
) -> list[tuple[list[int], int]]:
    """Histories by the user's own ids as dense ids, and how many unknown ids of each were skipped.

    Raises:
        UnknownItemError, ValueError, TypeError: as `SequentialRecommender.recommend`; an empty history is an error
            unless `allow_empty`.
    """
    dense = []
    for place, history in enumerate(histories):
        if isinstance(history, str | bytes) or not hasattr(history, "__iter__"):
            raise TypeError(f"histories: expected a sequence of item ids at position {place}, got {history!r}")
        history = list(history)
        try:
            row = vocab.encode(history, unknown)
        except KeyError as error:
            raise type(error)(f"histories[{place}]: {error}") from None
        if not row and not allow_empty:
            skipped = "" if not history else f"; all of its {len(history)} ids are unknown and were skipped"
            raise ValueError(f"histories[{place}]: expected at least one item, got an empty history{skipped}")
        dense.append((row, len(history) - len(row)))
    return dense


def named(scores: Tensor, ids: Tensor, vocab: Vocabulary | None) -> Iterator[list[Recommendation]]:
    """The rows of `top_k`'s answer by the user's own ids, without those that score -inf."""
    for values, row in zip(scores.tolist(), ids.tolist(), strict=True):
        kept = [item for item in row if item]
        names = kept if vocab is None else vocab.decode(kept)
        yield [Recommendation(name, value) for name, value in zip(names, values, strict=False)]


def _counts(tensors: Mapping[str, Tensor], n_items: int, path: Path) -> Tensor:
    counts = tensors.get("counts")
    if counts is None or counts.shape != (n_items + 1,) or counts.dtype != torch.int64:
        raise StorageError(f"{path}: expected counts of shape [{n_items + 1}] and dtype torch.int64")
    return counts


def _digest(config: Any, vocab: Any) -> str:
    return hashlib.sha256(json.dumps([config, vocab], sort_keys=True).encode()).hexdigest()


def _local_folder(source: PathLike, revision: str | None) -> Path:
    folder = Path(source)
    if folder.is_dir() or not (
        isinstance(source, str) and source.count("/") == 1 and not source.startswith((".", "/"))
    ):
        return folder
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise StorageError(
            f"{source} is no folder; to read it as a Hugging Face hub repository, pip install 'fastm2rec[hub]'"
        ) from None
    files = [CONFIG_FILE, TENSORS_FILE, VOCAB_FILE, POPULARITY_FILE]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=files))
    except Exception as error:  # the hub's own, its HTTP client's, the disk's
        raise StorageError(f"{source} is no folder, and as a Hugging Face hub repository: {error}") from error
