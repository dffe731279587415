"""The attention benchmark: ``python -m benchmarks.attention``.

Runs every backend of ``symbiotic_attention`` and its peers over the standard traces, in bfloat16 with 28 query heads,
4 key/value heads and head_dim 128, and writes ``benchmarks/results/<device>/attention.json``. TFLOP/s count useful work
only: 4·head_dim·heads for every visible pair forward, 2.5 times that backward. The ceilings of the same machine stand
beside them: its matrix product, its copy, and cuDNN's dense attention. Every result is compared, on the smallest
sample of the trace and one group of heads, with the definition in float32; where its error is more than four times that
of plain PyTorch in the same precision, plus a rounding, the row says that it is wrong.

``--tiny`` runs a pack of a few dozen tokens in float32 on the CPU, to try the program itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import traces
from benchmarks.attention_candidates import CANDIDATES, PEERS, Candidate, Case, Inputs, Prepared, cudnn_dense
from benchmarks.harness import (
    CannotRun,
    Record,
    buffer_sets,
    ceilings,
    default_path,
    environment,
    first_call,
    measure,
    peak_mib,
    reason,
    show_header,
)
from unigendet.layout import Layout
from unigendet.ops import symbiotic_attention
from unigendet.ops import symbiotic_attention_flash as flash

OP = "symbiotic_attention"
TRACES = ("gduf_32k", "diga_23k", "gduf_64k", "text_only_8k")
DIRECTIONS = {"forward": 1.0, "backward": 2.5, "both": 3.5}  # work, in units of the forward pass
ERROR_FACTOR = 4.0  # as in the tests of attention
DENSE_LENGTHS = (8192, 16384)


@dataclasses.dataclass
class Run:
    """What all rows of a run share."""

    record: Record
    directions: Sequence[str]
    seconds: float
    deadline: float
    matmul_tflops: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, 1 if a result was wrong, 130 if interrupted."""
    options = _parse(arguments)
    device = torch.device("cpu" if options.tiny else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --tiny runs on the CPU")
    shape = (torch.float32, 4, 2, 16) if options.tiny else (torch.bfloat16, 28, 4, 128)
    path = options.json or (None if options.tiny else default_path("attention", device))
    limits = ceilings(device, tiny=options.tiny)
    settings = {"heads": shape[1], "kv_heads": shape[2], "head_dim": shape[3], "seconds": options.seconds}
    header = {"op": OP, "environment": environment(device), "ceilings": limits, "settings": settings}
    if device.type == "cuda":
        settings["flash_library"] = _flash_library(device)
    record = Record(path, header)
    run = Run(record, options.directions, options.seconds, time.monotonic() + options.limit, limits["matmul_tflops"])
    print(", ".join(f"{name} {value:.4g}" for name, value in limits.items()))
    show_header()
    try:
        run_dense(run, device, shape, (64,) if options.tiny else DENSE_LENGTHS)
        for name in ("tiny",) if options.tiny else options.traces:
            trace = traces.tiny() if options.tiny else traces.trace(name)
            run_case(run, Case(trace, device, *shape), options.backends)
        record.complete = True
    except KeyboardInterrupt:
        print("interrupted; what is done is kept")
        return 130
    finally:
        record.write()
    return int(any(row["correct"] is False for row in record.rows))


def _flash_library(device: torch.device) -> str:
    try:
        return flash.library(torch.device(device.type, torch.cuda.current_device())).name
    except (ImportError, ValueError) as error:
        return reason(error)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__.partition("\n")[0])
    several = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--traces", choices=traces.NAMES, default=list(TRACES), help=", ".join(traces.NAMES), **several)
    parser.add_argument("--backends", choices=CANDIDATES, help=", ".join(CANDIDATES), **several)
    parser.add_argument("--directions", choices=DIRECTIONS, default=list(DIRECTIONS), nargs="+")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the rows")
    parser.add_argument("--tiny", action="store_true", help="a tiny pack on the CPU")
    parser.add_argument("--seconds", type=float, default=0.3, help="time for one measurement (default 0.3)")
    parser.add_argument("--limit", type=float, default=280, help="seconds after which nothing new is begun (280)")
    options = parser.parse_args(arguments)
    if options.backends is None:  # the torch backend is for machines without kernels
        options.backends = [name for name in CANDIDATES if options.tiny or name != "torch"]
    return options


