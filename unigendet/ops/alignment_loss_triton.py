"""The ``triton`` backend of ``alignment_loss``: memory, tables of tiles and launches for the kernels.

Forward is one kernel over the student's rows and two small ones that sum up distances; where the teacher learns, a
fourth gathers its gradient. Everything is the same in every run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unigendet.ops._launching import run_launches, table_on_device, table_stream, unit_stride


def forward(
    student: Tensor,
    teacher: Tensor,
    table: Tensor,
    normalizer: Tensor | None,
    token_weights: Tensor | None,
    weight: float,
    needs: Sequence[bool],
    units: tuple[bool, bool],
    outputs: Sequence[Tensor],
) -> None:
    """Fill ``outputs``, the operator's: loss, image means, dstudent, dteacher; the last two only if in ``needs``.

    ``units``: whether the gradient of student and teacher is kept without κ.
    """
    from unigendet.kernels import alignment_loss as kernels
    from unigendet.kernels.alignment_loss_teacher import teacher_gradient

    rows, columns = student.shape
    loss, means, dstudent, dteacher = outputs
    student, teacher = unit_stride(student), unit_stride(teacher)
    config = kernels.configure(columns)
    tiles, images, teacher_tiles = _tables(table, config.rows, config.teacher_rows, student.device)
    distances, sums = (torch.empty(n, dtype=torch.float32, device=student.device) for n in (rows, len(images)))
    coefficients = torch.empty((rows, 2), dtype=torch.float32, device=student.device) if needs[1] else None
    scale = weight / rows if normalizer is None else weight
    normalizer = None if normalizer is None else normalizer.to(torch.float32)
    token_weights = None if token_weights is None else token_weights.to(torch.float32).contiguous()
    launches = kernels.forward(
        config,
        student,
        teacher,
        tiles,
        images,
        normalizer,
        token_weights,
        scale,
        units,
        (loss, means, dstudent if needs[0] else None),
        (distances, sums, coefficients),
    )
    run_launches(launches, student)
    if coefficients is not None:
        run_launches(teacher_gradient(config, student, teacher, teacher_tiles, coefficients, dteacher), student)


def scale_into(gradient: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = factor · gradient, rounded once; nothing is written for a factor of 1 in place. Rows are contiguous."""
    from unigendet.kernels.alignment_loss import scale

    run_launches(scale(gradient, factor, out), gradient)


def _tables(table: Tensor, rows: int, teacher_rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tables of student tiles, of images, and of teacher tiles (see the kernels), kept for the last packs seen."""
    return _cached(
        table.numpy().tobytes(), rows, teacher_rows, device, table_stream("alignment_loss", "triton", device)
    )


@functools.lru_cache(maxsize=64)
def _cached(table: bytes, rows: int, teacher_rows: int, device: torch.device, _: int) -> tuple[Tensor, Tensor, Tensor]:
    sizes = np.frombuffer(table, np.int64).reshape(-1, 4)
    lengths, teacher_lengths = sizes[:, 0] * sizes[:, 1], sizes[:, 2] * sizes[:, 3]
    begin, teacher_begin = (np.cumsum(n) - n for n in (lengths, teacher_lengths))
    image = np.column_stack((begin, teacher_begin, sizes))
    tables = [
        _tiles(begin, lengths, rows, image),
        _tiles(begin, lengths, lengths.max(), image),
        _tiles(teacher_begin, teacher_lengths, teacher_rows, image),
    ]
    return torch.split(table_on_device(np.concatenate(tables), device), [len(t) for t in tables])


def _tiles(begin: np.ndarray, lengths: np.ndarray, rows: int, image: np.ndarray) -> np.ndarray:
    """Every image's rows cut into tiles of ``rows``: first and end of each, then what ``image`` says of its image."""
    counts = -(-lengths // rows)
    of = np.repeat(np.arange(len(counts)), counts)
    first = begin[of] + (np.arange(len(of)) - (np.cumsum(counts) - counts)[of]) * rows
    return np.column_stack((first, np.minimum(first + rows, (begin + lengths)[of]), image[of]))
