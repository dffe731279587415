"""What the benchmarks of ops that are bound by memory traffic share: cases, competitors in turns, rows.

A case is an op on one shape: random inputs, the bytes that have to be moved in each direction, and competitors, which
are functions of the inputs. All competitors of a case are timed in turns on the same inputs. GB/s count those bytes
only, whatever a competitor moves besides. Every result is compared with the definition in float64; where its error is
more than twice that of plain PyTorch in the inputs' own precision, plus a rounding, the row says that it is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks.harness import (
    CannotRun,
    Record,
    buffer_sets,
    ceilings,
    default_path,
    environment,
    first_call,
    measure_paired,
    peak_mib,
    reason,
    show_header,
)
from unigendet.ops.backends import resolve

COLUMNS = (
    *("op", "shape", "dtype", "direction", "backend", "ms", "gbs", "of_copy", "of_matmul", "peak_mib", "correct"),
    "status",
)
ERROR_FACTOR = 2.0  # as in the tests of these ops
PLAIN = "eager"  # the competitor that says how large errors are anyway
Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """An op on one shape.

    ``inputs(seed)`` gives tensors, those that require it with gradients wanted; ``work`` the bytes to move by direction
    ("forward", "backward", "both"), which also says what is measured; ``candidates`` by name what makes a function of
    the inputs, or raises ``CannotRun``; ``peers`` are the candidates that are not ours; ``exact`` is the definition.
    """

    op: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[int], tuple[Tensor, ...]]
    work: Mapping[str, float]
    candidates: Mapping[str, Callable[[], Function]]
    peers: frozenset[str]
    exact: Function
    flops: Mapping[str, float] = field(default_factory=dict)  # of matrix products, by direction


@dataclass(frozen=True)
class Contender:
    """A candidate that ran: its function and what its first results were worth."""

    function: Function
    first_call_s: float
    errors: Mapping[str, Mapping[str, float]]


def main(
    name: str,
    description: str,
    cases: Callable[[torch.device, bool], Iterable[Case]],
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a benchmark's command. Returns 0, 1 if a result of ours was wrong or failed, 130 if interrupted."""
    options = _parse(name, description, arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() and not options.tiny else "cpu"))
    limits = ceilings(device, tiny=options.tiny)
    settings = {"seconds": options.seconds, "threads": torch.get_num_threads()}
    path = options.json or (None if options.tiny else default_path(name, device))
    header = {"op": name, "environment": environment(device), "ceilings": limits, "settings": settings}
    record = Record(path, header, COLUMNS)
    print(", ".join(f"{name} {value:.4g}" for name, value in limits.items()))
    show_header(COLUMNS)
    try:
        for case in cases(device, options.tiny):
            if not options.ops or case.op in options.ops:
                run_case(record, case, device, options.seconds, limits)
        record.complete = True
    except KeyboardInterrupt:
        print("interrupted; what is done is kept")
        return 130
    finally:
        record.write()
    return int(any(row["correct"] is False or row["status"].startswith("failed") for row in record.rows if row["ours"]))


def _parse(name: str, description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--ops", nargs="+", metavar="NAME", help="only cases of these ops")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the rows")
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU, to try the program itself")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for one measurement (default 1)")
    return parser.parse_args(arguments)


def run_case(record: Record, case: Case, device: torch.device, seconds: float, limits: Mapping[str, float]) -> None:
    """A row for each candidate and direction, whatever happens."""
    torch._dynamo.reset()
    inputs = [case.inputs(0)]
    size = sum(x.numel() * x.element_size() for x in inputs[0])
    inputs += [case.inputs(seed) for seed in range(1, buffer_sets(size, device))]
    # A compiled graph whose backward pass is timed alone must keep what it saved.
    with torch._functorch.config.patch(donated_buffer="backward" not in case.work):
        contenders, failures = _contenders(case, inputs[0], device)
        for direction in case.work:
            _run_direction(record, case, direction, contenders, dict(failures), inputs, device, seconds, limits)
            gc.collect()


