"""What the ops must reach, beside what they reached.

The targets of GPUs are for the class of the H100 and H200 in bfloat16, attention's with 28 query heads, 4 key/value
heads and head_dim 128, over useful work only. They were set before anything was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .recorded import HEADLINE_TRACE, Case, Device, Result, Row, ran, usable, wrong


@dataclass(frozen=True)
class Measure:
    """A number that a target bounds, with its unit in words."""

    unit: str
    value: Callable[[Result, Case, Row], float | None]
    at_most: bool = False

    def show(self, value: float) -> str:
        """The number with its unit."""
        digits = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        return f"{digits}{'' if self.unit.startswith('×') else ' '}{self.unit}"


def _of_matmul(result: Result, case: Case, row: Row) -> float | None:
    rate = row.get("tflops")
    return None if rate is None else rate / result.ceilings["matmul_tflops"]


def _of_copy(result: Result, case: Case, row: Row) -> float | None:
    rate = row.get("gbs")
    return None if rate is None else rate / result.ceilings["copy_gbs"]


def _over(peer: str) -> Measure:
    return Measure(f"× {peer}", lambda result, case, row: case.speedups(row).get(peer))


def _peak_share(result: Result, case: Case, row: Row) -> float | None:
    peer = case.row_of("published")
    if peer is None or not usable(peer) or not peer.get("peak_mib") or row.get("peak_mib") is None:
        return None
    return row["peak_mib"] / peer["peak_mib"]


OF_MATMUL = Measure("of the matrix product's rate", _of_matmul)
OF_COPY = Measure("of copy bandwidth", _of_copy)
MFU = Measure("of the matrix product's rate (MFU)", lambda result, case, row: row.get("mfu"))
PEAK = Measure("of the published way's peak memory", _peak_share, at_most=True)
USEFUL = Measure("of launched work", lambda result, case, row: row.get("useful_share"))
MILLISECONDS = Measure("ms", lambda result, case, row: row["ms"], at_most=True)


@dataclass(frozen=True)
class Target:
    """A bound on one number of some cases. ``backend`` None: the best of ours; ``direction`` or ``dtype`` None: any."""

    name: str
    benchmark: str
    op: str
    measure: Measure
    limit: float
    backend: str | None = None
    direction: str | None = None
    trace: str | None = None
    shape: str = ""  # what the shape's text begins with
    dtype: str | None = None

    @property
    def bound(self) -> str:
        """The bound in words."""
        return f"{'≤' if self.measure.at_most else '≥'} {self.measure.show(self.limit)}"

    def outcome(self, device: Device) -> tuple[str, str]:
        """What the device reached, in words (a range over several cases), and the verdict, on the worst of them."""
        result = device.results.get(self.benchmark)
        cases = [] if result is None else [case for case in result.cases() if self._covers(case)]
        rows = [(case, row) for case in cases if (row := self._row(case)) is not None]
        stale = " (**stale**)" if result is not None and result.stale else ""
        if any(wrong(row) for _, row in rows):
            return "**wrong**" + stale, "not reached"
        values = [v for case, row in rows if usable(row) and (v := self.measure.value(result, case, row)) is not None]
        if not values:
            return ("did not run" + stale if any(not ran(row) for _, row in rows) else "not measured"), ""
        low, high = (self.measure.show(value) for value in (min(values), max(values)))
        shown = high if low == high else f"{low.split(' ')[0]}–{high}"
        good = max(values) <= self.limit if self.measure.at_most else min(values) >= self.limit
        return shown + stale, "reached" if good else "not reached"

    def _covers(self, case: Case) -> bool:
        wanted = ((self.trace, case.trace), (self.direction, case.direction), (self.dtype, case.dtype))
        return (
            case.op == self.op
            and all(mine is None or mine == own for mine, own in wanted)
            and case.shape.startswith(self.shape)
        )

    def _row(self, case: Case) -> Row | None:
        if self.backend is not None:
            return case.row_of(self.backend)
        return case.best() or next((row for row in case.rows if row["ours"]), None)


def _attention(name: str, backend: str, direction: str, measure: Measure, limit: float) -> Target:
    choice = {"direction": direction, "trace": HEADLINE_TRACE, "dtype": "bfloat16"}
    return Target(f"attention, {name}", "attention", "symbiotic_attention", measure, limit, backend, **choice)


def _rows(op: str, benchmark: str) -> Target:
    return Target(f"{op}, each direction", benchmark, op, OF_COPY, 0.85, dtype="bfloat16")


def _alignment(measure: Measure, limit: float) -> Target:
    choice = {"direction": "both", "dtype": "bfloat16"}
    return Target("alignment_loss, forward and backward", "alignment_loss", "alignment_loss", measure, limit, **choice)


def _step(measure: Measure, limit: float) -> Target:
    choice = {"shape": "BAGEL-7B width", "dtype": "bfloat16"}
    return Target("GDUF step at BAGEL-7B's width", "training_step", "gduf_step", measure, limit, **choice)


HOPPER: Sequence[Target] = (
    _attention("Triton, forward", "triton", "forward", OF_MATMUL, 0.55),
    _attention("Triton, backward, deterministic", "triton", "backward", OF_MATMUL, 0.33),
    _attention("Triton, backward, atomic dq", "triton_atomic", "backward", OF_MATMUL, 0.42),
    _attention("Triton, forward and backward", "triton", "both", _over("flex"), 1.5),
    _attention("CUDA, forward", "cuda", "forward", OF_MATMUL, 0.80),
    _attention("CUDA, backward, deterministic", "cuda", "backward", OF_MATMUL, 0.50),
    _attention("CUDA, backward, atomic dq", "cuda_atomic", "backward", OF_MATMUL, 0.62),
    _attention("CUDA, forward and backward", "cuda", "both", _over("flex"), 2.0),
    _alignment(OF_COPY, 0.85),
    _alignment(_over("eager"), 6.0),
    _alignment(_over("torch.compile"), 2.5),
    _rows("qk_norm_rope", "qk_norm_rope"),
    _rows("rms_norm", "rms_norm"),
    _rows("swiglu", "swiglu"),
    _rows("flow_matching", "flow_matching"),
    _rows("flow_matching_loss", "flow_matching"),
    _step(_over("published"), 1.8),
    _step(MFU, 0.50),
    _step(PEAK, 0.60),
)
CPU: Sequence[Target] = (
    Target(
        "alignment_loss in C++, forward and backward", "alignment_loss", "alignment_loss", _over("eager"), 15.0, "cpp",
        "both",
    ),
    Target("tile schedule of 64k tokens", "packing_cost", "tile_schedule", MILLISECONDS, 5.0, trace="gduf_64k"),
    *(Target(f"useful work, {trace}", "packing_cost", "tile_schedule", USEFUL, 0.90, trace=trace,
             shape="tiles of 128 x 128") for trace in ("gduf_32k", "gduf_64k")),
    Target("GDUF step, quickstart width", "training_step", "gduf_step", _over("published"), 2.0,
           trace="many_small_16k", shape="quickstart width"),
    Target("GDUF step, hidden 512, 4 layers", "training_step", "gduf_step", _over("published"), 1.5, trace="gduf_4k"),
)  # fmt: skip
