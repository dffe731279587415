"""Noising, target and patchify of the latents of a pack in one pass, and its backward pass.

An image is [C, p·h, p·w] (planar), its tokens are [h·w, p·p·C], features in (row-in-patch, column-in-patch, channel)
order. A program does N neighbouring tokens of one image: on the planar side it goes along the image's rows, where
patches of neighbouring tokens lie side by side, and it turns the tile round in between. p and C are padded to powers
of two, P and Q, so a tile is [Q·P, N·P] on one side and [N, P·P·Q] on the other. Widths of images vary, so a load or
store on the planar side is as wide as one patch. Arithmetic is in float32, rounded once.

The table of tiles, int32 [tiles, 8], holds for each tile: its image, the image's first token in the pack, its h·w, its
w, the tile's first token in the image, and three zeros.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .launch import Launch
from .primitives import rounded


@triton.jit
def _planar(
    tiles_ptr,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    PADDED_PATCH: tl.constexpr,
):
    """Offsets in the flat latents, int64 [Q·P, N·P], of a program's tile, and which of them exist."""
    tile = tiles_ptr + tl.program_id(0) * 8
    first_token, tokens, width, first = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    lines = tl.arange(0, PADDED_CHANNELS * PADDED_PATCH)[:, None]  # channel, row in the patch
    channel = lines // PADDED_PATCH
    row = lines % PADDED_PATCH
    columns = tl.arange(0, ROWS * PADDED_PATCH)[None, :]  # token, column in the patch
    token = first + columns // PADDED_PATCH
    column = columns % PADDED_PATCH
    image = first_token.to(tl.int64) * (PATCH * PATCH * CHANNELS)
    line = channel.to(tl.int64) * (tokens * (PATCH * PATCH)) + row * (width * PATCH)
    pixel = token // width * (width * (PATCH * PATCH)) + token % width * PATCH + column
    exists = (channel < CHANNELS) & (row < PATCH) & (token < tokens) & (column < PATCH)
    return image + line + pixel, exists


@triton.jit
def _tokens(
    tiles_ptr,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    PADDED_PATCH: tl.constexpr,
):
    """Rows, int64 [N, 1], and features [1, P·P·Q] of a program's tile in [tokens, p·p·C], and which of them exist."""
    tile = tiles_ptr + tl.program_id(0) * 8
    first_token, tokens, first = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 4)
    token = first + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, PADDED_PATCH * PADDED_PATCH * PADDED_CHANNELS)[None, :]
    row = columns // (PADDED_PATCH * PADDED_CHANNELS)
    column = columns // PADDED_CHANNELS % PADDED_PATCH
    channel = columns % PADDED_CHANNELS
    if PADDED_CHANNELS == CHANNELS and PADDED_PATCH == PATCH:
        feature = columns
        exists = token < tokens
    else:
        feature = (row * PATCH + column) * CHANNELS + channel
        exists = (token < tokens) & (row < PATCH) & (column < PATCH) & (channel < CHANNELS)
    return (first_token + token).to(tl.int64), feature, exists


@triton.jit
def flow_matching_forward(
    tiles_ptr,
    latents_ptr,
    noise_ptr,
    timesteps_ptr,
    noised_ptr,
    target_ptr,
    STRIDE_NOISE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    PADDED_PATCH: tl.constexpr,
):
    """noised = (1 − t) z + t e and target = e − z for one tile."""
    FEATURES: tl.constexpr = PATCH * PATCH * CHANNELS
    offsets, exists = _planar(tiles_ptr, CHANNELS, PATCH, ROWS, PADDED_CHANNELS, PADDED_PATCH)
    z = tl.load(latents_ptr + offsets, exists, other=0.0)  # [Q·P, N·P]
    rows, features, exists = _tokens(tiles_ptr, CHANNELS, PATCH, ROWS, PADDED_CHANNELS, PADDED_PATCH)
    e = tl.load(noise_ptr + rows * STRIDE_NOISE + features, exists, other=0.0).to(tl.float32)  # [N, P·P·Q]
    t = tl.load(timesteps_ptr + tl.load(tiles_ptr + tl.program_id(0) * 8)).to(tl.float32)
    z = tl.reshape(z, [PADDED_CHANNELS, PADDED_PATCH, ROWS, PADDED_PATCH])
    z = tl.reshape(tl.permute(z, [2, 1, 3, 0]), [ROWS, COLUMNS]).to(tl.float32)
    out = rows * FEATURES + features
    dtype: tl.constexpr = noised_ptr.dtype.element_ty
    tl.store(noised_ptr + out, rounded((1 - t) * z + t * e, dtype), exists)
    tl.store(target_ptr + out, rounded(e - z, dtype), exists)


