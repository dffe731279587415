"""Sizes of the images of a pack, in the form that the ops take: a flat CPU table, read inside the operators only.

The objects are built once per pack. A table's values never become constants of a compiled graph.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unigendet.ops._arguments import reject


def _integer(value: object) -> int:
    if isinstance(value, bool):
        raise TypeError("a bool is no size")
    return operator.index(value)


def _integers(name: str, sizes: Sequence[Sequence[int]], fields: tuple[str, ...]) -> list[tuple[int, ...]]:
    """Return ``sizes`` in Python integers, after checking them; integers of NumPy are as good."""
    need = f"a non-empty list of ({', '.join(fields)}), all positive integers"
    try:
        integers = [tuple(_integer(n) for n in size) for size in sizes]
    except TypeError:  # no list of lists, or not of integers
        reject(name, sizes, need)
    if not integers or any(len(size) != len(fields) or min(size) < 1 for size in integers):
        reject(name, sizes, need)
    return integers


def _table(sizes: list[tuple[int, ...]]) -> Tensor:
    return torch.tensor(sizes, dtype=torch.int64).flatten()


def check_table(grids: object, kind: type[LatentGrids] | type[ImageGrids]) -> Tensor:
    """Return ``grids.table`` after checking that ``grids`` is a ``kind`` and that the table is as that makes it."""
    if not isinstance(grids, kind):
        reject("grids", f"a {type(grids).__name__}", f"a {kind.__name__}")
    table = grids.table
    fits = isinstance(table, Tensor) and table.dtype == torch.int64 and table.dim() == 1 and table.device.type == "cpu"
    if not fits or table.shape[0] == 0 or table.shape[0] % kind.FIELDS or not table.is_contiguous():
        reject("grids.table", table, f"a contiguous int64 tensor of shape [{kind.FIELDS}*images] on the CPU")
    return table


@dataclass(frozen=True, eq=False)
class LatentGrids:
    """Sizes in latent tokens of the latent images of a pack, in the pack's order.

    ``table`` int64 [2·images] on the CPU: h, w of each image, one after another; ``rows``: Σ h·w, all latent tokens.
    """

    FIELDS: ClassVar[int] = 2

    table: Tensor
    rows: int

    @classmethod
    def from_sizes(cls, sizes: Sequence[tuple[int, int]]) -> LatentGrids:
        """Build from a list of (h, w); ValueError if it is empty or a size is no positive integer."""
        sizes = _integers("sizes", sizes, ("h", "w"))
        return cls(_table(sizes), sum(h * w for h, w in sizes))


@dataclass(frozen=True, eq=False)
class ImageGrids:
    """Sizes in tokens of each image's student grid (latent tokens) and teacher grid (ViT patches), in the pack's order.

    ``table`` int64 [4·images] on the CPU: h, w, teacher h, teacher w of each image; ``student_rows``: Σ h·w;
    ``teacher_rows``: Σ teacher h · teacher w.
    """

    FIELDS: ClassVar[int] = 4

    table: Tensor
    student_rows: int
    teacher_rows: int

    @classmethod
    def from_sizes(cls, sizes: Sequence[tuple[int, int, int, int]]) -> ImageGrids:
        """Build from a list of (h, w, teacher_h, teacher_w); ValueError if empty or a size is no positive integer."""
        sizes = _integers("sizes", sizes, ("h", "w", "teacher_h", "teacher_w"))
        return cls(_table(sizes), sum(size[0] * size[1] for size in sizes), sum(size[2] * size[3] for size in sizes))


def rows_of(table: Tensor, fields: int) -> Iterator[tuple[int, ...]]:
    """Iterate over the images of a flat ``table`` with ``fields`` numbers each; ValueError unless all are positive."""
    values = table.tolist()
    if min(values) < 1:
        raise ValueError("grids.table holds sizes that are not positive")
    return zip(*(values[i::fields] for i in range(fields)), strict=True)
