"""Checks that every op must pass: compilation without recompiling, checkpointing, no unwritten output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from numerics import outputs_and_gradients
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from unigendet.ops.backends import extension_backends

BACKENDS = ("reference", "torch")
CPP_BACKENDS = tuple(name for name in extension_backends() if name == "cpp")  # one, where the extension is built


def streams(understanding: int, generation: int) -> SimpleNamespace:
    """The part of a Layout that ops on rows read."""
    return SimpleNamespace(stream_lengths=torch.tensor([understanding, generation]))


def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True, seed: int = 0) -> Tensor:
    """Random numbers; other shapes or seeds give other numbers."""
    generator = torch.Generator().manual_seed(seed + 7919 * len(shape) + sum(31**i * n for i, n in enumerate(shape)))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def misaligned(x: Tensor) -> Tensor:
    """x's numbers one byte behind where their dtype may lie, as torch.frombuffer can put them."""
    numbers = torch.frombuffer(bytearray(x.numel() * x.element_size() + 16), dtype=x.dtype, offset=1, count=x.numel())
    assert numbers.data_ptr() % x.element_size() == 1
    return numbers.view(x.shape).copy_(x.detach())


def at_level(level: str) -> Any:
    """``unigendet._C`` with the kernels of one instruction set, for ``monkeypatch.setattr("unigendet._C", ...)``."""
    from unigendet import _C

    class Module:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            return lambda **arguments: getattr(_C, name)(**arguments, isa=level)

    return Module()


def assert_same(left: dict[str, Tensor | None], right: dict[str, Tensor | None]) -> None:
    """Assert that two results of ``outputs_and_gradients`` are equal to the last bit."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(
            value, right[name], rtol=0, atol=0, equal_nan=False, msg=lambda m, n=name: f"{n}: {m}"
        )


def check_compiles_once(function: Callable[..., Any], packs: Sequence[Sequence[Any]]) -> None:
    """Compile as one graph, call with every pack, compare with eager: after two packs nothing may be compiled again.

    The first compilation is for the first pack's sizes; the second finds which sizes vary and must serve all others.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for i, pack in enumerate(packs):
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            assert_same(outputs_and_gradients(compiled, pack), outputs_and_gradients(function, pack))
    assert 1 <= counter.frame_count <= 2
    torch._dynamo.reset()


def check_checkpoints(function: Callable[..., Any], inputs: Sequence[Any]) -> None:
    """Activation checkpointing, which runs the forward pass twice, must not change a bit."""
    again = outputs_and_gradients(lambda *args: checkpoint(function, *args, use_reentrant=False), inputs)
    assert_same(again, outputs_and_gradients(function, inputs))


class Recorder(TorchDispatchMode):
    """Counts the operators that are called; the inside of a custom operator is its own business and is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls[str(function).removesuffix(".default")] += 1
        return function(*args, **(kwargs or {}))

    def work(self) -> dict[str, int]:
        """Without what neither reads nor writes memory."""
        return {k: n for k, n in self.calls.items() if k not in ("aten.detach", "aten.view", "aten.promote_types")}


def check_writes_everything(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], inputs: Sequence[Any]
) -> None:
    """With uninitialised memory full of NaN, the results must be the same as without."""
    clean = outputs_and_gradients(function, inputs)

    def poisoned(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            tensor = empty(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return call

    with monkeypatch.context() as patch:
        for name in ("empty", "empty_like"):
            patch.setattr(torch, name, poisoned(getattr(torch, name)))
        dirty = outputs_and_gradients(function, inputs)
    assert_same(dirty, clean)
