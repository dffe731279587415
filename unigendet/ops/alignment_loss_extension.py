"""The ``cpp`` and ``cuda`` backends of the alignment loss: what ``unigendet._C`` needs around its kernels.

Both are one source of arithmetic, ``csrc/alignment_loss.cuh``. ``cpp`` runs on the CPU with as many threads as PyTorch;
its results do not depend on their number. ``cuda`` enqueues on the device's current stream.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unigendet.ops._extension import plain, threads
from unigendet.ops._launching import table_stream


def _arguments(
    student: Tensor,
    teacher: Tensor,
    table: Tensor,
    normalizer: Tensor | None,
    token_weights: Tensor | None,
    weight: float,
    needs: Sequence[bool],
    units: tuple[bool, bool],
    outputs: Sequence[Tensor],
) -> dict[str, Any]:
    """The arguments that both builds take."""
    loss, means, dstudent, dteacher = outputs
    rows, device = student.shape[0], student.device
    return {
        "student": plain(student),
        "teacher": plain(teacher),
        "table": table,
        "normalizer": None if normalizer is None else plain(normalizer.float().view(1)).view(()),
        "token_weights": None if token_weights is None else plain(token_weights.float()),
        "weight": weight,
        "loss": loss,
        "means": means,
        "dstudent": dstudent if needs[0] else None,
        "dteacher": dteacher if needs[1] else None,
        "distances": torch.empty(rows, dtype=torch.float32, device=device),
        "coefficients": torch.empty(2 * rows, dtype=torch.float32, device=device) if needs[1] else None,
        "unit_gradients": units,
    }


def forward_cpp(student: Tensor, *inputs: Any) -> None:
    """Fill the operator's outputs, the last of ``inputs``, on the CPU; see ``alignment_loss_triton.forward``."""
    from unigendet import _C

    _C.alignment_loss_cpu(**_arguments(student, *inputs), num_threads=threads())


def scale_cpp(gradient: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = factor · gradient; returns at once for a factor of 1 in place."""
    from unigendet import _C

    _C.scale_cpu(gradient=gradient, factor=factor.float(), out=out, num_threads=threads())


def forward_cuda(student: Tensor, *inputs: Any) -> None:
    """Fill the operator's outputs, the last of ``inputs``, on a CUDA device; see ``alignment_loss_triton.forward``."""
    from unigendet import _C

    arguments = _arguments(student, *inputs)
    table, device = arguments["table"], student.device
    with torch.cuda.device(device):
        stream = table_stream("alignment_loss", "cuda", device)
        images, tiles = _plan(table.numpy().tobytes(), student.shape[0], arguments["teacher"].shape[0], device, stream)
        sums = torch.empty(table.shape[0] // 4 + 1, dtype=torch.float64, device=device)
        _C.alignment_loss_cuda(**arguments, images=images, tiles=tiles, image_sums=sums, stream=stream)


def scale_cuda(gradient: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = factor · gradient; the kernel reads the factor and returns at once for 1 in place."""
    from unigendet import _C

    with torch.cuda.device(gradient.device):
        stream = torch.cuda.current_stream().cuda_stream
        _C.scale_cuda(gradient=gradient, factor=factor.float(), out=out, stream=stream)


@functools.lru_cache(maxsize=64)
def _plan(table: bytes, rows: int, teacher_rows: int, device: torch.device, _: int) -> tuple[Tensor, Tensor]:
    """Images and tiles of ``table`` as int32 tensors on ``device``, kept for the last packs and streams seen."""
    from unigendet import _C

    sizes = torch.frombuffer(bytearray(table), dtype=torch.int64)
    host = (torch.frombuffer(part, dtype=torch.int32) for part in _C.plan(sizes, rows, teacher_rows))
    images, tiles = (part.pin_memory().to(device, non_blocking=True) for part in host)
    return images, tiles
