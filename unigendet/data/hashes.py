"""Hashes of files: whether a model, an image or a set of them is still the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

_WHOLE = 64 * 2**20  # bytes; larger files are sampled by ``fingerprint``
_SLICES, _SLICE = 64, 2**18


def fingerprint(files: Iterable[str | Path]) -> str:
    """A hash of files' contents, 16 hexadecimal digits; of a large file, its size and 64 slices spread over it.

    That a model was trained on changes every slice of its weights, so reading 16 MiB of a shard is enough to notice.
    """
    digest = hashlib.sha256()
    for file in files:
        with Path(file).open("rb") as stream:
            size = stream.seek(0, 2)
            digest.update(size.to_bytes(8, "little"))
            whole = size <= _WHOLE
            for i in range(1 if whole else _SLICES):
                stream.seek(0 if whole else i * (size - _SLICE) // (_SLICES - 1))
                digest.update(stream.read(size if whole else _SLICE))
    return digest.hexdigest()[:16]


def file_hash(path: str | Path) -> bytes:
    """SHA-256 of a file's whole content."""
    with Path(path).open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()


def files_hash(files: Iterable[tuple[str, Path]]) -> str:
    """SHA-256, in hexadecimal digits, over files' contents, each with what it is to be called."""
    total = hashlib.sha256()
    for name, path in files:
        total.update(name.encode(errors="surrogateescape") + b"\0" + file_hash(path))
    return total.hexdigest()
