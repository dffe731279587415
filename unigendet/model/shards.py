"""safetensors files, single or in shards with an index: written one shard at a time, read tensor by tensor.

``STEM.safetensors``, or ``STEM-00001-of-0000N.safetensors`` … with ``STEM.safetensors.index.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from unigendet.files import naming, telling

SHARD_BYTES = 5 * 2**30


class CheckpointError(ValueError):
    """A checkpoint is damaged or does not fit; the message names the file, and the tensors concerned."""


class JsonObject(dict[str, Any]):
    """The object in a JSON file. A damaged file or a missing key is a CheckpointError that names the file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{file} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{file} holds a {type(values).__name__}; it must hold an object")
        super().__init__(values)

    def __missing__(self, key: str) -> Any:
        raise CheckpointError(f"{self._file} has no {key!r}; it has {sorted(self)}")


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file. Raises OSError that names the file if the disk is full or cannot be written."""
    from safetensors.torch import save_file

    with naming(file), telling(file):
        save_file(dict(tensors), file, metadata={"format": "pt"})


def write_shards(sizes: Mapping[str, int], read: Callable[[str], Tensor], folder: Path, stem: str) -> None:
    """Write tensors into ``folder``, at most ``SHARD_BYTES`` a file unless a single tensor is larger.

    Args:
        sizes: bytes of every tensor, by name, in their order.
        read: a tensor by its name, on the CPU and contiguous, sharing memory with no other. Called when its shard is
            written, so that no more than one shard is held in memory.
        folder: where to; it should hold no earlier files of this ``stem``.
        stem: of the file names.
    """
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    count = len(shards)
    files = [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        files = [f"{stem}.safetensors"]
    for file, names in zip(files, shards, strict=True):
        save_tensors({name: read(name) for name in names}, folder / file)
    if count > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / index_name(stem)).write_text(json.dumps(index, indent=1), encoding="utf-8")


def index_name(stem: str) -> str:
    """The file that says which shard holds which tensor."""
    return f"{stem}.safetensors.index.json"


def outdated_names(stems: Iterable[str]) -> list[str]:
    """Patterns of everything that ``write_shards`` writes under these stems, in one file or in shards."""
    return [p for s in stems for p in (f"{s}.safetensors", f"{s}-*-of-*.safetensors", index_name(s))]


def shard_files(folder: Path, stem: str) -> list[Path]:
    """The files that ``write_shards`` wrote; none if there are none.

    Raises:
        FileNotFoundError: shards that the index names are missing.
        CheckpointError: the index is damaged.
    """
    index = folder / index_name(stem)
    if not index.is_file():
        whole = folder / f"{stem}.safetensors"
        return [whole] if whole.is_file() else []
    weight_map = JsonObject(index)["weight_map"]
    files = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not files or not all(isinstance(name, str) for name in files):
        raise CheckpointError(f"{index}: weight_map is {str(weight_map)[:80]}; it must give the file of every tensor")
    names = sorted(set(files))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{index} names shards that are not there: {absent}; copy or download them again")
    return [folder / name for name in names]


def open_tensors(file: Path) -> Any:
    """safetensors' ``safe_open`` of a file, as a context manager. Raises CheckpointError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is not a complete safetensors file ({error}); copy or download it again"
        ) from error


def read_tensors(*files: Path) -> dict[str, Tensor]:
    """All tensors of safetensors files, on the CPU. Raises CheckpointError if a file is damaged."""
    read: dict[str, Tensor] = {}
    for file in files:
        with open_tensors(file) as tensors:
            read |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    return read