@triton.jit
def flow_matching_backward(
    tiles_ptr,
    dnoised_ptr,
    dtarget_ptr,
    timesteps_ptr,
    target_ptr,
    dlatents_ptr,
    dnoise_ptr,
    partials_ptr,
    STRIDE_DNOISED: tl.constexpr,
    STRIDE_DTARGET: tl.constexpr,
    STRIDE_TARGET: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    PADDED_PATCH: tl.constexpr,
):
    """dz = (1 − t) dnoised − dtarget, de = t dnoised + dtarget, and Σ target · dnoised of one tile, [tiles].

    A result whose pointer is None is left out.
    """
    FEATURES: tl.constexpr = PATCH * PATCH * CHANNELS
    rows, features, exists = _tokens(tiles_ptr, CHANNELS, PATCH, ROWS, PADDED_CHANNELS, PADDED_PATCH)
    dnoised = tl.load(dnoised_ptr + rows * STRIDE_DNOISED + features, exists, other=0.0).to(tl.float32)
    if partials_ptr is not None:
        target = tl.load(target_ptr + rows * STRIDE_TARGET + features, exists, other=0.0).to(tl.float32)
        tl.store(partials_ptr + tl.program_id(0), tl.sum(tl.sum(target * dnoised, 1), 0))
    if dlatents_ptr is not None or dnoise_ptr is not None:
        dtarget = tl.load(dtarget_ptr + rows * STRIDE_DTARGET + features, exists, other=0.0).to(tl.float32)
        t = tl.load(timesteps_ptr + tl.load(tiles_ptr + tl.program_id(0) * 8)).to(tl.float32)
        if dnoise_ptr is not None:
            dnoise = rounded(t * dnoised + dtarget, dnoise_ptr.dtype.element_ty)
            tl.store(dnoise_ptr + rows * FEATURES + features, dnoise, exists)
        if dlatents_ptr is not None:
            dz = rounded((1 - t) * dnoised - dtarget, dlatents_ptr.dtype.element_ty)  # [N, P·P·Q]
            dz = tl.reshape(dz, [ROWS, PADDED_PATCH, PADDED_PATCH, PADDED_CHANNELS])
            dz = tl.permute(dz, [3, 1, 0, 2])
            dz = tl.reshape(dz, [PADDED_CHANNELS * PADDED_PATCH, ROWS * PADDED_PATCH])
            offsets, exists = _planar(tiles_ptr, CHANNELS, PATCH, ROWS, PADDED_CHANNELS, PADDED_PATCH)
            tl.store(dlatents_ptr + offsets, dz, exists)


@triton.jit
def flow_matching_dtimesteps(partials_ptr, first_tiles_ptr, dtimesteps_ptr, BLOCK: tl.constexpr):
    """The gradient of one image's t: the sum of ``partials_ptr`` over its tiles, in an order that they alone decide.

    Image i has the tiles first_tiles[i] … first_tiles[i + 1], int32 [images + 1].
    """
    image = tl.program_id(0)
    begin, end = tl.load(first_tiles_ptr + image), tl.load(first_tiles_ptr + image + 1)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(begin, end, BLOCK):
        tiles = first + tl.arange(0, BLOCK)
        sums += tl.load(partials_ptr + tiles, tiles < end, other=0.0)
    tl.store(dtimesteps_ptr + image, rounded(tl.sum(sums, 0), dtimesteps_ptr.dtype.element_ty))


