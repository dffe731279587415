"""safetensors files, single or in shards with an index: written by shards or by tensors, read tensor by tensor.

``STEM.safetensors``, or ``STEM-00001-of-0000N.safetensors`` … with ``STEM.safetensors.index.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unigendet.files import naming, rust_errors

SHARD_BYTES = 5 * 2**30
LISTED = 20  # so many tensors of a kind does a message name
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class CheckpointError(ValueError):
    """A checkpoint is damaged or does not fit; the message names the file, and the tensors concerned."""


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


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

    with naming(file), rust_errors(file):
        save_file(dict(tensors), file, metadata={"format": "pt"})


def stream_tensors(
    tensors: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    file: Path,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file tensor by tensor, so that no more than one is held in memory.

    The format: the header's length (8 bytes, little-endian), the header (JSON, padded with spaces to a multiple of 8),
    and the tensors' bytes in its order.

    Args:
        tensors: shape and dtype (float32, bfloat16 or float16) of every tensor, by name; they may be on ``meta``.
        read: a tensor by its name, on the CPU.
        file: where to.
        metadata: texts for the header, beside the format.

    Raises:
        ValueError: ``read`` gave a tensor of another shape or dtype.
        OSError: the file cannot be written; names it.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with naming(file), file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            out.write(_content(name, read(name), tensor))  # no name here: the next one would be read beside it


def _content(name: str, tensor: Tensor, expected: Tensor) -> NDArray[np.uint8]:
    """The bytes of a tensor that must have the shape and dtype of ``expected``."""
    if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
        given, wanted = ((list(t.shape), t.dtype) for t in (tensor, expected))
        raise ValueError(f"{name} is {given}; it must be {wanted}")
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def write_shards(sizes: Mapping[str, int], read: Callable[[str], Tensor], folder: Path, stem: str) -> None:
    """Write tensors into ``folder``, at most ``SHARD_BYTES`` a file unless a single tensor is larger.

    Args:
        sizes: bytes of every tensor, by name, in their order.
        read: a tensor by its name, on the CPU and contiguous, sharing memory with no other. Called when its shard is
            written, so that no more than one shard is held in memory.
        folder: where to; it should hold no earlier files of this ``stem``.
        stem: of the file names.
    """
    for file, names in plan_shards(sizes, folder, stem, SHARD_BYTES).items():
        save_tensors({name: read(name) for name in names}, folder / file)


def plan_shards(sizes: Mapping[str, int], folder: Path, stem: str, limit: int | None) -> dict[str, list[str]]:
    """File name → names of the tensors that it is to hold; writes their index if it is more than one file.

    ``sizes``, ``folder``, ``stem``: see ``write_shards``. ``limit``: bytes of tensors in a file, unless a single one is
    larger; None: one file.
    """
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if limit is not None and held + size > limit and shards[-1]:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    count = len(shards)
    if count == 1:
        return {f"{stem}.safetensors": shards[0]}
    files = {f"{stem}-{i:05}-of-{count:05}.safetensors": names for i, names in enumerate(shards, 1)}
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / index_name(stem)).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return files


def index_name(stem: str) -> str:
    """The file that says which shard holds which tensor."""
    return f"{stem}.safetensors.index.json"


def outdated_names(stems: Iterable[str]) -> list[str]:
    """Patterns of everything that ``write_shards`` writes under these stems, in one file or in shards."""
    return [p for s in stems for p in (f"{s}.safetensors", f"{s}-*-of-*.safetensors", index_name(s))]


def shard_files(folder: Path, stem: str) -> list[Path]:
    """The files that hold what was written under a stem, by ``write_shards`` or by rows; none if there are none.

    The index names for every tensor its file, or a list of files that hold rows of it.

    Raises:
        FileNotFoundError: shards that the index names are missing.
        CheckpointError: the index is damaged.
    """
    index = folder / index_name(stem)
    if not index.is_file():
        whole = folder / f"{stem}.safetensors"
        return [whole] if whole.is_file() else []
    weight_map = JsonObject(index)["weight_map"]
    values = list(weight_map.values()) if isinstance(weight_map, dict) else []
    files = [name for value in values for name in (value if isinstance(value, list) else [value])]
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
