"""Argument checks and dtype rules that the ops share.

The checks run under ``torch.compile`` too: they compare sizes and format a message only when they fail, because
formatting a dynamic size would fix it in the graph.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor


def reject(name: str, value: object, need: str) -> NoReturn:
    """Raise ValueError ``{name} is {value}; it must be {need}``, with a tensor shown as its shape, dtype and device."""
    if isinstance(value, Tensor):
        kind = "" if value.layout == torch.strided else f"{value.layout} "
        value = f"a {kind}{value.dtype} tensor of shape {list(value.shape)} on {value.device}"
    raise ValueError(f"{name} is {value}; it must be {need}")


def check_floating(name: str, value: Tensor, shape: tuple[int | str, ...], dtype: torch.dtype | None = None) -> None:
    """Check for a floating-point tensor of ``shape``, where a string stands for any size, and of ``dtype`` if given."""
    fits = isinstance(value, Tensor) and value.is_floating_point() and value.dim() == len(shape)
    fits = fits and value.layout == torch.strided
    fits = fits and all(isinstance(need, str) or have == need for have, need in zip(value.shape, shape, strict=True))
    if not fits or (dtype is not None and value.dtype != dtype):
        sizes = ", ".join(map(str, shape))
        dense = "dense " if isinstance(value, Tensor) and value.layout != torch.strided else ""
        reject(name, value, f"a {dense}{dtype or 'floating-point'} tensor of shape [{sizes}]")


def check_columns(name: str, value: Tensor) -> None:
    """Check that the rows of ``value`` [rows, columns] hold something: of nothing there is no mean."""
    if value.shape[1] == 0:
        reject(name, value, "one with at least 1 column")


def check_stream_lengths(stream_lengths: Tensor) -> None:
    """Check for ``Layout.stream_lengths``: int64 [2] on the CPU. Only :func:`first_stream` reads the values."""
    fits = isinstance(stream_lengths, Tensor) and stream_lengths.device.type == "cpu"
    if not fits or stream_lengths.dtype != torch.int64 or stream_lengths.shape != (2,):
        reject("layout.stream_lengths", stream_lengths, "an int64 tensor of shape [2] on the CPU")


def first_stream(name: str, tensor: Tensor, stream_lengths: Tensor) -> int:
    """Return the number of understanding rows, which come first in ``tensor`` [T, ...]; the lengths must sum to T."""
    understanding, generation = stream_lengths.tolist()
    if understanding < 0 or generation < 0 or understanding + generation != tensor.shape[0]:
        raise ValueError(
            f"{name} has {tensor.shape[0]} rows; it must have as many as layout.stream_lengths says: "
            f"{understanding} (understanding) + {generation} (generation)"
        )
    return understanding


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype that sums and statistics use: float64 if any of ``tensors`` is, else float32."""
    is_double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast ``tensors`` as autocast casts a matmul's: to its dtype where it is enabled, except float64 and None."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def empty_unless(needed: bool, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised tensor of ``shape``, or of shape [0], which stands for an output nobody asked for."""
    return torch.empty(shape if needed else (0,), dtype=dtype, device=device)