def run_case(run: Run, case: Case, backends: Sequence[str]) -> None:
    """All rows of one trace."""
    first = len(run.record.rows)
    torch._dynamo.reset()  # compiled graphs of other traces count towards a limit
    truth = Truth.of(case)
    pairs = case.layout.visible_pairs()
    for name in backends:
        measure_candidate(run, case, case.trace.name, name, CANDIDATES[name], pairs, truth)
    add_speedups(run.record.rows[first:])
    run.record.write()


def run_dense(run: Run, device: torch.device, shape: tuple[torch.dtype, int, int, int], lengths: Sequence[int]) -> None:
    """cuDNN over one dense sequence."""
    dtype, heads, _, head_dim = shape
    for length in lengths:
        for causal in (False, True):
            mode = "causal" if causal else "full"
            trace = traces.Trace(f"dense_{mode}_{length}", ((traces.Segment(length, mode),),))
            case = Case(trace, device, dtype, heads, heads, head_dim)
            candidate = lambda case, causal=causal: cudnn_dense(case, causal=causal)  # noqa: E731
            measure_candidate(run, case, trace.name, "cudnn", candidate, case.layout.visible_pairs(), None)


def measure_candidate(
    run: Run, case: Case, trace: str, name: str, candidate: Candidate, pairs: int, truth: Truth | None
) -> None:
    """A row for each direction, whatever happens."""
    common = {"op": OP, "trace": trace, "dtype": str(case.dtype).removeprefix("torch."), "backend": name}
    attempt, failure, errors = None, None, {}
    try:
        if time.monotonic() > run.deadline:
            raise CannotRun("the time limit of the run was reached")
        attempt = Attempt.start(case, candidate, backward=run.directions != ["forward"])
        errors = {} if truth is None else truth.errors(attempt)
    except Exception as error:  # also of a peer's compiler, or out of memory: the next may still run
        failure = reason(error)
    for direction in run.directions:
        row = {"status": failure, "ms": None, "correct": None}
        try:
            if attempt is not None:
                row = attempt.row(run, direction, pairs, errors)
        except Exception as error:
            row["status"] = reason(error)
        run.record.add(**common, direction=direction, **row)
    del attempt
    gc.collect()
    if case.device.type == "cuda":
        torch.cuda.empty_cache()


@dataclasses.dataclass
class Attempt:
    """A candidate on its sets of buffers, after its first call."""

    case: Case
    sets: list[Prepared]
    outs: list[Tensor]
    grads: tuple[Tensor, ...] | None
    no_backward: str | None  # why there are no gradients
    first_call_s: dict[str, float]

    @classmethod
    def start(cls, case: Case, candidate: Candidate, *, backward: bool) -> Attempt:
        """Prepare and call once; ``setup`` is what a candidate does once per pack, such as building a mask."""
        prepare, setup_s = first_call(lambda: candidate(case), case.device)
        inputs = [case.inputs(seed=0)]
        size = sum(x.numel() * x.element_size() for x in vars(inputs[0]).values())
        inputs += [case.inputs(seed) for seed in range(1, buffer_sets(size, case.device))]
        sets = [prepare(x) for x in inputs]
        out, forward_s = first_call(sets[0].forward, case.device)
        seconds = {"setup": setup_s, "forward": forward_s}
        grads, no_backward = None, None
        try:
            if backward:
                grads, seconds["backward"] = first_call(lambda: sets[0].backward(out), case.device)
        except Exception as error:  # the forward pass is still worth a row
            no_backward = reason(error)
        return cls(case, sets, [out, *(s.forward() for s in sets[1:])], grads, no_backward, seconds)

    def calls(self, direction: str) -> list[Callable[[], Any]]:
        """What is timed, for each set of buffers."""
        if direction == "backward":
            return [lambda s=s, out=out: s.backward(out) for s, out in zip(self.sets, self.outs, strict=True)]
        return [s.forward if direction == "forward" else s.both for s in self.sets]

    def row(self, run: Run, direction: str, pairs: int, errors: dict[str, dict[str, float]]) -> dict[str, Any]:
        """Time one direction."""
        if direction != "forward" and self.no_backward is not None:
            return {"status": self.no_backward, "ms": None, "correct": None}
        if direction == "backward" and self.sets[0].masks_in_forward:
            raise CannotRun("the mask is built in the forward pass; see the other directions")
        calls, device = self.calls(direction), self.case.device
        peak = peak_mib(calls[0], device)
        timing = measure(calls, device, seconds=run.seconds)
        work = 4 * self.case.head_dim * self.case.heads * pairs * DIRECTIONS[direction]
        tflops = work / timing.ms / 1e9
        names = {"forward": ("out",), "backward": ("dq", "dk", "dv")}.get(direction, ("out", "dq", "dk", "dv"))
        found = {name: errors[name] for name in names if name in errors}
        return {
            "status": "ok",
            **dataclasses.asdict(timing),
            "tflops": tflops,
            "of_matmul": tflops / run.matmul_tflops,
            "peak_mib": peak,
            "first_call_s": self.first_call_s,
            "error": found,
            "correct": all(e["error"] <= e["allowed"] for e in found.values()) if found else None,
        }


