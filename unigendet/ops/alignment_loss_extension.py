"""The ``cpp`` and ``cuda`` backends of the alignment loss: what ``unigendet._C`` needs around its kernels.

Both are one source of arithmetic, ``csrc/alignment_loss.cuh``. ``cpp`` runs on the CPU with as many threads as PyTorch;
its results do not depend on their number. ``cuda`` enqueues on the device's current stream.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from unigendet.ops._launching import unit_stride
from unigendet.ops.alignment_loss import allocate, check_rows, keeps_unit_gradient

_KEPT_PLANS = 16
_plans: OrderedDict[tuple, tuple[Tensor, Tensor]] = OrderedDict()


def _arguments(
    student: Tensor,
    teacher: Tensor,
    table: Tensor,
    normalizer: Tensor | None,
    token_weights: Tensor | None,
    weight: float,
    needs: tuple[bool, bool],
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """The operator's outputs, and the arguments that both builds take."""
    check_rows(student, teacher, table)
    outputs = loss, means, dstudent, dteacher = allocate(student, teacher, table, *needs)
    rows, device = student.shape[0], student.device
    arguments = {
        "student": unit_stride(student),
        "teacher": unit_stride(teacher),
        "table": table,
        "normalizer": None if normalizer is None else normalizer.float(),
        "token_weights": None if token_weights is None else token_weights.float().contiguous(),
        "weight": weight,
        "loss": loss,
        "means": means,
        "dstudent": dstudent if needs[0] else None,
        "dteacher": dteacher if needs[1] else None,
        "distances": torch.empty(rows, device=device),
        "coefficients": torch.empty(2 * rows, device=device) if needs[1] else None,
        "unit_gradients": (keeps_unit_gradient(student.dtype), keeps_unit_gradient(teacher.dtype)),
    }
    return outputs, arguments


def forward_cpp(
    student: Tensor,
    teacher: Tensor,
    table: Tensor,
    normalizer: Tensor | None,
    token_weights: Tensor | None,
    weight: float,
    needs_student: bool,
    needs_teacher: bool,
) -> tuple[Tensor, ...]:
    """The operator on the CPU."""
    from unigendet import _C

    needs = (needs_student, needs_teacher)
    outputs, arguments = _arguments(student, teacher, table, normalizer, token_weights, weight, needs)
    _C.alignment_loss_cpu(**arguments, num_threads=torch.get_num_threads())
    return outputs


def scale_cpp(gradient: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = factor · gradient; returns at once for a factor of 1 in place."""
    from unigendet import _C

    _C.scale_cpu(gradient=gradient, factor=factor.float(), out=out, num_threads=torch.get_num_threads())


def forward_cuda(
    student: Tensor,
    teacher: Tensor,
    table: Tensor,
    normalizer: Tensor | None,
    token_weights: Tensor | None,
    weight: float,
    needs_student: bool,
    needs_teacher: bool,
) -> tuple[Tensor, ...]:
    """The operator on a CUDA device."""
    from unigendet import _C

    needs = (needs_student, needs_teacher)
    outputs, arguments = _arguments(student, teacher, table, normalizer, token_weights, weight, needs)
    with torch.cuda.device(student.device):
        images, tiles = _plan(student, teacher, table)
        sums = torch.empty(table.shape[0] // 4 + 1, dtype=torch.float64, device=student.device)
        stream = torch.cuda.current_stream().cuda_stream
        _C.alignment_loss_cuda(**arguments, images=images, tiles=tiles, image_sums=sums, stream=stream)
    return outputs


def scale_cuda(gradient: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = factor · gradient; the kernel reads the factor and returns at once for 1 in place."""
    from unigendet import _C

    with torch.cuda.device(gradient.device):
        stream = torch.cuda.current_stream().cuda_stream
        _C.scale_cuda(gradient=gradient, factor=factor.float(), out=out, stream=stream)


def _plan(student: Tensor, teacher: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Images and tiles of ``table`` as int32 tensors on student's device, kept for the last packs and streams seen."""
    from unigendet import _C

    key = (tuple(table.tolist()), student.device, torch.cuda.current_stream(student.device).cuda_stream)
    plan = _plans.pop(key, None)
    if plan is None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "backend='cuda' cannot be captured in a CUDA graph: the graph would keep the addresses of a cached plan"
            )
        host = (torch.frombuffer(b, dtype=torch.int32) for b in _C.plan(table, student.shape[0], teacher.shape[0]))
        images, tiles = (array.pin_memory().to(student.device, non_blocking=True) for array in host)
        plan = images, tiles
    _plans[key] = plan
    while len(_plans) > _KEPT_PLANS:
        _plans.popitem(last=False)
    return plan
