"""The publishers' own files, fetched with a checksum or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..storage import PathLike
from .files import DataError


@dataclass(frozen=True)
class Published:
    """A file on its publisher's server.

    Args:
        url: where it is.
        checksum: "md5:..." or "sha256:...", as pooch takes it; None where no trustworthy one is known.
        licence: what its publisher asks for.
    """

    url: str
    checksum: str | None
    licence: str


PUBLISHED: dict[str, Published] = {
    # GroupLens publishes the MD5 sums beside the archives (ml-100k.zip.md5, ml-1m.zip.md5).
    "ml-100k": Published(
        "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        "md5:0e33842e24a9c977be4e0107933c0723",
        "research use, no redistribution: https://files.grouplens.org/datasets/movielens/ml-100k-README.txt",
    ),
    "ml-1m": Published(
        "https://files.grouplens.org/datasets/movielens/ml-1m.zip",
        "md5:c4d9eecfca2ab87c1945afe126590906",
        "research use, no redistribution: https://files.grouplens.org/datasets/movielens/ml-1m-README.txt",
    ),
    "gowalla": Published(
        "https://snap.stanford.edu/data/loc-gowalla_totalCheckins.txt.gz",
        None,
        "cite Cho, Myers, Leskovec (KDD 2011): https://snap.stanford.edu/data/loc-gowalla.html",
    ),
}


def download(name: str, folder: PathLike, published: Published | None = None) -> Path:
    """Fetch a publisher's file into `folder` unless it is already there, whole and as it should be.

    Args:
        name: one of `PUBLISHED`.
        folder: made if need be.
        published: take this file instead, from a mirror for instance.

    Raises:
        DataError: no such data set, no checksum known (the message says what to do), a download that failed, or one
            whose checksum is wrong, of which nothing is kept.
    """
    import pooch
    import requests

    if published is None:
        if name not in PUBLISHED:
            raise DataError(f"download: expected one of {', '.join(PUBLISHED)}, got {name!r}")
        published = PUBLISHED[name]
    if published.checksum is None:
        raise DataError(
            f"{name}: no checksum of {published.url} is known, so it is not fetched; download it yourself, check it "
            f"({published.licence}), and pass its folder as --data"
        )
    file = published.url.rsplit("/", 1)[1]
    try:
        return Path(pooch.retrieve(published.url, published.checksum, fname=file, path=Path(folder), progressbar=False))
    except requests.RequestException as error:
        raise DataError(f"{name}: cannot fetch {published.url}: {error}") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{name}: {published.url} was not kept: {error}") from None
