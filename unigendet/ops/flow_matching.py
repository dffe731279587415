"""Flow matching (docs/model.md §6): noising, target and patchify in one op, the per-token squared error in another.

P maps an image [C, p·h, p·w] to tokens [h·w, p·p·C], features in (row-in-patch, column-in-patch, channel) order. With
z = P(latent), noise e already in token order, and one t per image:

    forward    noised = (1 − t) z + t e                target = e − z
    backward   dz = (1 − t) dnoised − dtarget          de = t dnoised + dtarget
               dt = Σ_image (e − z) · dnoised          dlatent = P⁻¹(dz)

and for the loss, over the K features of a token:

    forward    loss = (1/K) Σ (prediction − target)²
    backward   dprediction = (2/K) (prediction − target) dloss = −dtarget

Arithmetic is in float32 (float64 if an input is); results are rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from unigendet.ops import flow_matching_triton
from unigendet.ops._arguments import check_columns, check_floating, compute_dtype, empty_unless, reject
from unigendet.ops.backends import resolve, run
from unigendet.ops.grids import LatentGrids, check_table, rows_of

# Shapes: latents [Σ C·p·h·p·w]; noise, noised, target [N, p·p·C]; timesteps [images]; table [2·images].


def _check_sizes(rows: int, timesteps: Tensor, table: Tensor, latents: int | None = None, features: int = 0) -> None:
    """Raise ValueError unless the tensors have the sizes of the grids, which are only known inside the operator."""
    expected = sum(h * w for h, w in rows_of(table, 2))
    if rows != expected:
        raise ValueError(f"noise has {rows} rows; it must have {expected}, the latent tokens of grids")
    if 2 * timesteps.shape[0] != table.shape[0]:
        images = table.shape[0] // 2
        raise ValueError(f"timesteps has {timesteps.shape[0]} values; it must have {images}, one per image of grids")
    if latents is not None and latents != expected * features:
        raise ValueError(
            f"latents has {latents} values; it must have {expected * features}: "
            f"{features} for each of the {expected} tokens of grids"
        )


def _runs(table: Tensor) -> Iterator[tuple[slice, slice, int, int, int]]:
    """Yield (images, rows, count, h, w) for each run of neighbouring images of one size, to be treated at once."""
    image = row = 0
    for (h, w), group in groupby(rows_of(table, 2)):
        count = len(list(group))
        yield slice(image, image + count), slice(row, row + count * h * w), count, h, w
        image += count
        row += count * h * w


def _pixels(latents: Tensor, rows: slice, count: int, h: int, w: int, patch: int, channels: int) -> Tensor:
    """View images of one size in the flat ``latents`` as [count, h, w, patch, patch, C]."""
    features = patch * patch * channels
    images = latents[rows.start * features : rows.stop * features].view(count, channels, h, patch, w, patch)
    return images.permute(0, 2, 4, 3, 5, 1)


def _reference(
    latents: Tensor, noise: Tensor, timesteps: Tensor, table: Tensor, patch: int, channels: int
) -> tuple[Tensor, Tensor]:
    _check_sizes(noise.shape[0], timesteps, table, latents.shape[0], noise.shape[1])
    dtype = compute_dtype(latents, noise, timesteps)
    tokens, times, start = [], [], 0
    for (h, w), t in zip(rows_of(table, 2), timesteps.to(dtype), strict=True):
        image = latents[start : start + h * w * noise.shape[1]].to(dtype).reshape(channels, h * patch, w * patch)
        patches = image.unfold(1, patch, patch).unfold(2, patch, patch)  # [C, h, w, patch, patch]
        tokens.append(patches.permute(1, 2, 3, 4, 0).reshape(h * w, noise.shape[1]))
        times.append(t.expand(h * w))
        start += image.numel()
    z, t, e = torch.cat(tokens), torch.cat(times)[:, None], noise.to(dtype)
    return ((1 - t) * z + t * e).to(latents.dtype), (e - z).to(latents.dtype)


def _torch(
    latents: Tensor, noise: Tensor, timesteps: Tensor, table: Tensor, patch: int, channels: int
) -> tuple[Tensor, Tensor]:
    _check_sizes(noise.shape[0], timesteps, table, latents.shape[0], noise.shape[1])
    dtype = compute_dtype(latents, noise, timesteps)
    latents = latents.contiguous()
    noised, target = (torch.empty(noise.shape, dtype=latents.dtype, device=noise.device) for _ in range(2))
    for images, rows, count, h, w in _runs(table):
        shape = (count, h, w, patch, patch, channels)
        z = _pixels(latents, rows, count, h, w, patch, channels).to(dtype)
        e = noise[rows].reshape(shape).to(dtype)
        t = timesteps[images].to(dtype).view(count, 1, 1, 1, 1, 1)
        torch.sub(e, z, out=target[rows].view(shape))
        torch.add((1 - t) * z, t * e, out=noised[rows].view(shape))
    return noised, target


def _reference_backward(
    dnoised: Tensor,
    dtarget: Tensor,
    timesteps: Tensor,
    target: Tensor | None,
    table: Tensor,
    patch: int,
    channels: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    _check_sizes(dnoised.shape[0], timesteps, table)
    dtype = compute_dtype(dnoised, timesteps)
    dnoised, dtarget, times = dnoised.to(dtype), dtarget.to(dtype), timesteps.to(dtype)
    dlatents, dnoise, dtimesteps = [], [], []
    start = 0
    for (h, w), t in zip(rows_of(table, 2), times, strict=True):
        rows = slice(start, start + h * w)
        dz = (1 - t) * dnoised[rows] - dtarget[rows]
        dlatents.append(dz.view(h, w, patch, patch, channels).permute(4, 0, 2, 1, 3).flatten())
        dnoise.append(t * dnoised[rows] + dtarget[rows])
        if target is not None:
            dtimesteps.append((target[rows] * dnoised[rows]).sum())
        start = rows.stop
    results = (torch.cat(dlatents), torch.cat(dnoise), torch.stack(dtimesteps) if output_mask[2] else times)
    return tuple(
        r if m else torch.empty(0, dtype=dtype, device=r.device) for r, m in zip(results, output_mask, strict=True)
    )


def _torch_backward(
    dnoised: Tensor,
    dtarget: Tensor,
    timesteps: Tensor,
    target: Tensor | None,
    table: Tensor,
    patch: int,
    channels: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    _check_sizes(dnoised.shape[0], timesteps, table)
    dtype = compute_dtype(dnoised, timesteps)
    dlatents, dnoise, dtimesteps = _allocate_gradients(dnoised, timesteps, output_mask)
    for images, rows, count, h, w in _runs(table):
        shape = (count, h * w, dnoised.shape[1])
        dn, dt = dnoised[rows].reshape(shape).to(dtype), dtarget[rows].reshape(shape).to(dtype)
        t = timesteps[images].to(dtype).view(count, 1, 1)
        if output_mask[0]:
            pixels = _pixels(dlatents, rows, count, h, w, patch, channels)
            pixels.copy_(((1 - t) * dn - dt).view(pixels.shape))
        if output_mask[1]:
            torch.add(t * dn, dt, out=dnoise[rows].view(shape))
        if output_mask[2]:
            dtimesteps[images] = (target[rows].reshape(shape) * dn).sum((1, 2))
    return dlatents, dnoise, dtimesteps


def _triton(
    latents: Tensor, noise: Tensor, timesteps: Tensor, table: Tensor, patch: int, channels: int
) -> tuple[Tensor, Tensor]:
    _check_sizes(noise.shape[0], timesteps, table, latents.shape[0], noise.shape[1])
    outputs = tuple(torch.empty(noise.shape, dtype=latents.dtype, device=noise.device) for _ in range(2))
    flow_matching_triton.forward(latents, noise, timesteps, table, *outputs, patch, channels)
    return outputs


def _triton_backward(dnoised: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtarget, timesteps, target, table, patch, channels, output_mask = inputs
    _check_sizes(dnoised.shape[0], timesteps, table)
    gradients = _allocate_gradients(dnoised, timesteps, output_mask)
    needed = (g if m else None for g, m in zip(gradients, output_mask, strict=True))
    flow_matching_triton.backward(dnoised, dtarget, timesteps, target, table, *needed, patch, channels)
    return gradients


def _allocate_gradients(
    dnoised: Tensor, timesteps: Tensor, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    rows, features = dnoised.shape
    return (
        empty_unless(output_mask[0], (rows * features,), dnoised.dtype, dnoised.device),
        empty_unless(output_mask[1], (rows, features), dnoised.dtype, dnoised.device),
        empty_unless(output_mask[2], timesteps.shape, timesteps.dtype, timesteps.device),
    )


def _loss_reference(prediction: Tensor, target: Tensor) -> Tensor:
    dtype = compute_dtype(prediction, target)
    return (prediction.to(dtype) - target.to(dtype)).square().mean(1)


def _loss_torch(prediction: Tensor, target: Tensor) -> Tensor:
    dtype = compute_dtype(prediction, target)
    loss = torch.empty(prediction.shape[0], dtype=dtype, device=prediction.device)
    difference = prediction.to(dtype) - target
    return torch.linalg.vecdot(difference, difference, out=loss).div_(prediction.shape[1])


def _loss_backward(
    prediction: Tensor, target: Tensor, dloss: Tensor, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """The backward pass of ``reference`` and ``torch``: in plain PyTorch nothing can be done more cleverly."""
    gradient = (prediction.to(dloss.dtype) - target.to(dloss.dtype)).mul_((2 / prediction.shape[1]) * dloss[:, None])
    dprediction, dtarget = _allocate_loss_gradients(prediction, target, output_mask)
    if output_mask[0]:
        dprediction.copy_(gradient)
    if output_mask[1]:
        dtarget.copy_(gradient.neg_())
    return dprediction, dtarget


def _loss_triton(prediction: Tensor, target: Tensor) -> Tensor:
    loss = torch.empty(prediction.shape[0], dtype=torch.float32, device=prediction.device)
    flow_matching_triton.loss_forward(prediction, target, loss)
    return loss


def _loss_triton_backward(
    prediction: Tensor, target: Tensor, dloss: Tensor, output_mask: Sequence[bool]
) -> tuple[Tensor, ...]:
    gradients = _allocate_loss_gradients(prediction, target, output_mask)
    needed = (g if m else None for g, m in zip(gradients, output_mask, strict=True))
    flow_matching_triton.loss_backward(prediction, target, dloss, *needed)
    return gradients


def _allocate_loss_gradients(prediction: Tensor, target: Tensor, output_mask: Sequence[bool]) -> tuple[Tensor, ...]:
    tensors = (prediction, target)
    return tuple(empty_unless(m, t.shape, t.dtype, t.device) for m, t in zip(output_mask, tensors, strict=True))


_FORWARD = {"reference": _reference, "torch": _torch, "triton": _triton}
_BACKWARD = {"reference": _reference_backward, "torch": _torch_backward, "triton": _triton_backward}
_LOSS_FORWARD = {"reference": _loss_reference, "torch": _loss_torch, "triton": _loss_triton}
_LOSS_BACKWARD = {"reference": _loss_backward, "torch": _loss_backward, "triton": _loss_triton_backward}


@torch.library.custom_op("unigendet::flow_matching", mutates_args=())
def _flow_matching(
    latents: Tensor, noise: Tensor, timesteps: Tensor, table: Tensor, patch_size: int, channels: int, backend: str
) -> tuple[Tensor, Tensor]:
    return run(_FORWARD, backend, latents, noise, timesteps, table, patch_size, channels)


@_flow_matching.register_fake
def _(latents: Tensor, noise: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty(noise.shape, dtype=latents.dtype, device=noise.device) for _ in range(2))


@torch.library.custom_op("unigendet::flow_matching_backward", mutates_args=())
def _flow_matching_backward(
    dnoised: Tensor,
    dtarget: Tensor,
    timesteps: Tensor,
    target: Tensor | None,
    table: Tensor,
    patch_size: int,
    channels: int,
    output_mask: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = run(_BACKWARD, backend, dnoised, dtarget, timesteps, target, table, patch_size, channels, output_mask)
    dlatents, dnoise, dtimesteps = gradients
    return dlatents.to(dnoised.dtype), dnoise.to(dnoised.dtype), dtimesteps.to(timesteps.dtype)


@_flow_matching_backward.register_fake
def _(
    dnoised: Tensor,
    dtarget: Tensor,
    timesteps: Tensor,
    target: Any,
    table: Any,
    patch: int,
    channels: int,
    mask: Any,
    _: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate_gradients(dnoised, timesteps, mask)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, _, timesteps, table, ctx.patch_size, ctx.channels, ctx.backend = inputs
    ctx.save_for_backward(timesteps, output[1] if ctx.needs_input_grad[2] else None, table)


def _autograd(ctx: Any, dnoised: Tensor, dtarget: Tensor) -> tuple[Tensor | None, ...]:
    output_mask = list(ctx.needs_input_grad[:3])
    sizes = (ctx.patch_size, ctx.channels)
    gradients = _flow_matching_backward(dnoised, dtarget, *ctx.saved_tensors, *sizes, output_mask, ctx.backend)
    return *(g if m else None for g, m in zip(gradients, output_mask, strict=True)), None, None, None, None


_flow_matching.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op("unigendet::flow_matching_loss", mutates_args=())
def _flow_matching_loss(prediction: Tensor, target: Tensor, backend: str) -> Tensor:
    return run(_LOSS_FORWARD, backend, prediction, target)


@_flow_matching_loss.register_fake
def _(prediction: Tensor, target: Tensor, _: str) -> Tensor:
    return torch.empty(prediction.shape[0], dtype=compute_dtype(prediction, target), device=prediction.device)


@torch.library.custom_op("unigendet::flow_matching_loss_backward", mutates_args=())
def _flow_matching_loss_backward(
    dloss: Tensor, prediction: Tensor, target: Tensor, output_mask: Sequence[bool], backend: str
) -> tuple[Tensor, Tensor]:
    return run(_LOSS_BACKWARD, backend, prediction, target, dloss, output_mask)


@_flow_matching_loss_backward.register_fake
def _(dloss: Tensor, prediction: Tensor, target: Tensor, output_mask: Sequence[bool], _: str) -> tuple[Tensor, ...]:
    return _allocate_loss_gradients(prediction, target, output_mask)


def _loss_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    prediction, target, ctx.backend = inputs
    ctx.save_for_backward(prediction, target)


def _loss_autograd(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    output_mask = list(ctx.needs_input_grad[:2])
    gradients = _flow_matching_loss_backward(dloss, *ctx.saved_tensors, output_mask, ctx.backend)
    return *(g if m else None for g, m in zip(gradients, output_mask, strict=True)), None


_flow_matching_loss.register_autograd(_loss_autograd, setup_context=_loss_setup_context)


def flow_matching(
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    grids: LatentGrids,
    *,
    patch_size: int,
    channels: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Noise the latents of a pack and cut them into tokens: (1 − t) z + t e, and the velocity e − z (docs/model.md §6).

    Args:
        latents: flat [Σ C·p·h·p·w]: the images [C, p·h, p·w] one after another, any floating dtype.
        noise: [N, p²·C] in token order, features in (row-in-patch, column-in-patch, channel) order, in latents' dtype.
        timesteps: [images], any floating dtype: t of each image, 0 (clean) to 1 (noise).
        grids: h and w of each image in tokens; N = Σ h·w.
        patch_size: p, latent pixels along a token's side.
        channels: C.
        backend: "auto", "reference", "torch" or "triton" (at most 16384 features).

    Returns:
        (noised, target), each [N, p²·C] in latents' dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit, or ``backend`` cannot run this.
    """
    for name, value in (("patch_size", patch_size), ("channels", channels)):
        if value < 1:
            reject(name, value, "positive")
    check_floating("latents", latents, ("C*p*h*p*w of all images",))
    check_floating("noise", noise, ("N", patch_size * patch_size * channels), latents.dtype)
    check_floating("timesteps", timesteps, ("images",))
    table = check_table(grids, LatentGrids)
    chosen = resolve("flow_matching", backend, latents, noise, timesteps)
    return _flow_matching(latents, noise, timesteps, table, patch_size, channels, chosen)


def flow_matching_loss(prediction: Tensor, target: Tensor, *, backend: str = "auto") -> Tensor:
    """Return each token's mean squared error over its features (docs/model.md §6); their mean is the loss.

    Args:
        prediction: [M, K], any floating dtype.
        target: [M, K], any floating dtype.
        backend: "auto", "reference", "torch" or "triton" (at most 16384 features).

    Returns:
        [M], float32 (float64 if an input is).

    Raises:
        ValueError: a shape, dtype or device does not fit, or ``backend`` cannot run this.
    """
    check_floating("prediction", prediction, ("M", "K"))
    check_columns("prediction", prediction)
    check_floating("target", target, (prediction.shape[0], prediction.shape[1]))
    return _flow_matching_loss(prediction, target, resolve("flow_matching_loss", backend, prediction, target))
