"""What the cases of ops on stream-major rows share: streams, random numbers, the candidates' names."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .candidate import PLAIN, Candidate, Function, compiled, ours, raise_if_not_cuda
from .harness import CannotRun

BACKENDS = ("torch", "triton", "cpp")


def streams(rows: int) -> tuple[SimpleNamespace, int]:
    """The part of a Layout that ops of two streams read, with a third of the rows in the generation stream."""
    understanding = rows - rows // 3
    return SimpleNamespace(stream_lengths=torch.tensor([understanding, rows - understanding])), understanding


def random(device: torch.device, dtype: torch.dtype, seed: int) -> Callable[..., Tensor]:
    """Makes tensors of standard normal numbers, one after the other."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device, dtype=dtype)


def candidates(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    eager: Function,
    own: Callable[..., Any],
    more: Mapping[str, Callable[[], Candidate | Function]] | None = None,
    backends: tuple[str, ...] = BACKENDS,
) -> dict[str, Any]:
    """``candidates`` and ``peers`` of a Case: eager, compiled, others' kernels, and our backends."""
    peers = {PLAIN: lambda: eager, "torch.compile": compiled(eager), **(more or {})}
    built = {b: ours(op, b, device, dtype, partial(own, backend=b)) for b in backends}
    return {"candidates": peers | built, "peers": frozenset(peers)}


def library(name: str, module: str, attribute: str, device: torch.device) -> Any:
    """Something of a peer's library, which runs on CUDA devices only."""
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise CannotRun(f"{name} is not installed") from error
    except AttributeError as error:
        raise CannotRun(f"the installed {name} has no {attribute}") from error
    raise_if_not_cuda(device)
    return found
