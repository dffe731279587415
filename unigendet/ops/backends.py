"""The names of the implementations of an op, and the choice among them.

Every op is one ``torch.library`` operator with a ``backend`` argument. The public function resolves "auto" to a name
before the call, so that traces, saved graphs and error messages say which implementation runs.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("reference", "torch", "triton", "cpp", "cuda", "flash")

_PORTABLE = ("reference", "torch")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Triton reads this when a kernel is defined; kernels then run on the CPU, slowly, for tests.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_HAS_TRITON = find_spec("triton") is not None
# Ops of which a Triton program holds whole rows: which tensor has them, and how many columns may be.
_TRITON_ROWS = {"alignment_loss": 0, "rms_norm": 0, "flow_matching": 1, "flow_matching_loss": 0}
_TRITON_COLUMNS = 16384
# How many of a call's tensors are data, of which each may have a dtype of its own; of other ops it is the first.
_DATA = {"alignment_loss": 2, "flow_matching": 3, "flow_matching_loss": 2}
_FLASH_DTYPES = (torch.bfloat16, torch.float16)
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
_BUILT["symbiotic_attention"] += ("triton", "flash")
_BUILT["qk_norm_rope"] += ("triton",)
_BUILT["rms_norm"] += ("triton",)
_BUILT["swiglu"] += ("triton",)
_BUILT["flow_matching"] += ("triton",)
_BUILT["flow_matching_loss"] += ("triton",)
_BUILT["alignment_loss"] += ("triton",)
# What unigendet._C has kernels for, and where they run.
_EXTENSION_OPS = {
    "cpp": ("symbiotic_attention", "qk_norm_rope", "rms_norm", "swiglu", "alignment_loss"),
    "cuda": ("alignment_loss",),
}
_EXTENSION_DEVICES = {"cpp": "cpu", "cuda": "cuda"}


def resolve(op: str, backend: str, *tensors: Tensor | None) -> str:
    """Return the name of the implementation that runs this call of ``op``.

    ``backend`` is "auto" or one of :data:`BACKENDS`; ``tensors`` are the call's tensors, which must share one device
    (None is skipped). Raises ValueError if the name is unknown, if ``op`` has no such implementation, if that cannot
    run on this device or dtype, or if the devices differ; it never falls back.
    """
    devices = [tensor.device for tensor in tensors if tensor is not None]
    if any(device != devices[0] for device in devices):
        raise ValueError(f"{op}: its tensors are on {', '.join(map(str, devices))}; they must be on one device")
    if backend == "auto":
        return _automatic(op, tensors)
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be 'auto' or one of {', '.join(map(repr, BACKENDS))}")
    if op in _EXTENSION_OPS.get(backend, ()):
        _check_extension(op, backend, tensors)
    elif backend not in _BUILT[op]:
        raise ValueError(f"backend={backend!r} cannot run {op}: no such kernel is built")
    if backend == "triton":
        _check_triton(op, tensors)
    if backend == "flash":
        _check_flash(op, tensors[0])
    return backend


def _automatic(op: str, tensors: tuple[Tensor | None, ...]) -> str:
    """Triton's kernels on CUDA devices, the extension's on the CPU, for what they know; plain PyTorch otherwise."""
    device = tensors[0].device
    if "triton" in _BUILT[op] and _compiles_triton(device) and _triton_limit(op, tensors) is None:
        return "triton"
    fits = device.type == "cpu" and op in _EXTENSION_OPS["cpp"] and _dtype_limit(op, tensors) is None
    return "cpp" if fits and "cpp" in extension_backends() else "torch"


@torch.compiler.assume_constant_result
def extension_backends() -> tuple[str, ...]:
    """The backends that ``unigendet._C`` was built with; none if it is not there."""
    facts = extension_facts()
    return () if "problem" in facts else ("cpp", "cuda") if facts["cuda_archs"] else ("cpp",)


@cache
def extension_facts() -> dict[str, Any]:
    """How ``unigendet._C`` was built: compiler, nvcc, isa_levels, usable_isa_levels, cuda_archs.

    Where it is not there, only ``problem``, which says why; one that cannot be loaded is warned of, once.
    """
    if find_spec("unigendet._C") is None:
        return {"problem": "not built: install from source with a C++ compiler"}
    try:
        from unigendet import _C
    except ImportError as error:
        warnings.warn(f"unigendet._C is built, but cannot be loaded: {error}", RuntimeWarning, stacklevel=2)
        return {"problem": f"built, but cannot be loaded: {error}"}
    return _C.build_info()


@torch.compiler.assume_constant_result
def _has_kernels_for(device: torch.device) -> bool:
    """Whether ``unigendet._C`` has machine code for a CUDA device: of its major version, and not of a later minor."""
    major, minor = torch.cuda.get_device_capability(device)
    for arch in extension_facts()["cuda_archs"]:
        number, exact = arch.removeprefix("sm_").rstrip("af"), arch[-1] == "a"
        built = int(number[:-1]), int(number[-1])
        if built == (major, minor) or (not exact and built[0] == major and built[1] < minor):
            return True
    return False


@torch.compiler.assume_constant_result
def _compiles_triton(device: torch.device) -> bool:
    """Whether Triton is installed and compiles for ``device``."""
    return device.type == "cuda" and _HAS_TRITON and torch.cuda.get_device_capability(device) >= (8, 0)


def _dtype_limit(op: str, tensors: tuple[Tensor | None, ...]) -> str | None:
    """What about the dtypes of a call the kernels do not know, if anything."""
    for tensor in tensors[: _DATA.get(op, 1)]:
        if tensor.dtype not in _KERNEL_DTYPES:
            return f"the dtype is {tensor.dtype}; it must be one of {', '.join(map(str, _KERNEL_DTYPES))}"
    return None


def _triton_limit(op: str, tensors: tuple[Tensor | None, ...]) -> str | None:
    """What about the dtypes or the width of a call Triton's kernels do not know, if anything."""
    if op in _TRITON_ROWS and tensors[_TRITON_ROWS[op]].shape[1] > _TRITON_COLUMNS:
        return f"rows are {tensors[_TRITON_ROWS[op]].shape[1]} numbers wide; they must be at most {_TRITON_COLUMNS}"
    return _dtype_limit(op, tensors)


