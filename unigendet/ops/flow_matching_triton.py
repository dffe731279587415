"""The ``triton`` backends of ``flow_matching`` and ``flow_matching_loss``: tables of tiles and launches.

The kernels fill what the ops allocate; a result that is None is left out.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from unigendet.ops._launching import run_launches, table_on_device, table_stream, unit_stride


def forward(
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    table: Tensor,
    noised: Tensor,
    target: Tensor,
    patch: int,
    channels: int,
) -> None:
    """Fill ``noised`` and ``target``. See ``flow_matching``."""
    from unigendet.kernels import flow_matching

    tiles, _ = _tiles(table, flow_matching.tile_tokens(patch, channels), noise.device)
    inputs = (latents.contiguous(), unit_stride(noise), timesteps.contiguous())
    run_launches(flow_matching.forward(tiles, *inputs, noised, target, patch, channels), noise)


def backward(
    dnoised: Tensor,
    dtarget: Tensor,
    timesteps: Tensor,
    target: Tensor | None,
    table: Tensor,
    dlatents: Tensor | None,
    dnoise: Tensor | None,
    dtimesteps: Tensor | None,
    patch: int,
    channels: int,
) -> None:
    """Fill ``dlatents``, ``dnoise`` and ``dtimesteps``, the last of which needs ``target``. See ``flow_matching``."""
    from unigendet.kernels import flow_matching

    tables = _tiles(table, flow_matching.tile_tokens(patch, channels), dnoised.device)
    partials = None
    if dtimesteps is None:
        target = None
    else:
        target = unit_stride(target)
        partials = torch.empty(tables[0].shape[0], dtype=torch.float32, device=dnoised.device)
    inputs = (unit_stride(dnoised), unit_stride(dtarget), timesteps.contiguous(), target)
    launches = flow_matching.backward(*tables, *inputs, dlatents, dnoise, dtimesteps, partials, patch, channels)
    run_launches(launches, dnoised)


def loss_forward(prediction: Tensor, target: Tensor, loss: Tensor) -> None:
    """Fill ``loss`` [M]. See ``flow_matching_loss``."""
    from unigendet.kernels import flow_matching_loss

    run_launches(flow_matching_loss.forward(unit_stride(prediction), unit_stride(target), loss), prediction)


def loss_backward(
    prediction: Tensor, target: Tensor, dloss: Tensor, dprediction: Tensor | None, dtarget: Tensor | None
) -> None:
    """Fill ``dprediction`` and ``dtarget``. See ``flow_matching_loss``."""
    from unigendet.kernels import flow_matching_loss

    inputs = (dloss, unit_stride(prediction), unit_stride(target))
    run_launches(flow_matching_loss.backward(*inputs, dprediction, dtarget), prediction)


def _tiles(table: Tensor, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The kernels' tables for the grids ``table``: tiles of ``tokens`` tokens, and each image's first tile.

    They are made once and kept for the last packs seen.
    """
    return _cached(table.numpy().tobytes(), tokens, device, table_stream("flow_matching", "triton", device))


@functools.lru_cache(maxsize=64)
def _cached(table: bytes, tokens: int, device: torch.device, _: int) -> tuple[Tensor, Tensor]:
    height, width = np.frombuffer(table, np.int64).reshape(-1, 2).T
    length = height * width
    count = -(-length // tokens)
    first_tiles = np.concatenate(([0], np.cumsum(count)))
    image = np.repeat(np.arange(len(length)), count)
    tiles = np.zeros((len(image), 8), np.int64)
    tiles[:, 0] = image
    tiles[:, 1] = (np.cumsum(length) - length)[image]
    tiles[:, 2] = length[image]
    tiles[:, 3] = width[image]
    tiles[:, 4] = (np.arange(len(image)) - first_tiles[image]) * tokens
    return table_on_device(tiles, device), table_on_device(first_tiles, device)
