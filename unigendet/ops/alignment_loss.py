"""The alignment loss of DIGA (docs/model.md §7): cosine distance of the student's tokens to the resized teacher.

Per image, T [h'·w', D] is the teacher's grid and S [h·w, D] the student's. T is resized to the student's grid, as
``F.interpolate(mode="bilinear", align_corners=False, antialias=False)`` does: R = A T, where A = A_h ⊗ A_w has at most
four weights per row, from the sample positions x(i) = max(0, (i + 1/2) · h'/h − 1/2). With s and r rows of S and R,
ε = 1e-8,

    n_s = max(‖s‖, ε)    n_r = max(‖r‖, ε)    c = s · r / (n_s n_r)                       (as F.cosine_similarity)
    loss = κ Σ_rows (1 − c),    κ = weight / normalizer

    ds = −κ (r / (n_s n_r) − [‖s‖ > ε] c s / n_s²)
    dr = −κ (s / (n_s n_r) − [‖r‖ > ε] c r / n_r²)        dT = Aᵀ dR

The operator computes the loss and these gradients together, so S is read once; the backward pass only multiplies them
by the incoming scalar. Arithmetic is in float32 (float64 if an input is). Where 0 < ‖s‖ < ε, PyTorch's cosine lets the
gradient through its clamp; here it is the derivative of the formula above.
"""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unigendet.ops._arguments import check_floating, compute_dtype, empty_unless, reject
from unigendet.ops.backends import resolve, run
from unigendet.ops.grids import ImageGrids, check_table, rows_of

_EPS = 1e-8

# Shapes: student [N, D], teacher [M, D]; per image s, r [h·w, D], t [th·tw, D], cos and norms [h·w, 1].


def _images(student: Tensor, teacher: Tensor, table: Tensor) -> Iterator[tuple[slice, slice, tuple[int, ...]]]:
    """Yield (student rows, teacher rows, (h, w, teacher h, teacher w)) of each image; ValueError on other sizes."""
    sizes = list(rows_of(table, 4))
    for name, tensor, i in (("student", student, 0), ("teacher", teacher, 2)):
        rows = sum(size[i] * size[i + 1] for size in sizes)
        if tensor.shape[0] != rows:
            raise ValueError(f"{name} has {tensor.shape[0]} rows; it must have {rows}, the {name} tokens of grids")
    start = teacher_start = 0
    for h, w, th, tw in sizes:
        yield slice(start, start + h * w), slice(teacher_start, teacher_start + th * tw), (h, w, th, tw)
        start += h * w
        teacher_start += th * tw


def _interpolation(size: int, source: int, like: Tensor) -> Tensor:
    """Return A_h [size, source], the bilinear weights along one side, in the dtype and on the device of ``like``."""
    index = torch.arange(size, dtype=like.dtype, device=like.device)
    position = ((index + 0.5) * (source / size) - 0.5).clamp_min(0)
    lower = position.floor().clamp_max(source - 1)
    fraction = (position - lower)[:, None]
    identity = torch.eye(source, dtype=like.dtype, device=like.device)
    lower = lower.long()
    return identity[lower] * (1 - fraction) + identity[(lower + 1).clamp_max(source - 1)] * fraction


