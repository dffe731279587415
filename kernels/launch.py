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


def tile_sources(use_descriptors: bool, tensors: Mapping[str, tuple[Any, int]], d0: int, d1: int) -> dict[str, Any]:
    """What a kernel loads tiles from: descriptors or the tensors themselves.

    ``tensors``: by name x, a tensor [rows, heads, D] and the rows of a tile. Returned are the arguments x0_source and
    x1_source for the two column blocks of D, ``d0`` and ``d1`` wide (None if d1 is 0).
    """
    sources = {}
    for name, (x, rows) in tensors.items():
        for part, width in enumerate((d0, d1)):
            source = None if width == 0 else _descriptor(x, rows, width) if use_descriptors else x
            sources[f"{name}{part}_source"] = source
    return sources


def describable(*tensors: Any) -> bool:
    """Whether each [rows, heads, D] is a matrix [rows, heads · D] that the copy engine can read.

    It wants rows at multiples of 16 bytes that do not overlap; heads must be side by side.
    """
    return all(
        x.stride(2) == 1
        and x.stride(1) == x.shape[2]
        and x.stride(0) >= x.shape[1] * x.shape[2]
        and x.stride(0) * x.element_size() % 16 == 0
        and x.shape[2] * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
        for x in tensors
    )


def _descriptor(x: Any, rows: int, width: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, [x.shape[0], x.shape[1] * x.shape[2]], [x.stride(0), 1], [rows, width])


def head_strides(**tensors: Any) -> dict[str, int]:
    """``stride_{name}_row`` and ``STRIDE_{NAME}_HEAD`` of tensors [rows, heads, D].

    Strides of heads are constants: Triton looks for multiples of 16 in run-time integers only, and a head of 72 numbers
    begins at a multiple of 8, which still allows for loads of 16 bytes.
    """
    names = {f"stride_{name}_row": x.stride(0) for name, x in tensors.items()}
    return names | {f"STRIDE_{name.upper()}_HEAD": x.stride(1) for name, x in tensors.items()}
