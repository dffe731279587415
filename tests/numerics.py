"""Derived tolerances: how accurate an implementation must be, measured against float64 and against plain PyTorch.

No test of an op states a tolerance of its own. :func:`assert_accurate` runs three functions on the same inputs:

- ``exact`` on the inputs converted to float64: the truth;
- ``plain``, the op written as anyone would in PyTorch, in the inputs' own precision: how large errors are anyway;
- ``candidate``, what is tested, in the inputs' own precision.

For every output and every gradient, the largest error of ``candidate`` may be ``factor`` times that of ``plain``, plus
one rounding of the largest exact value (so that a plain version that happens to be exact does not forbid a rounding).
For float64 inputs, where the truth is rounded too, it is 64 roundings. Errors are the largest over a few incoming
gradients, because a gradient of few numbers, such as a sum over everything, can be exact by luck.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def outputs_and_gradients(
    function: Callable[..., Any], inputs: Sequence[Any], seed: int = 0
) -> dict[str, Tensor | None]:
    """Call ``function(*inputs)`` and differentiate it for the inputs that require a gradient.

    The incoming gradients are random numbers that depend on the outputs' shapes and ``seed`` only, rounded to bfloat16
    so that they are the same in every precision. Returns detached tensors: "output i" and "gradient of input i".
    """
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    leaves = {i: x for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad}
    if leaves:
        generator = torch.Generator().manual_seed(seed)
        incoming = [torch.randn(o.shape, generator=generator).bfloat16().to(o.device, o.dtype) for o in outputs]
        differentiable = [i for i, output in enumerate(outputs) if output.requires_grad]
        gradients = torch.autograd.grad(
            [outputs[i] for i in differentiable],
            list(leaves.values()),
            [incoming[i] for i in differentiable],
            allow_unused=True,
        )
        results |= {f"gradient of input {i}": g for i, g in zip(leaves, gradients, strict=True)}
    return results


def in_float64(value: Any) -> Any:
    """Return a float64 leaf with the same numbers and ``requires_grad`` for a floating tensor, else ``value``."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def assert_accurate(
    candidate: Callable[..., Any],
    plain: Callable[..., Any],
    exact: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    factor: float = 2.0,
    seeds: int = 3,
) -> None:
    """Assert that every output and gradient of ``candidate`` is about as accurate as ``plain``'s; see the module.

    All three take ``*inputs`` and return a tensor or a tuple of tensors. Dtypes and shapes of ``candidate`` must be
    those of ``plain``. ``seeds`` is the number of incoming gradients tried.
    """
    runs = []
    for seed in range(seeds):
        tested = outputs_and_gradients(candidate, inputs, seed)
        expected = outputs_and_gradients(plain, inputs, seed)
        truth = outputs_and_gradients(exact, [in_float64(x) for x in inputs], seed)
        assert tested.keys() == expected.keys() == truth.keys()
        runs.append((tested, expected, truth))
    for name, value in runs[0][0].items():
        like = runs[0][1][name]
        assert value is not None, f"{name} is missing"
        assert value.shape == like.shape, f"{name}: shape {list(value.shape)} instead of {list(like.shape)}"
        assert value.dtype == like.dtype, f"{name}: {value.dtype} instead of {like.dtype}"
        if value.numel() == 0:
            continue
        error = max(_largest(tested[name].double() - truth[name]) for tested, _, truth in runs)
        usual = max(_largest(expected[name].double() - truth[name]) for _, expected, truth in runs)
        size = max(_largest(truth[name]) for _, _, truth in runs)
        rounding = (64 if value.dtype == torch.float64 else 1) * torch.finfo(value.dtype).eps * size
        message = f"{name}: error {error:.3g}, of plain PyTorch {usual:.3g}, rounding {rounding:.3g}"
        assert error <= factor * usual + rounding, message


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()