@dataclasses.dataclass(frozen=True)
class Truth:
    """What a trace's smallest sample and one group of heads give in float32, and how far off others may be."""

    rows: slice
    heads: slice
    group: int
    exact: dict[str, Tensor]
    allowed: dict[str, float]

    @classmethod
    def of(cls, case: Case) -> Truth:
        """Of the inputs with seed 0."""
        starts = case.layout.cu_seqlens_q.tolist()
        smallest = min(range(case.layout.num_samples), key=lambda i: starts[i + 1] - starts[i])
        rows, group = slice(starts[smallest], starts[smallest + 1]), case.kv_heads - 1
        per_group = case.heads // case.kv_heads
        heads = slice(group * per_group, (group + 1) * per_group)
        layout = Layout.from_splits([case.trace.splits[smallest]]).to(case.device)
        inputs = case.inputs(seed=0)
        part = Inputs(
            inputs.q[rows, heads],
            inputs.k[rows, group : group + 1],
            inputs.v[rows, group : group + 1],
            inputs.grad[rows, heads],
        )
        reference = lambda q, k, v: symbiotic_attention(q, k, v, layout, backend="reference")  # noqa: E731
        exact = _differentiate(reference, part, torch.float32)
        plain = _differentiate(lambda q, k, v: _plain(q, k, v, layout), part, case.dtype)
        allowed = {}
        for name, value in exact.items():
            rounding = torch.finfo(case.dtype).eps * value.abs().max()
            allowed[name] = float(ERROR_FACTOR * (plain[name].float() - value).abs().max() + rounding)
        return cls(rows, heads, group, exact, allowed)

    def errors(self, attempt: Attempt) -> dict[str, dict[str, float]]:
        """Largest absolute error of each output, what is allowed, and the largest exact value."""
        standard = attempt.sets[0].standard
        found = {"out": standard(attempt.outs[0])[self.rows, self.heads]}
        if attempt.grads is not None:
            dq, dk, dv = (standard(g)[self.rows] for g in attempt.grads)
            own = slice(self.group, self.group + 1)
            found |= {"dq": dq[:, self.heads], "dk": dk[:, own], "dv": dv[:, own]}
        return {
            name: {
                "error": float((value.detach().float() - self.exact[name]).abs().max()),
                "allowed": self.allowed[name],
                "largest": float(self.exact[name].abs().max()),
            }
            for name, value in found.items()
        }


def _differentiate(function: Callable[..., Tensor], inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    q, k, v = leaves = [x.detach().to(dtype).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = function(q, k, v)
    grads = torch.autograd.grad(out, leaves, inputs.grad.to(dtype))
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def _plain(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Attention of one kv head as anyone would write it."""
    scores = torch.einsum("qhd,kd->hqk", q, k[:, 0]) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~layout.dense_mask(), float("-inf"))
    return torch.einsum("hqk,kd->qhd", scores.softmax(-1), v[:, 0])


def add_speedups(rows: Sequence[dict[str, Any]]) -> None:
    """To each measured row of ours, how many times its time each measured peer takes for the same."""
    timed = [row for row in rows if row["ms"] is not None]
    for row in timed:
        peers = [p for p in timed if p["backend"] in PEERS and p["direction"] == row["direction"]]
        if row["backend"] not in PEERS:
            row["speedup_over"] = {peer["backend"]: peer["ms"] / row["ms"] for peer in peers}


if __name__ == "__main__":
    raise SystemExit(main())