def _constants(patch: int, channels: int) -> dict[str, int]:
    padded_patch, padded_channels = triton.next_power_of_2(patch), triton.next_power_of_2(channels)
    columns = padded_patch * padded_patch * padded_channels
    constants = {"CHANNELS": channels, "PATCH": patch, "ROWS": tile_tokens(patch, channels), "COLUMNS": columns}
    return constants | {"PADDED_CHANNELS": padded_channels, "PADDED_PATCH": padded_patch}


def tile_tokens(patch: int, channels: int) -> int:
    """Tokens of a tile: as many as make it 2048 numbers, at least one."""
    columns = triton.next_power_of_2(patch) ** 2 * triton.next_power_of_2(channels)
    return max(1, 2048 // columns)


def _num_warps(constants: dict[str, int]) -> int:
    """Warps of a program: 16 numbers of each tensor per thread, until there are 16 warps."""
    return min(max(1, constants["ROWS"] * constants["COLUMNS"] // 512), 16)


def forward(
    tiles: Any, latents: Any, noise: Any, timesteps: Any, noised: Any, target: Any, patch: int, channels: int
) -> tuple[Launch, ...]:
    """The launch that fills ``noised`` and ``target``; ``tiles`` [tiles, 8] has ``tile_tokens`` tokens per tile.

    Rows of ``noise`` may have any stride; latents and timesteps are contiguous.
    """
    constants = _constants(patch, channels)
    arguments = {"tiles_ptr": tiles, "latents_ptr": latents, "noise_ptr": noise, "timesteps_ptr": timesteps}
    arguments |= {"noised_ptr": noised, "target_ptr": target, "STRIDE_NOISE": noise.stride(0)} | constants
    return (Launch(flow_matching_forward, (tiles.shape[0],), arguments, _num_warps(constants), 1),)


def backward(
    tiles: Any,
    first_tiles: Any,
    dnoised: Any,
    dtarget: Any,
    timesteps: Any,
    target: Any | None,
    dlatents: Any | None,
    dnoise: Any | None,
    dtimesteps: Any | None,
    partials: Any | None,
    patch: int,
    channels: int,
) -> tuple[Launch, ...]:
    """The launches that fill ``dlatents``, ``dnoise`` and ``dtimesteps``; what is None is left out.

    ``target`` and ``partials``, float32 scratch [tiles], belong to ``dtimesteps``. Rows of dnoised, dtarget and target
    may have any stride; timesteps is contiguous.
    """
    constants = _constants(patch, channels)
    arguments = {"tiles_ptr": tiles, "dnoised_ptr": dnoised, "dtarget_ptr": dtarget, "timesteps_ptr": timesteps}
    arguments |= {"target_ptr": target, "dlatents_ptr": dlatents, "dnoise_ptr": dnoise, "partials_ptr": partials}
    arguments |= {"STRIDE_DNOISED": dnoised.stride(0), "STRIDE_DTARGET": dtarget.stride(0)}
    arguments |= {"STRIDE_TARGET": 0 if target is None else target.stride(0)} | constants
    launches = [Launch(flow_matching_backward, (tiles.shape[0],), arguments, _num_warps(constants), 1)]
    if dtimesteps is not None:
        arguments = {"partials_ptr": partials, "first_tiles_ptr": first_tiles, "dtimesteps_ptr": dtimesteps}
        images = (dtimesteps.shape[0],)
        launches.append(Launch(flow_matching_dtimesteps, images, arguments | {"BLOCK": 256}, 1, 1))
    return tuple(launches)
