"""Tensors by rows: which rows of a parameter this process holds, and in which files the rows of a tensor lie.

Several processes divide every parameter by rows (``unigendet.training.parallel``), and each may write its own rows to a
file of its own. Loading copies from the rows that a file holds to the rows that a process holds, whatever their numbers
on the two sides; a whole tensor is the case of all rows, in one file or one process.

A safetensors file that holds rows says so as PyTorch's distributed checkpoints do: ``DCP_SHARDING_INFO`` in its
metadata gives the position of each tensor's first element in the whole tensor.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unigendet.model.shards import CheckpointError, listed, open_tensors

OFFSETS, FIRST = "DCP_SHARDING_INFO", "saved_offsets"
_MAPPED = 2**29  # bytes read before a file is opened anew: until then, its pages count as the process's memory


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory; of a whole tensor, itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def rows(tensor: Tensor) -> slice:
    """Which rows of the whole tensor this process's part is."""
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(tensor, DTensor):
        return slice(0, tensor.shape[0])
    start, count = 0, tensor.shape[0]
    for dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):  # by rows, in as many equal parts as there are, the last ones smaller or empty
            size, index = tensor.device_mesh.size(dim), tensor.device_mesh.get_local_rank(dim)
            part = -(-count // size)
            start, count = start + min(index * part, count), max(0, min(part, count - index * part))
    return slice(start, start + count)


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of a tensor in this process.

    Attributes:
        tensor: the rows; of a tensor without dimensions, itself.
        row: the first one's number in the whole tensor.
        shape: of the whole tensor.
    """

    tensor: Tensor
    row: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Part:
        """What this process holds of ``tensor``, in the same memory."""
        return cls(local(tensor), rows(tensor).start if tensor.dim() else 0, tuple(tensor.shape))

    @property
    def end(self) -> int:
        """The number after the last row's."""
        return self.row + (self.tensor.shape[0] if self.shape else 1)

    def split(self, sizes: Sequence[int]) -> list[Part]:
        """The whole tensor as consecutive blocks of rows, and of each what lies in this part."""
        blocks, first = [], 0
        for size in sizes:
            start = min(max(first, self.row), first + size)
            stop = max(start, min(first + size, self.end))
            own = self.tensor[start - self.row : stop - self.row] if start < stop else self.tensor[:0]
            blocks.append(Part(own, start - first, (size, *self.shape[1:])))
            first += size
        return blocks


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor in a file: the first one's number in the whole tensor, and the shape of the rows together."""

    file: Path
    row: int
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        """The number after the last row's."""
        return self.row + (self.shape[0] if self.shape else 1)


def find_pieces(files: Iterable[Path]) -> dict[str, list[Piece]]:
    """All tensors that safetensors files hold together, by name, as pieces in the order of their rows; reads none.

    Raises:
        CheckpointError: a file is damaged, or a tensor lacks rows, or has some twice.
    """
    found: dict[str, list[Piece]] = {}
    for file in files:
        with open_tensors(file) as tensors:
            offsets = _offsets(file, (tensors.metadata() or {}).get(OFFSETS))
            for name in tensors.keys():  # noqa: SIM118 (safe_open is not a mapping)
                piece = Piece(file, offsets.get(name, 0), tuple(tensors.get_slice(name).get_shape()))
                found.setdefault(name, []).append(piece)
    faults = []
    for name, pieces in found.items():
        pieces.sort(key=lambda piece: piece.row)
        if pieces[0].row:
            faults.append(f"{name} (rows 0 to {pieces[0].row - 1} are missing)")
        for one, other in itertools.pairwise(pieces):
            if one.end > other.row:
                faults.append(f"{name} (in {one.file.name} and again in {other.file.name})")
            elif one.end < other.row:
                faults.append(f"{name} (rows {one.end} to {other.row - 1} are missing)")
            elif one.shape[1:] != other.shape[1:]:
                shapes = f"{list(one.shape)} in {one.file.name} and {list(other.shape)} in {other.file.name}"
                faults.append(f"{name} (rows are {shapes})")
    if faults:
        where = next(iter(found.values()))[0].file.parent
        raise CheckpointError(f"{where} does not hold whole tensors: {listed(faults)}; copy or download it again")
    return found


def whole_shape(pieces: Sequence[Piece]) -> tuple[int, ...]:
    """The shape of the tensor that ``find_pieces`` found in pieces."""
    shape = pieces[-1].shape
    return (pieces[-1].end, *shape[1:]) if shape else shape


def _offsets(file: Path, text: str | None) -> dict[str, int]:
    """First rows by name, from a file's metadata; none in a file of whole tensors."""
    if text is None:
        return {}
    try:
        offsets = {name: list(entry[FIRST]) for name, entry in json.loads(text).items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file}: its metadata does not say which rows it holds ({error!r})") from error
    divided = [name for name, offset in offsets.items() if any(offset[1:])]
    if divided:
        raise CheckpointError(f"{file} holds tensors that are not divided by rows alone: {listed(divided)}")
    return {name: offset[0] if offset else 0 for name, offset in offsets.items()}


def read_rows(
    found: Mapping[str, Sequence[Piece]],
    targets: Mapping[str, Part],
    convert: Callable[[str, Tensor], Tensor] = lambda name, value: value,
) -> None:
    """Copy into every part its rows, converting to its dtype; only these are read, from mapped files.

    Args:
        found: by name, pieces that make up the tensor; names that ``targets`` lacks are left aside.
        targets: by name; one that is not in ``found`` keeps what it holds.
        convert: makes of rows as they are in a file, by name, what is to be copied.
    """
    needed: dict[Path, list[tuple[str, Piece]]] = {}
    for name, pieces in found.items():
        for piece in pieces:
            if name in targets and max(piece.row, targets[name].row) < min(piece.end, targets[name].end):
                needed.setdefault(piece.file, []).append((name, piece))
    for file, wanted in needed.items():
        for some in _sittings(wanted, targets):
            _read(file, some, targets, convert)


def _sittings(wanted: Sequence[tuple[str, Piece]], targets: Mapping[str, Part]) -> Iterator[list[tuple[str, Piece]]]:
    """In their order, so many as come to ``_MAPPED`` bytes at a time."""
    some: list[tuple[str, Piece]] = []
    size = 0
    for name, piece in wanted:
        some.append((name, piece))
        size += targets[name].tensor.nbytes
        if size >= _MAPPED:
            yield some
            some, size = [], 0
    if some:
        yield some


@torch.no_grad()
def _read(
    file: Path,
    wanted: Sequence[tuple[str, Piece]],
    targets: Mapping[str, Part],
    convert: Callable[[str, Tensor], Tensor],
) -> None:
    with open_tensors(file) as tensors:
        for name, piece in wanted:
            part = targets[name]
            start, stop = max(piece.row, part.row), min(piece.end, part.end)
            own = (
                part.tensor
                if (start, stop) == (part.row, part.end)
                else part.tensor[start - part.row : stop - part.row]
            )
            if (start, stop) == (piece.row, piece.end):
                value = tensors.get_tensor(name)
            else:
                value = tensors.get_slice(name)[start - piece.row : stop - piece.row]
            own.copy_(convert(name, value))
