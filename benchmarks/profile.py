"""Where the time of a training step goes, by op and direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

REST = "embedding, ViT, heads, losses and the rest"
# Ranges that hold their children: what a name begins with, and which part of the step it is. "{}" is the direction.
_PARTS = {
    "unigendet::symbiotic_attention": "attention, {}",
    "unigendet::stream_linear": "linear layers, {}",
    "unigendet::qk_norm_rope": "qk_norm_rope, {}",
    "unigendet::rms_norm": "rms_norm, {}",
    "unigendet::swiglu": "swiglu, {}",
    "unigendet::alignment_loss": "alignment_loss",
    "unigendet::flow_matching": "flow matching",
    "Optimizer.step": "optimizer",
}


def step_shares(step: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """The share of each part in the time of ``step``; they sum to 1, the largest first, the rest last.

    Time on the device; on CPUs, in the main thread. An operator counts with all that it calls. The ViT's attention and
    the decoder's are one part.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    step()  # warm
    with profile(activities=activities) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = profiler.key_averages()
    on_gpu = device.type == "cuda"
    # A kernel's time is its own row's and, once more, that of the operator that launched it.
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]
    on_host = [e for e in events if e.device_type == DeviceType.CPU]
    total = sum(e.self_device_time_total for e in kernels) if on_gpu else sum(e.self_cpu_time_total for e in on_host)
    found: dict[str, float] = {}
    for event in on_host:
        part = _part(event.key)
        if part is not None:
            time = event.device_time_total if on_gpu else event.cpu_time_total
            found[part] = found.get(part, 0.0) + time / total
    ordered = dict(sorted(found.items(), key=lambda item: -item[1]))
    return {**ordered, REST: max(0.0, 1 - sum(found.values()))}


def _part(name: str) -> str | None:
    for start, part in _PARTS.items():
        if name.startswith(start):
            return part.format("backward" if "backward" in name else "forward")
    return None