def _run_direction(
    record: Record,
    case: Case,
    direction: str,
    contenders: Mapping[str, Contender],
    failures: dict[str, str],
    inputs: Sequence[tuple[Tensor, ...]],
    device: torch.device,
    seconds: float,
    limits: Mapping[str, float],
) -> None:
    calls, peaks = {}, {}
    for name, contender in contenders.items():
        try:
            calls[name] = _calls(contender.function, inputs, direction)
            calls[name][0]()  # compiles, where that waits for the first call
            peaks[name] = peak_mib(calls[name][0], device)
        except Exception as error:
            calls.pop(name, None)
            failures[name] = reason(error)
    timings = measure_paired(calls, device, seconds=seconds) if calls else {}
    for name in case.candidates:
        row = {"op": case.op, "shape": case.shape, "dtype": str(case.dtype).removeprefix("torch.")}
        row |= {"direction": direction, "backend": name, "ours": name not in case.peers}
        if name in failures:
            record.add(**row, status=failures[name], ms=None, correct=None)
            continue
        timing, errors = timings[name], _of_direction(contenders[name].errors, direction)
        gbs = case.work[direction] / timing.ms / 1e6
        row |= {"gbs": gbs, "of_copy": gbs / limits["copy_gbs"], "peak_mib": peaks[name], "error": errors}
        if direction in case.flops:
            row["tflops"] = case.flops[direction] / timing.ms / 1e9
            row["of_matmul"] = row["tflops"] / limits["matmul_tflops"]
        if name not in case.peers:
            row["speedup_over"] = {peer: timings[peer].ms / timing.ms for peer in case.peers if peer in timings}
        correct = all(e["error"] <= e["allowed"] for e in errors.values())
        first = contenders[name].first_call_s
        record.add(**row, status="ok", correct=correct, first_call_s=first, **dataclasses.asdict(timing))


def _contenders(
    case: Case, inputs: tuple[Tensor, ...], device: torch.device
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Call every candidate once and judge it; whoever fails is told why."""
    contenders, failures = {}, {}
    wide = tuple(_leaf(x.double() if x.is_floating_point() else x, x.requires_grad) for x in inputs)
    exact = outputs_and_gradients(case.exact, wide)
    plain = outputs_and_gradients(case.candidates[PLAIN](), inputs)
    allowed = {}
    for name, value in exact.items():
        rounding = torch.finfo(plain[name].dtype).eps * float(value.abs().max())
        allowed[name] = ERROR_FACTOR * float((plain[name] - value).abs().max()) + rounding
    for name, make in case.candidates.items():
        try:
            function = make()
            results, seconds = first_call(lambda f=function: outputs_and_gradients(f, inputs), device)
            errors = {
                key: {"error": float((results[key] - value).abs().max()), "allowed": allowed[key]}
                for key, value in exact.items()
            }
            contenders[name] = Contender(function, seconds, errors)
        except Exception as error:  # also of a peer's compiler, or out of memory: the next may still run
            failures[name] = reason(error)
    return contenders, failures


def _of_direction(errors: Mapping[str, Any], direction: str) -> dict[str, Any]:
    prefix = {"forward": "output", "backward": "gradient"}.get(direction, "")
    return {name: value for name, value in errors.items() if name.startswith(prefix)}


def _leaf(x: Tensor, requires_grad: bool) -> Tensor:
    return x.detach().requires_grad_(requires_grad)


def _incoming(outputs: Sequence[Tensor]) -> list[Tensor]:
    """1 for a loss, random numbers for others: the same in every precision."""
    generator = torch.Generator(outputs[0].device).manual_seed(0)
    make = lambda x: torch.randn(x.shape, generator=generator, device=x.device).bfloat16().to(x.dtype)  # noqa: E731
    return [torch.ones_like(x) if x.dim() == 0 else make(x) for x in outputs]


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def outputs_and_gradients(function: Function, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Outputs and the gradients of the inputs that want one, by name."""
    outputs = _tuple(function(*inputs))
    results = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    leaves = {i: x for i, x in enumerate(inputs) if x.requires_grad}
    if leaves:
        gradients = torch.autograd.grad(outputs, list(leaves.values()), _incoming(outputs))
        results |= {f"gradient {i}": x for i, x in zip(leaves, gradients, strict=True)}
    return results


def _calls(function: Function, sets: Sequence[tuple[Tensor, ...]], direction: str) -> list[Callable[[], Any]]:
    """What is timed, for each set of inputs."""
    if direction == "forward":
        return [lambda own=own: _without_gradients(function, own) for own in sets]
    calls = []
    for own in sets:
        leaves = [x for x in own if x.requires_grad]
        outputs = _tuple(function(*own))
        incoming = _incoming(outputs)
        if direction == "backward":
            call = lambda o=outputs, n=leaves, g=incoming: torch.autograd.grad(o, n, g, retain_graph=True)  # noqa: E731
        else:
            call = lambda own=own, n=leaves, g=incoming: torch.autograd.grad(_tuple(function(*own)), n, g)  # noqa: E731
        calls.append(call)
    return calls


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
            raise CannotRun(str(error)) from error
        return function

    return make
