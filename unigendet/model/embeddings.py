"""Inputs of the decoder that are not words: position tables, the timestep embedding, the two-layer projections.

Source: BAGEL's model (DiT's timestep features, MAE's 2-D sin-cos tables), kept by UniGenDet unchanged.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sincos_table(side: int, dim: int) -> Tensor:
    """Fixed 2-D table [side·side, dim], float32, row ``row · side + column``.

    The first half of the features encodes the column, the second the row; each half is sin then cos of the coordinate
    times 10000^(−i/(dim/4)), i = 0..dim/4−1. Raises ValueError unless dim is a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"dim is {dim}; it must be a multiple of 4")
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    one = torch.cat((angle.sin(), angle.cos()), 1)  # [side, dim/2]
    column, row = one.repeat(side, 1), one.repeat_interleave(side, 0)
    return torch.cat((column, row), 1).float()


def timestep_features(t: Tensor, dim: int = 256) -> Tensor:
    """Sinusoidal features [N, dim], float32, of t [N] in [0, 1]: cos then sin of t · 10000^(−i/(dim/2))."""
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    frequency = torch.exp(index * (-math.log(10000.0) / half))
    angle = t.float()[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), 1)


class TimestepEmbedding(nn.Module):
    """Linear, SiLU, Linear on 256 sinusoidal features of a time in [0, 1]: t [N] → [N, hidden]."""

    features = 256

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(self.features, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, t: Tensor) -> Tensor:
        """Embed t [N]."""
        return self.fc2(F.silu(self.fc1(timestep_features(t, self.features).to(self.fc1.weight.dtype))))


class Mlp(nn.Module):
    """Linear, GELU, Linear. ``approximate``: 'tanh' (ViT, connector) or 'none' (exact, as in φ, DIGA's projection)."""

    def __init__(self, in_size: int, hidden_size: int, out_size: int, approximate: str = "tanh") -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, out_size)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """Map x [N, in_size] to [N, out_size]."""
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))
