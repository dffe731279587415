"""Launch configurations: values that can be printed and compared, chosen by a pure function.

A configuration is chosen by what the compiler makes of it (no spills in the hot loop, asynchronous wgmma, shared
memory within the chip's limit; ``python -m benchmarks.resources`` prints the table) until a measurement says better:
``tuned.json`` beside this file holds measured winners, which ``python -m benchmarks.tune_attention`` writes there for
review.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

DIRECTIONS = ("forward", "backward_dkdv", "backward_dkdv_atomic", "backward_dq")
TUNED_PATH = Path(__file__).parent / "tuned.json"


@dataclass(frozen=True)
class AttentionConfig:
    """Tile of ``block_m`` queries × ``block_n`` keys, warps of a program, stages of its load pipeline.

    ``tma``: load tiles through tensor descriptors (sm_90 and later), which the tensors' strides must allow.
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
def tuned() -> dict[str, dict[str, int | bool]]:
    """The fields of measured configurations, by ``tuned_key``: what ``TUNED_PATH`` holds, read once."""
    return json.loads(TUNED_PATH.read_text())


def tuned_key(capability: tuple[int, int], head_dim: int, dtype: str, direction: str) -> str:
    """The key of a configuration in ``tuned.json``."""
    return f"sm_{capability[0]}{capability[1]}/{head_dim}/{dtype}/{direction}"


# (block_m, block_n, warps, stages) for 2-byte dtypes and head_dim up to 64, 96 and 128.
_HEAD_DIMS = (64, 96, 128)
_HOPPER_DESCRIPTORS = {
    "forward": ((128, 128, 8, 3), (128, 128, 8, 2), (128, 128, 8, 2)),
    "backward_dkdv": ((128, 64, 8, 2), (64, 128, 8, 2), (64, 128, 8, 2)),
    "backward_dkdv_atomic": ((64, 128, 8, 2), (64, 128, 8, 2), (64, 64, 8, 2)),
    "backward_dq": ((128, 64, 8, 2),) * 3,
}
_HOPPER_POINTERS = {
    "forward": ((128, 64, 8, 2),) * 3,
    "backward_dkdv": ((64, 64, 8, 2),) * 3,
    "backward_dkdv_atomic": ((64, 64, 8, 2),) * 3,
    "backward_dq": ((128, 64, 8, 2),) * 3,
}
_AMPERE = {
    "forward": ((128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
    "backward_dkdv": ((64, 64, 4, 2), (32, 64, 4, 2), (64, 64, 8, 2)),
    "backward_dkdv_atomic": ((64, 64, 8, 2), (32, 64, 4, 2), (64, 64, 8, 2)),
    "backward_dq": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2)),
}


def attention_config(
    capability: tuple[int, int] | None, head_dim: int, dtype: str, direction: str, *, describable: bool = True
) -> AttentionConfig:
    """The launch configuration of one direction of attention.

    Args:
        capability: compute capability of the device; None for the interpreter.
        head_dim: 1 to 128.
        dtype: "bfloat16", "float16" or "float32".
        direction: one of ``DIRECTIONS``.
        describable: whether tensor descriptors can describe the tensors (``launch.describable``).

    Raises:
        ValueError: the device is too old.
    """
    if capability is None:
        return AttentionConfig(16, 16, 4, 1)
    if capability < (8, 0):
        raise ValueError(
            f"backend='triton': the device has compute capability {capability[0]}.{capability[1]}; it must be at least "
            "8.0 (backend='torch' runs anywhere)"
        )
    measured = tuned().get(tuned_key(capability, head_dim, dtype, direction))
    if measured is not None and (describable or not measured["tma"]):
        return AttentionConfig(**measured)
    if dtype == "float32":  # multiplied in full precision, without tensor cores, from registers
        block = 16 if "dkdv" in direction else 32
        return AttentionConfig(block, block, 8, 1)
    large = capability[0] in (9, 10)  # 227 KiB of shared memory per program; 8.x and 12.x have less
    tma = large and describable
    table = _HOPPER_DESCRIPTORS if tma else _HOPPER_POINTERS if large else _AMPERE
    return AttentionConfig(*table[direction][bisect_left(_HEAD_DIMS, head_dim)], tma=tma)
