"""What results are judged by: the definition in float64, and the errors of plain PyTorch in the inputs' precision.

A result may be off by a small factor times what plain PyTorch is off in the same precision, plus a rounding: in its
largest error, and in the root of its mean squared error, which shows a mistake that touches every number a little.
Peers may also sum thousands of terms in float32 in any order; ours may not lose more by that than plain PyTorch does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .candidate import PLAIN, Candidate, Function, leaf, outputs_and_gradients

if TYPE_CHECKING:
    from .contest import Case

SUMMATION = 512 * torch.finfo(torch.float32).eps  # of the result: a sum of 10⁴ rows, one after the other
Norm = Callable[[Tensor], Tensor]
NORMS: dict[str, Norm] = {"": lambda x: x.abs().max(), ", rms": lambda x: x.square().mean().sqrt()}


@dataclass(frozen=True)
class Truth:
    """What results are compared with: exact values by name, the errors allowed, and which part is compared."""

    exact: Mapping[str, Tensor]
    allowed: Mapping[str, float]
    part: Callable[[str, Tensor], Tensor] = lambda _, x: x

    def errors(self, results: Mapping[str, Tensor], slack: float = 0.0) -> dict[str, dict[str, float]]:
        """Both errors of each result, and what is allowed: ``slack`` times the exact result more than to ours.

        A result that is missing (but for a gradient, of a candidate without a backward pass) or has a NaN or an
        infinity anywhere, also outside the part that is compared, is off by the largest number: JSON knows neither.
        """
        found = {}
        for name, exact in self.exact.items():
            missing = name not in results
            if (missing and name.startswith("gradient")) or not exact.numel():  # an empty stream has no numbers
                continue
            broken = missing or not bool(results[name].isfinite().all())
            difference = None if broken else self.part(name, results[name]) - exact
            for suffix, norm in NORMS.items():
                error = torch.finfo(exact.dtype).max if broken else float(norm(difference))
                found[name + suffix] = {
                    "error": error,
                    "allowed": self.allowed[name + suffix] + slack * float(norm(exact)),
                }
        return found


def allowances(exact: Mapping[str, Tensor], plain: Mapping[str, Tensor], factor: float) -> dict[str, float]:
    """The errors allowed for each result: ``factor`` times those of ``plain``, plus one rounding."""
    allowed = {}
    for name, value in exact.items():
        if value.numel():
            rounding = torch.finfo(plain[name].dtype).eps
            for suffix, norm in NORMS.items():
                allowed[name + suffix] = float(factor * norm(plain[name] - value) + rounding * norm(value))
    return allowed


def whole(exact: Function, *, factor: float = 2.0) -> Callable[[Case, tuple[Tensor, ...]], Truth]:
    """The judge of cases whose definition is affordable: all of ``exact``'s results in float64.

    ``factor``: how many times the error of plain PyTorch in the inputs' precision is allowed, as in the op's tests.
    """

    def truth(case: Case, inputs: tuple[Tensor, ...]) -> Truth:
        wide = tuple(leaf(x.double() if x.is_floating_point() else x, x.requires_grad) for x in inputs)
        plain = case.candidates[PLAIN]()
        plain = plain if isinstance(plain, Candidate) else Candidate(plain)
        true = outputs_and_gradients(Candidate(exact), wide)
        return Truth(true, allowances(true, outputs_and_gradients(plain, inputs), factor))

    return truth
