"""Launch configurations: values that can be printed and compared, chosen by a pure function.

A configuration is chosen by what the compiler makes of it (no spills in a loop, asynchronous wgmma, shared memory within
the chip's limit; ``python -m benchmarks.resources`` prints the table) until a measurement says better. ``TUNED`` holds
measured winners, which ``python -m benchmarks.tune_attention`` writes to ``tuned.json`` beside this file for review.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

DIRECTIONS = ("forward", "backward_dkdv", "backward_dkdv_atomic", "backward_dq")
MAX_HEAD_DIM = 128


@dataclass(frozen=True)
class AttentionConfig:
    """Tile of ``block_m`` queries × ``block_n`` keys, warps of a program, stages of its load pipeline.

    ``tma``: load tiles through tensor descriptors where the tensors' strides allow it (sm_90 and later).
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False


def head_dim_parts(head_dim: int) -> tuple[int, int]:
    """Widths of the two column blocks that a head is computed in; the second is 0 if one holds it all.

    Block widths are powers of two from 16 on. 72 becomes 64 + 16, which costs 80/128 of one block of 128.
    """
    first = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - first
    return first, 0 if rest <= 0 else max(16, 1 << (rest - 1).bit_length())


@lru_cache(maxsize=1)
def _tuned() -> dict[str, dict[str, int]]:
    return json.loads((Path(__file__).parent / "tuned.json").read_text())


def tuned_key(capability: tuple[int, int], head_dim: int, dtype: str, direction: str) -> str:
    """The key of a configuration in ``tuned.json``."""
    return f"sm_{capability[0]}{capability[1]}/{head_dim}/{dtype}/{direction}"
