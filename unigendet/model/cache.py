"""The key/value cache of incremental inference."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from unigendet.config import ModelConfig


class KVCache:
    """Keys and values of every decoder layer for a fixed set of samples.

    Sample i owns ``capacity[i]`` rows; ``lengths[i]`` of them are filled. A pack made with ``cached=cache.lengths`` and
    ``capacity=cache.capacity`` writes its new rows behind those; they stay only if ``commit`` says so, and are
    overwritten by the next pack otherwise (the image that is being denoised never enters the cache).
    """

    def __init__(
        self,
        config: ModelConfig,
        capacity: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not capacity or min(capacity) < 1:
            raise ValueError(
                f"capacity is {list(capacity)}; it must hold at least one row for each of one or more samples"
            )
        self.capacity = list(capacity)
        self.lengths = [0] * len(self.capacity)
        shape = (config.num_layers, 2, sum(self.capacity), config.num_kv_heads, config.head_dim)
        # Zeros, because a kernel may multiply what it finds in a spare row by a weight of zero.
        self._rows = torch.zeros(shape, device=device, dtype=dtype)

    def first(self, samples: int) -> KVCache:
        """The cache of the first ``samples`` samples alone; it shares the memory, not later changes of ``lengths``."""
        part = copy.copy(self)
        part.capacity, part.lengths = self.capacity[:samples], self.lengths[:samples]
        part._rows = self._rows[:, :, : sum(part.capacity)]
        return part

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """k and v of a layer, each [total capacity, kv_heads, head_dim]."""
        k, v = self._rows[index].unbind(0)
        return k, v

    def commit(self, lengths: Sequence[int]) -> None:
        """Set how many rows of each sample are filled. Raises ValueError if one exceeds its capacity."""
        for i, (length, rows) in enumerate(zip(lengths, self.capacity, strict=True)):
            if not 0 <= length <= rows:
                raise ValueError(f"lengths[{i}] is {length}; sample {i} has {rows} rows")
        self.lengths = list(lengths)
