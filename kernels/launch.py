"""A kernel launch as a value: what runs, on what grid, with which arguments and compile-time constants.

Launchers of this package return launches and do not allocate. So whoever calls them may run them, count them, or, on a
machine without a GPU, compile exactly what would be launched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch of a Triton kernel. ``arguments`` holds run-time arguments and constants, by parameter name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        """Launch on the current device and stream. An empty grid is nothing to do."""
        if all(self.grid):
            self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)


def dtype_name(tensor: Any) -> str:
    """``"bfloat16"`` and so on, for tensors of torch and for stand-ins alike."""
    return str(tensor.dtype).removeprefix("torch.")