def _check_triton(op: str, tensors: tuple[Tensor | None, ...]) -> None:
    limit, device = _triton_limit(op, tensors), tensors[0].device
    if limit is not None:
        raise ValueError(f"backend='triton' cannot run {op}: {limit}")
    if device.type != "cuda" and not _INTERPRETED:
        raise ValueError(
            f"backend='triton' cannot run {op}: its tensors are on {device}; they must be on a CUDA device "
            "(or, for tests, set TRITON_INTERPRET=1 before Python starts)"
        )


def _check_extension(op: str, backend: str, tensors: tuple[Tensor | None, ...]) -> None:
    device, built = tensors[0].device, extension_backends()
    problem = _dtype_limit(op, tensors)
    if not built:
        problem = f"unigendet._C is {extension_facts()['problem']}"
    elif backend not in built:
        problem = "unigendet._C is built without CUDA: install from source with nvcc"
    elif problem is None and device.type != _EXTENSION_DEVICES[backend]:
        need = "the CPU" if backend == "cpp" else "a CUDA device"
        problem = f"its tensors are on {device}; they must be on {need}"
    elif problem is None and backend == "cuda" and not _has_kernels_for(device):
        archs = ", ".join(extension_facts()["cuda_archs"])
        problem = f"unigendet._C is built for {archs}, which {device} does not run; see UNIGENDET_CUDA_ARCHS in csrc/"
    if problem is not None:
        raise ValueError(f"backend={backend!r} cannot run {op}: {problem}")


def _check_flash(op: str, q: Tensor) -> None:
    problem = None
    if q.device.type != "cuda":
        problem = f"its tensors are on {q.device}; they must be on a CUDA device"
    elif q.dtype not in _FLASH_DTYPES:
        problem = f"the dtype is {q.dtype}; it must be one of {', '.join(map(str, _FLASH_DTYPES))}"
    elif q.shape[-1] % 8 or q.shape[-1] > 256:
        problem = f"head_dim is {q.shape[-1]}; it must be a multiple of 8, at most 256"
    if problem is not None:
        raise ValueError(f"backend='flash' cannot run {op}: {problem}")


def available() -> dict[str, list[str]]:
    """The implementations of every op that are part of this build."""
    extension = extension_backends()
    return {op: [*names, *(b for b in extension if op in _EXTENSION_OPS[b])] for op, names in _BUILT.items()}


def run(implementations: Mapping[str, Callable[..., Any]], backend: str, tensor: Tensor, *arguments: Any) -> Any:
    """Call ``implementations[backend](tensor, *arguments)`` with autocast off.

    An operator's contract fixes its dtypes; autocast stays on inside operators and would change those of matmuls.
    """
    device_type = tensor.device.type
    enabled = torch.is_autocast_enabled(device_type)
    with torch.autocast(device_type, enabled=False) if enabled else nullcontext():
        return implementations[backend](tensor, *arguments)
