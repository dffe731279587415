"""The names of the implementations of an op, and the choice among them.

Every op is one ``torch.library`` operator with a ``backend`` argument. The public function resolves "auto" to a name
before the call, so that traces, saved graphs and error messages say which implementation runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("reference", "torch", "triton", "cuda", "flash")

_PORTABLE = ("reference", "torch")
_BUILT: dict[str, tuple[str, ...]] = dict.fromkeys(
    (
        "symbiotic_attention",
        "qk_norm_rope",
        "stream_linear",
        "rms_norm",
        "swiglu",
        "flow_matching",
        "flow_matching_loss",
        "alignment_loss",
    ),
    _PORTABLE,
)


def resolve(op: str, backend: str, *tensors: Tensor | None) -> str:
    """Return the name of the implementation that runs this call of ``op``.

    ``backend`` is "auto" or one of :data:`BACKENDS`; ``tensors`` are the call's tensors, which must share one device
    (None is skipped). Raises ValueError if the name is unknown, if ``op`` has no such implementation, or if the devices
    differ; it never falls back.
    """
    devices = [tensor.device for tensor in tensors if tensor is not None]
    if any(device != devices[0] for device in devices):
        raise ValueError(f"{op}: its tensors are on {', '.join(map(str, devices))}; they must be on one device")
    if backend == "auto":
        return "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be 'auto' or one of {', '.join(map(repr, BACKENDS))}")
    if backend not in _BUILT[op]:
        raise ValueError(f"backend={backend!r} cannot run {op}: no such kernel is built")
    return backend


def available() -> dict[str, list[str]]:
    """The implementations of every op that are part of this build."""
    return {op: list(names) for op, names in _BUILT.items()}


def run(implementations: Mapping[str, Callable[..., Any]], backend: str, tensor: Tensor, *arguments: Any) -> Any:
    """Call ``implementations[backend](tensor, *arguments)`` with autocast off.

    An operator's contract fixes its dtypes; autocast stays on inside operators and would change those of matmuls.
    """
    device_type = tensor.device.type
    enabled = torch.is_autocast_enabled(device_type)
    with torch.autocast(device_type, enabled=False) if enabled else nullcontext():
        return implementations[backend](tensor, *arguments)
