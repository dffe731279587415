"""The alignment loss of DIGA (docs/model.md §7): cosine distance of the student's tokens to the resized teacher.

Per image, T [h'·w', D] is the teacher's grid and S [h·w, D] the student's. T is resized to the student's grid, as
``F.interpolate(mode="bilinear", align_corners=False, antialias=False)`` does: R = A T, where A = A_h ⊗ A_w has at most
four weights per row, from the sample positions x(i) = max(0, (i + 1/2) · h'/h − 1/2). With s and r rows of S and R,
ε = 1e-8,

    n_s = max(‖s‖, ε)    n_r = max(‖r‖, ε)    c = s · r / (n_s n_r)                       (as F.cosine_similarity)
    loss = κ Σ_rows u (1 − c),    κ = weight / normalizer,    u the token's weight, or 1

    ds = −κ u (r / (n_s n_r) − [‖s‖ > ε] c s / n_s²)
    dr = −κ u (s / (n_s n_r) − [‖r‖ > ε] c r / n_r²)        dT = Aᵀ dR

The operator computes the loss and these gradients together, so S is read once. The backward pass multiplies them by the
incoming scalar, in place where nobody can see it; where the scalar is 1 there is nothing to do. float16 gradients are
kept without κ, which may be 1e-5, until the scalar brings the loss scale. Arithmetic is in float32 (float64 if an input
is). Where 0 < ‖s‖ < ε, PyTorch's cosine lets the gradient through its clamp; here it is the derivative of the formula
above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unigendet.ops import alignment_loss_extension, alignment_loss_triton
from unigendet.ops._arguments import check_columns, check_floating, compute_dtype, empty_unless, reject
from unigendet.ops.backends import resolve, run
from unigendet.ops.grids import ImageGrids, check_table, rows_of

_EPS = 1e-8

# Shapes: student [N, D], teacher [M, D]; per image s, r [h·w, D], t [th·tw, D], cos and norms [h·w, 1].


def check_rows(student: Tensor, teacher: Tensor, table: Tensor) -> list[tuple[int, ...]]:
    """Return (h, w, teacher h, teacher w) of each image; ValueError unless the tensors have as many rows."""
    sizes = list(rows_of(table, 4))
    for name, tensor, i in (("student", student, 0), ("teacher", teacher, 2)):
        rows = sum(size[i] * size[i + 1] for size in sizes)
        if tensor.shape[0] != rows:
            raise ValueError(f"{name} has {tensor.shape[0]} rows; it must have {rows}, the {name} tokens of grids")
    return sizes


def images(student: Tensor, teacher: Tensor, table: Tensor) -> Iterator[tuple[slice, slice, tuple[int, ...]]]:
    """Yield (student rows, teacher rows, (h, w, teacher h, teacher w)) of each image."""
    start = teacher_start = 0
    for h, w, th, tw in check_rows(student, teacher, table):
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
    token_weights: Tensor | None,
    weight: float,
    needs_student: bool,
    needs_teacher: bool,
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(student, teacher)
    kappa = _scale(student.shape[0], normalizer, weight, dtype)
    distances, counts, dstudent, dteacher = [], [], [], []
    for rows, teacher_rows, (h, w, th, tw) in images(student, teacher, table):
        s, t = student[rows].to(dtype), teacher[teacher_rows].to(dtype)
        u = torch.ones(h * w, 1, dtype=dtype, device=s.device) if token_weights is None else token_weights[rows, None]
        u = u.to(dtype)
        resize = torch.kron(_interpolation(h, th, t), _interpolation(w, tw, t))  # A [h·w, th·tw]
        r = resize @ t
        s_length, r_length = s.norm(dim=1, keepdim=True), r.norm(dim=1, keepdim=True)
        s_norm, r_norm = s_length.clamp_min(_EPS), r_length.clamp_min(_EPS)
        cos = ((s / s_norm) * (r / r_norm)).sum(1, keepdim=True)
        distances.append((u * (1 - cos)).sum())
        counts.append(u.sum())
        dstudent.append(-u * (r / r_norm - (s_length > _EPS) * cos * s / s_norm) / s_norm)
        dteacher.append(resize.T @ (-u * (s / s_norm - (r_length > _EPS) * cos * r / r_norm) / r_norm))
    gradients = []
    for needed, like, gradient in ((needs_student, student, dstudent), (needs_teacher, teacher, dteacher)):
        factor = 1 if keeps_unit_gradient(like.dtype) else kappa
        gradients.append(factor * torch.cat(gradient) if needed else torch.empty(0, dtype=dtype, device=like.device))
    distances = torch.stack(distances)
    return kappa * distances.sum(), distances / torch.stack(counts), *gradients


def _torch(
    student: Tensor,
    teacher: Tensor,
    table: Tensor,
    normalizer: Tensor | None,
    token_weights: Tensor | None,
    weight: float,
    needs_student: bool,
    needs_teacher: bool,
) -> tuple[Tensor, ...]:
    loss, means, dstudent, dteacher = outputs = allocate(student, teacher, table, needs_student, needs_teacher)
    dtype = compute_dtype(student, teacher)
    kappa = _scale(student.shape[0], normalizer, weight, dtype)
    total = torch.zeros((), dtype=dtype, device=student.device)
    for i, (rows, teacher_rows, size) in enumerate(images(student, teacher, table)):
        s = student[rows].to(dtype)
        r = _resize(teacher[teacher_rows].to(dtype).contiguous(), size)
        u = 1.0 if token_weights is None else token_weights[rows, None].to(dtype)
        s_norm, r_norm = (torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (s, r))
        s_free, r_free = s_norm > _EPS, r_norm > _EPS  # not clamped
        s_norm, r_norm = s_norm.clamp_min_(_EPS), r_norm.clamp_min_(_EPS)
        cos = torch.linalg.vecdot(s, r)[:, None] / (s_norm * r_norm)
        distance = (u * (1 - cos)).sum()
        total += distance
        torch.div(distance, len(s) if token_weights is None else u.sum(), out=means[i])
        cross = -u / (s_norm * r_norm)
        if needs_student:
            factor = 1 if keeps_unit_gradient(student.dtype) else kappa
            gradient = (factor * cross * r).addcmul_(factor * u * cos * s_free / s_norm.square(), s)
            dstudent[rows] = gradient
        if needs_teacher:
            factor = 1 if keeps_unit_gradient(teacher.dtype) else kappa
            gradient = (factor * cross * s).addcmul_(factor * u * cos * r_free / r_norm.square(), r)
            dteacher[teacher_rows] = _resize_transposed(gradient, size)
    torch.mul(total, kappa, out=loss)
    return outputs


def _filled_by(forward: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    """An implementation by kernels that fill what is allocated here."""

    def call(
        student: Tensor,
        teacher: Tensor,
        table: Tensor,
        normalizer: Tensor | None,
        token_weights: Tensor | None,
        weight: float,
        *needs: bool,
    ) -> tuple[Tensor, ...]:
        check_rows(student, teacher, table)
        outputs = allocate(student, teacher, table, *needs)
        units = keeps_unit_gradient(student.dtype), keeps_unit_gradient(teacher.dtype)
        forward(student, teacher, table, normalizer, token_weights, weight, needs, units, outputs)
        return outputs

    return call


def keeps_unit_gradient(dtype: torch.dtype) -> bool:
    """Whether a gradient of ``dtype`` is kept without κ between the passes: with it, float16 would round it to zero."""
    return dtype == torch.float16


def allocate(
    student: Tensor, teacher: Tensor, table: Tensor, needs_student: bool, needs_teacher: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised outputs of the operator: loss, image means, dstudent, dteacher."""
    dtype, device = compute_dtype(student, teacher), student.device
    return (
        torch.empty((), dtype=dtype, device=device),
        torch.empty(table.shape[0] // 4, dtype=dtype, device=device),
        empty_unless(needs_student, student.shape, student.dtype, device),
        empty_unless(needs_teacher, teacher.shape, teacher.dtype, device),
    )


def _scale_into(gradient: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = factor · gradient, rounded once; nothing to do for a factor of 1 in place, where reading it is free."""
    if out is gradient and not factor.is_cuda and factor.item() == 1:
        return
    torch.mul(gradient, factor.view(1, 1), out=out)  # a 0-d factor would be rounded to gradient's dtype first


_FORWARD = {
    "reference": _reference,
    "torch": _torch,
    "triton": _filled_by(alignment_loss_triton.forward),
    "cpp": _filled_by(alignment_loss_extension.forward_cpp),
    "cuda": _filled_by(alignment_loss_extension.forward_cuda),
}
_SCALE = {
    "reference": _scale_into,
    "torch": _scale_into,
    "triton": alignment_loss_triton.scale_into,
    "cpp": alignment_loss_extension.scale_cpp,
    "cuda": alignment_loss_extension.scale_cuda,
}


@torch.library.custom_op("unigendet::alignment_loss", mutates_args=())
def _alignment_loss(
    student: Tensor,
    teacher: Tensor,
    table: Tensor,
    normalizer: Tensor | None,
    token_weights: Tensor | None,
    weight: float,
    needs_student: bool,
    needs_teacher: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = (normalizer, token_weights, weight, needs_student, needs_teacher)
    loss, means, dstudent, dteacher = run(_FORWARD, backend, student, teacher, table, *options)
    return loss, means, dstudent.to(student.dtype), dteacher.to(teacher.dtype)


@_alignment_loss.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    table: Tensor,
    normalizer: Any,
    token_weights: Any,
    weight: Any,
    needs_student: bool,
    needs_teacher: bool,
    _: str,
) -> tuple[Tensor, ...]:
    return allocate(student, teacher, table, needs_student, needs_teacher)


@torch.library.custom_op("unigendet::alignment_loss_backward", mutates_args=())
def _alignment_loss_backward(gradient: Tensor, factor: Tensor, backend: str) -> Tensor:
    scaled = torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device)
    run(_SCALE, backend, gradient, factor, scaled)
    return scaled


@_alignment_loss_backward.register_fake
def _(gradient: Tensor, *_: Any) -> Tensor:
    return torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device)


@torch.library.custom_op("unigendet::alignment_loss_backward_", mutates_args=("gradient",))
def _alignment_loss_backward_(gradient: Tensor, factor: Tensor, backend: str) -> None:
    run(_SCALE, backend, gradient, factor, gradient)


@_alignment_loss_backward_.register_fake
def _(*_: Any) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    student, _, _, normalizer, _, ctx.weight, *ctx.needs, ctx.backend = inputs
    ctx.rows = student.shape[0]
    ctx.set_materialize_grads(False)  # the other outputs' would be tensors of zeros
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(normalizer, *output[2:])


def _autograd(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    normalizer, *gradients = ctx.saved_tensors
    results: list[Tensor | None] = [None, None]
    for i, gradient in enumerate(gradients):
        if ctx.needs[i] and dloss is not None:
            factor = dloss
            if keeps_unit_gradient(gradient.dtype):
                factor = dloss * _scale(ctx.rows, normalizer, ctx.weight, dloss.dtype)
            if _is_last_use(gradient):
                _alignment_loss_backward_(gradient, factor, ctx.backend)
                results[i] = gradient
            else:
                results[i] = _alignment_loss_backward(gradient, factor, ctx.backend)
    return *results, None, None, None, None, None, None, None


def _is_last_use(saved: Tensor) -> bool:
    """Whether nobody will read ``saved`` after this backward pass, so that it may become the result.

    A graph that is kept may be walked again, and graphs that are being traced take no in-place work on saved tensors.
    """
    return type(saved) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()


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
    token_weights: Tensor | None = None,
    return_image_means: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return weight · Σ u (1 − cos(resized teacher, student)) / normalizer (docs/model.md §7).

    Args:
        student: [Σ h·w, D], the images' grids row by row, one after another; any floating dtype, any strides.
        teacher: [Σ h'·w', D], likewise; its dtype may be another. It gets a gradient only if it requires one.
        grids: the sizes of both grids of each image.
        weight: factor of the loss.
        normalizer: what the sum is divided by: None for the number of student tokens (with ``token_weights``: their
            sum, NaN if that is zero), a positive number, or a 0-d tensor on student's device (all ranks' number of
            tokens; the host does not read it, it gets no gradient). In a compiled graph a number is a constant, a
            tensor is not.
        token_weights: None for ones, or u [Σ h·w], any floating dtype; they get no gradient.
        return_image_means: whether to return each image's own mean distance, too.
        backend: "auto", "reference", "torch", "triton" (at most 16384 columns), "cpp" (on CPUs) or "cuda"; the last two
            where unigendet._C was built with them.

    Returns:
        0-d tensor, float32 (float64 if an input is). With ``return_image_means`` (loss, means): means [images] of
        loss's dtype, Σ u (1 − cos) / Σ u over the image's tokens, without ``weight`` and without a gradient.

    Raises:
        ValueError: a shape, dtype, device or type does not fit, or ``backend`` cannot run this.
    """
    check_floating("student", student, ("N", "D"))
    check_columns("student", student)
    check_floating("teacher", teacher, ("M", student.shape[1]))
    table = check_table(grids, ImageGrids)
    if not _is_number(weight):
        reject("weight", repr(weight), "a number")
    if token_weights is not None:
        check_floating("token_weights", token_weights, (student.shape[0],))
        if token_weights.requires_grad:
            reject("token_weights", "a tensor that requires a gradient", "one that does not: it gets none")
    dtype = compute_dtype(student, teacher)
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0 or normalizer.requires_grad:
            reject("normalizer", normalizer, "a number or a 0-d tensor that requires no gradient")
    elif normalizer is not None:
        if not _is_number(normalizer) or not normalizer > 0:
            reject("normalizer", repr(normalizer), "a positive number, a 0-d tensor or None")
        normalizer = torch.full((), normalizer, dtype=dtype, device=student.device)
    elif token_weights is not None:
        normalizer = token_weights.sum(dtype=dtype)
    chosen = resolve("alignment_loss", backend, student, teacher, normalizer, token_weights)
    wants = torch.is_grad_enabled()
    needs = (wants and student.requires_grad, wants and teacher.requires_grad)
    loss, means, *_ = _alignment_loss(student, teacher, table, normalizer, token_weights, float(weight), *needs, chosen)
    return (loss, means) if return_image_means else loss
