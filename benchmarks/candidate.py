"""Candidates: implementations of an op as functions of its inputs, and what is called of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unigendet.ops.backends import resolve

from .harness import CannotRun

PLAIN = "eager"  # the candidate that says how large errors are anyway
Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Candidate:
    """A function of the inputs, and what is not timed about it.

    ``arrange`` brings a tensor of inputs into its own layout, ``restore`` outputs and gradients back. ``parameters``
    get gradients too, which are computed but not judged. ``inseparable``: why its backward pass cannot be timed alone;
    ``forward_only``: why it has none.
    """

    function: Function
    arrange: Callable[[Tensor], Tensor] = lambda x: x
    restore: Callable[[Tensor], Tensor] = lambda x: x
    parameters: tuple[Tensor, ...] = ()
    inseparable: str | None = None
    forward_only: str | None = None


def leaf(x: Tensor, requires_grad: bool) -> Tensor:
    """``x`` outside any graph."""
    return x.detach().requires_grad_(requires_grad)


def incoming(outputs: Sequence[Tensor]) -> list[Tensor]:
    """1 for a loss, random numbers for others: the same in every precision."""
    generator = torch.Generator(outputs[0].device).manual_seed(0)
    make = lambda x: torch.randn(x.shape, generator=generator, device=x.device).bfloat16().to(x.dtype)  # noqa: E731
    return [torch.ones_like(x) if x.dim() == 0 else make(x) for x in outputs]


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _arranged(candidate: Candidate, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The inputs in a candidate's own layout, as leaves."""
    backward = candidate.forward_only is None
    return tuple(leaf(candidate.arrange(x.detach()), x.requires_grad and backward) for x in inputs)


def _arranged_incoming(candidate: Candidate, outputs: Sequence[Tensor]) -> list[Tensor]:
    return [candidate.arrange(x) for x in incoming([candidate.restore(o.detach()) for o in outputs])]


def outputs_and_gradients(candidate: Candidate, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Outputs and the gradients of the inputs that want one, by name, in the layout of the inputs."""
    own = _arranged(candidate, inputs)
    outputs = _tuple(candidate.function(*own))
    results = {f"output {i}": candidate.restore(x.detach()) for i, x in enumerate(outputs)}
    leaves = {i: x for i, x in enumerate(own) if x.requires_grad}
    if leaves:
        gradients = torch.autograd.grad(outputs, list(leaves.values()), _arranged_incoming(candidate, outputs))
        results |= {f"gradient {i}": candidate.restore(x) for i, x in zip(leaves, gradients, strict=True)}
    return results


def calls(candidate: Candidate, sets: Sequence[tuple[Tensor, ...]], direction: str) -> list[Callable[[], Any]]:
    """What is timed, for each set of inputs."""
    function = candidate.function
    arranged = [_arranged(candidate, own) for own in sets]
    if direction == "forward":
        return [lambda own=own: _without_gradients(function, own) for own in arranged]
    missing = candidate.forward_only or (candidate.inseparable if direction == "backward" else None)
    if missing is not None:
        raise CannotRun(missing)
    made = []
    for own in arranged:
        leaves = [x for x in own if x.requires_grad] + list(candidate.parameters)
        outputs = _tuple(function(*own))
        incoming = _arranged_incoming(candidate, outputs)
        if direction == "backward":
            call = lambda o=outputs, n=leaves, g=incoming: torch.autograd.grad(o, n, g, retain_graph=True)  # noqa: E731
        else:
            call = lambda own=own, n=leaves, g=incoming: torch.autograd.grad(_tuple(function(*own)), n, g)  # noqa: E731
        made.append(call)
    return made


def _without_gradients(function: Function, inputs: tuple[Tensor, ...]) -> Any:
    with torch.no_grad():
        return function(*inputs)


def compiled(function: Function) -> Callable[[], Function]:
    """torch.compile's version of a peer."""
    return lambda: torch.compile(function, dynamic=False)


def ours(op: str, backend: str, device: torch.device, dtype: torch.dtype, function: Function) -> Callable[[], Function]:
    """A backend of an op, if it can run this on this machine."""

    def make() -> Function:
        try:
            resolve(op, backend, *[torch.empty(1, 1, device=device, dtype=dtype)] * 3)
        except ValueError as error:
            raise CannotRun(why_not(error)) from error
        return function

    return make


def why_not(error: ValueError) -> str:
    """The end of ``resolve``'s message: the op and the backend are the row's already."""
    return str(error).rpartition(" cannot run ")[2].partition(": ")[2] or str(error)


def raise_if_not_cuda(device: torch.device) -> None:
    """For peers that have nothing for CPUs."""
    if device.type != "cuda":
        raise CannotRun("needs a CUDA device")


def dtype_name(dtype: torch.dtype) -> str:
    """``float32``."""
    return str(dtype).removeprefix("torch.")