def _resize(rows: Tensor, size: tuple[int, ...]) -> Tensor:
    """A t: the teacher's rows [th·tw, D] at the student's [h·w, D]; the same tensor if the grids are equal."""
    h, w, th, tw = size
    if (h, w) == (th, tw):
        return rows
    channels_last = rows.view(1, th, tw, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(channels_last, (h, w), mode="bilinear", align_corners=False, antialias=False)
    return resized.permute(0, 2, 3, 1).reshape(h * w, -1)


def _resize_transposed(rows: Tensor, size: tuple[int, ...]) -> Tensor:
    """Aᵀ dr: gradients [h·w, D] back on the teacher's grid [th·tw, D], by matrix products, which are deterministic."""
    h, w, th, tw = size
    if (h, w) == (th, tw):
        return rows
    grid = rows.view(h, w, -1)
    columns = _interpolation(w, tw, rows).T @ grid  # [h, tw, D]
    return (_interpolation(h, th, rows).T @ columns.flatten(1)).view(th * tw, -1)


def _scale(rows: int, normalizer: Tensor | None, weight: float, dtype: torch.dtype) -> float | Tensor:
    return weight / rows if normalizer is None else weight / normalizer.to(dtype)


def _reference(
    student: Tensor,
    teacher: Tensor,
    table: Tensor,
    normalizer: Tensor | None,
    weight: float,
    needs_student: bool,
    needs_teacher: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(student, teacher)
    kappa = _scale(student.shape[0], normalizer, weight, dtype)
    loss, dstudent, dteacher = torch.zeros((), dtype=dtype, device=student.device), [], []
    for rows, teacher_rows, (h, w, th, tw) in _images(student, teacher, table):
        s, t = student[rows].to(dtype), teacher[teacher_rows].to(dtype)
        resize = torch.kron(_interpolation(h, th, t), _interpolation(w, tw, t))  # A [h·w, th·tw]
        r = resize @ t
        s_length, r_length = s.norm(dim=1, keepdim=True), r.norm(dim=1, keepdim=True)
        s_norm, r_norm = s_length.clamp_min(_EPS), r_length.clamp_min(_EPS)
        cos = ((s / s_norm) * (r / r_norm)).sum(1, keepdim=True)
        loss = loss + kappa * (1 - cos).sum()
        dstudent.append(-kappa * (r / r_norm - (s_length > _EPS) * cos * s / s_norm) / s_norm)
        dteacher.append(resize.T @ (-kappa * (s / s_norm - (r_length > _EPS) * cos * r / r_norm) / r_norm))
    gradients = ((needs_student, torch.cat(dstudent)), (needs_teacher, torch.cat(dteacher)))
    return loss, *(g if needed else torch.empty(0, dtype=dtype, device=g.device) for needed, g in gradients)


def _torch(
    student: Tensor,
    teacher: Tensor,
    table: Tensor,
    normalizer: Tensor | None,
    weight: float,
    needs_student: bool,
    needs_teacher: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _, dstudent, dteacher = outputs = _allocate(student, teacher, needs_student, needs_teacher)
    dtype = compute_dtype(student, teacher)
    kappa = _scale(student.shape[0], normalizer, weight, dtype)
    total = torch.zeros((), dtype=dtype, device=student.device)
    for rows, teacher_rows, size in _images(student, teacher, table):
        s = student[rows].to(dtype)
        r = _resize(teacher[teacher_rows].to(dtype).contiguous(), size)
        s_norm, r_norm = (torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (s, r))
        s_free, r_free = s_norm > _EPS, r_norm > _EPS  # not clamped
        s_norm, r_norm = s_norm.clamp_min_(_EPS), r_norm.clamp_min_(_EPS)
        cos = torch.linalg.vecdot(s, r)[:, None] / (s_norm * r_norm)
        total += (1 - cos).sum()
        cross = -kappa / (s_norm * r_norm)
        if needs_student:
            gradient = (cross * r).addcmul_(kappa * cos * s_free / s_norm.square(), s)
            dstudent[rows] = gradient
        if needs_teacher:
            gradient = (cross * s).addcmul_(kappa * cos * r_free / r_norm.square(), r)
            dteacher[teacher_rows] = _resize_transposed(gradient, size)
    torch.mul(total, kappa, out=outputs[0])
    return outputs


def _allocate(
    student: Tensor, teacher: Tensor, needs_student: bool, needs_teacher: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty((), dtype=compute_dtype(student, teacher), device=student.device),
        empty_unless(needs_student, student.shape, student.dtype, student.device),
        empty_unless(needs_teacher, teacher.shape, teacher.dtype, teacher.device),
    )


def _scaled(gradient: Tensor, dloss: Tensor) -> Tensor:
    """Both backends' backward pass. A 0-d ``dloss`` would be rounded to gradient's dtype before the product."""
    scaled = torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device)
    return torch.mul(gradient, dloss.view(1, 1), out=scaled)


_FORWARD = {"reference": _reference, "torch": _torch}
_BACKWARD = {"reference": _scaled, "torch": _scaled}


@torch.library.custom_op("unigendet::alignment_loss", mutates_args=())
def _alignment_loss(
    student: Tensor,
    teacher: Tensor,
    table: Tensor,
    normalizer: Tensor | None,
    weight: float,
    needs_student: bool,
    needs_teacher: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    results = run(_FORWARD, backend, student, teacher, table, normalizer, weight, needs_student, needs_teacher)
    loss, dstudent, dteacher = results
    return loss, dstudent.to(student.dtype), dteacher.to(teacher.dtype)


@_alignment_loss.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    table: Tensor,
    normalizer: Any,
    weight: Any,
    needs_student: bool,
    needs_teacher: bool,
    _: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate(student, teacher, needs_student, needs_teacher)


@torch.library.custom_op("unigendet::alignment_loss_backward", mutates_args=())
def _alignment_loss_backward(gradient: Tensor, dloss: Tensor, backend: str) -> Tensor:
    return run(_BACKWARD, backend, gradient, dloss)


@_alignment_loss_backward.register_fake
def _(gradient: Tensor, *_: Any) -> Tensor:
    return torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, _, _, _, *ctx.needs, ctx.backend = inputs
    _, dstudent, dteacher = output
    ctx.set_materialize_grads(False)  # the other two outputs' would be tensors of zeros
    ctx.mark_non_differentiable(dstudent, dteacher)
    ctx.save_for_backward(dstudent, dteacher)


def _autograd(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    gradients = [
        _alignment_loss_backward(gradient, dloss, ctx.backend) if needed and dloss is not None else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
    ]
    return *gradients, None, None, None, None, None, None


_alignment_loss.register_autograd(_autograd, setup_context=_setup_context)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def alignment_loss(
    student: Tensor,
    teacher: Tensor,
    grids: ImageGrids,
    *,
    weight: float = 1.0,
    normalizer: float | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return weight · Σ (1 − cos(resized teacher, student)) / normalizer (docs/model.md §7).

    Args:
        student: [Σ h·w, D], the images' grids row by row, one after another; any floating dtype, any strides.
        teacher: [Σ h'·w', D], likewise; its dtype may be another. It gets a gradient only if it requires one.
        grids: the sizes of both grids of each image.
        weight: factor of the loss.
        normalizer: what the sum is divided by: None for the number of student tokens, a positive number, or a 0-d
            tensor on student's device (all ranks' number of tokens; the host does not read it, it gets no gradient).
            In a compiled graph a number is a constant, a tensor is not.
        backend: "auto", "reference" or "torch".

    Returns:
        0-d tensor, float32 (float64 if an input is).

    Raises:
        ValueError: a shape, dtype, device or type does not fit, or ``backend`` cannot run this.
    """
    check_floating("student", student, ("N", "D"))
    check_floating("teacher", teacher, ("M", student.shape[1]))
    table = check_table(grids, ImageGrids)
    if not _is_number(weight):
        reject("weight", repr(weight), "a number")
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0 or normalizer.requires_grad:
            reject("normalizer", normalizer, "a number or a 0-d tensor that requires no gradient")
    elif normalizer is not None:
        if not _is_number(normalizer) or not normalizer > 0:
            reject("normalizer", repr(normalizer), "a positive number, a 0-d tensor or None")
        normalizer = torch.full((), normalizer, dtype=compute_dtype(student, teacher), device=student.device)
    chosen = resolve("alignment_loss", backend, student, teacher, normalizer)
    wants = torch.is_grad_enabled()
    needs = (wants and student.requires_grad, wants and teacher.requires_grad)
    return _alignment_loss(student, teacher, table, normalizer, float(weight), *needs, chosen)[0]
