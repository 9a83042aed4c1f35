"""Sentence encoders by name or folder, loaded without asking the network for what is already here."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..storage import PathLike

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DEFAULT_MODEL = "BAAI/bge-large-en-v1.5"
HUB_TIMEOUT_SECONDS = 10.0
# The names that sentence-transformers knows. It adds an empty "document" where a configuration has none, and then takes
# that one although the configuration has a "passage", so the first that is not empty counts here.
DOCUMENT_PROMPTS = ("document", "passage", "corpus")


@dataclass(frozen=True)
class Encoder:
    """A loaded model.

    Args:
        model: the sentence-transformers model, in float32.
        name: as it was asked for.
        version: the commit on the hub, or a digest of the folder's files.
        prompt: what is put in front of every text.
    """

    model: SentenceTransformer
    name: str
    version: str
    prompt: str

    @property
    def identity(self) -> str:
        """Equal identities compute equal embeddings. A folder counts by what it holds, not by where it is."""
        return f"{self.version}\n{self.prompt}"

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings [n, T] float32 of one batch, of unit length if the model's own configuration says so."""
        rows = self.model.encode_document(
            list(texts),
            prompt=self.prompt,
            batch_size=len(texts),
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return np.asarray(rows, dtype=np.float32)


def load_encoder(model: PathLike = DEFAULT_MODEL, *, device: str | None = None, prompt: str | None = None) -> Encoder:
    """Load a sentence encoder.

    Args:
        model: a folder, or the name of a repository on the Hugging Face hub. What the hub's cache on this machine
            holds is taken from there; the network is asked only for the rest.
        device: by default CUDA if there is a device, else the CPU.
        prompt: what is put in front of every text; by default what the model's configuration says for documents
            (passages, corpora), or else its default prompt.

    Raises:
        ImportError: sentence-transformers is not installed.
        ValueError: no such folder, no such model, or none that can be had offline; or a damaged one.
    """
    transformers = import_sentence_transformers()
    name = str(model)
    folder = Path(model)
    if folder.is_dir():
        loaded = _load(transformers, name, f"{name}: not a sentence-transformers model", device=device)
        version = f"sha256:{_digest(folder)}"
    else:
        if not _is_hub_name(name):
            raise ValueError(f"model {name!r}: no such folder, and no name on the Hugging Face hub (OWNER/NAME)")
        loaded = _from_hub(transformers, name, device)
        version = f"{name}@{_cached_commit(name) or 'unknown'}"
    if prompt is None:
        names = (*DOCUMENT_PROMPTS, loaded.default_prompt_name)
        prompt = next((loaded.prompts[name] for name in names if name and loaded.prompts.get(name)), None)
    # transformers takes the precision of the file; half precision is slow on CPUs and would differ by device.
    return Encoder(loaded.float().eval(), name, version, prompt or "")


def import_sentence_transformers() -> Any:
    try:
        import sentence_transformers
    except ImportError as error:
        if error.name != "sentence_transformers":
            raise
        raise ImportError(
            'sentence-transformers is not installed: pip install "fastm2rec[text]"', name=error.name
        ) from None
    return sentence_transformers


def _from_hub(library: Any, name: str, device: str | None) -> SentenceTransformer:
    about = f"model {name!r} cannot be loaded"
    if _cached_commit(name) is not None:
        try:
            return _load(library, name, about, device=device, local_files_only=True)
        except ValueError:  # a download that was cut short; the network has the rest
            pass
    _ask_hub(name)
    return _load(library, name, about, device=device)


def _load(library: Any, name: str, about: str, **options: Any) -> SentenceTransformer:
    try:
        return library.SentenceTransformer(name, **options)
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, ImportError) as error:
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{about}: {why}") from error  # the first line; libraries go on with advice


def _is_hub_name(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _cached_commit(name: str) -> str | None:
    """The commit of a model in the hub's cache here; None without `modules.json`, which says how it pools."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "modules.json")
    return Path(found).parent.name if isinstance(found, str) else None


def _ask_hub(name: str) -> None:
    """Fail within seconds, and in one line, where a download would retry for a minute and more."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)
    except RepositoryNotFoundError:
        raise ValueError(f"model {name!r}: no such folder here, and no such model on the Hugging Face hub") from None
    except Exception as error:  # which HTTP library raises depends on the version of huggingface-hub
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"model {name!r}: no folder here, not in the Hugging Face cache, and the hub cannot be reached ({why}); "
            "fetch it where there is a network, or give a local folder"
        ) from None


def _digest(folder: Path) -> str:
    """Of the names and contents of a model's files; what was trained with what is not part of a model."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and path.suffix != ".md" and not any(part.startswith(".") for part in name.parts):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{name.as_posix()}\0{content}\n".encode())
    return digest.hexdigest()
