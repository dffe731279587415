"""The cases of the op benchmarks in pytest-benchmark's table: ``pytest benchmarks -k alignment_loss``.

One test per case, direction and candidate, at the sizes of a quick run, on the GPU where there is one. Times come from
pytest-benchmark, without turns between competitors; judging is left to ``unigendet bench``.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from .candidate import Candidate, calls
from .contest import Case
from .harness import CannotRun, synchronize
from .record import OPS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES: list[Case] = [
    case for name in OPS for case in importlib.import_module(f"{__package__}.{name}").cases(DEVICE, "quick")
]
COMBINATIONS = [(case, direction, name) for case in CASES for direction in case.work for name in case.candidates]


@pytest.mark.parametrize(
    ("case", "direction", "name"),
    COMBINATIONS,
    ids=["-".join(filter(None, (c.op, c.trace, direction, name))) for c, direction, name in COMBINATIONS],
)
def test_speed(benchmark, case, direction, name):
    """Time one candidate."""
    benchmark.group = f"{case.title}, {direction}"
    try:
        made = case.candidates[name]()
        candidate = made if isinstance(made, Candidate) else Candidate(made)
        (call,) = calls(candidate, [case.inputs(0)], direction)
    except CannotRun as error:
        pytest.skip(str(error))  # a peer that is not installed or that this device does not run

    def once() -> None:
        call()
        synchronize(DEVICE)

    once()  # compiles, where that waits for the first call
    benchmark(once)
