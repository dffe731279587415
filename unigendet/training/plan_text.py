"""A plan as tables of text: for a terminal, and for documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from unigendet.device import GIB
from unigendet.training.plan import Plan
from unigendet.training.sizes import elements


@dataclass(frozen=True)
class Table:
    """Rows of a name and a value; numbers are aligned at their right."""

    title: str
    rows: tuple[tuple[str, str], ...]
    numbers: bool = False

    def lines(self) -> list[str]:
        """The title and the rows."""
        width = max((len(name) for name, _ in self.rows), default=0)
        values = max((len(value) for _, value in self.rows), default=0) if self.numbers else 0
        return [self.title, *(f"  {name:<{width}}  {value.rjust(values)}" for name, value in self.rows)]


def plan_tables(plan: Plan) -> list[Table]:
    """Everything that a plan says."""
    state, worst = sum(plan.held.values()), plan.moments[plan.worst]
    peak = {**plan.held, **worst, "together": plan.peak}
    totals = {name: state + sum(values.values()) for name, values in plan.moments.items()}
    return [
        Table("Run", tuple(_run(plan).items())),
        Table("Parameters", _parameters(plan), numbers=True),
        _bytes(f"Device memory per rank at the peak ({plan.worst}), GiB", peak),
        _bytes("Device memory at other moments, GiB", {k: v for k, v in totals.items() if k != plan.worst}),
        _bytes("Host memory per rank besides Python and its libraries, GiB", _host(plan)),
        _bytes("A checkpoint on disk, GiB", plan.disk | {"together": sum(plan.disk.values())}),
        _bytes("Communication per step and rank, GiB", plan.communication),
        Table("Verdict", (("memory", plan.verdict()), ("not included", NOT_INCLUDED))),
    ]


NOT_INCLUDED = "looks at the model, the allocator's slack, the CUDA context, workspaces of libraries, NCCL's buffers"


def plan_text(plan: Plan) -> str:
    """The tables for a terminal."""
    return "\n\n".join("\n".join(table.lines()) for table in plan_tables(plan) if table.rows)


def gib(size: float) -> str:
    """Bytes in GiB with two decimals, and more where they would show nothing."""
    return f"{size / GIB:.2f}" if size >= 0.005 * GIB else f"{size / GIB:.2g}"


def _bytes(title: str, values: Mapping[str, int]) -> Table:
    return Table(title, tuple((name, gib(size)) for name, size in values.items()), numbers=True)


def _host(plan: Plan) -> dict[str, int]:
    """How many ranks a node has is not known, so all are counted: of one node that is what it needs."""
    total, ranks = sum(plan.host.values()), plan.world_size
    everyone = {f"all {ranks} ranks, on one node or more": ranks * total} if ranks > 1 else {}
    return plan.host | {"together": total} | everyone


def _parameters(plan: Plan) -> tuple[tuple[str, str], ...]:
    rows = [(title, f"{count:,}") for title, count in plan.sizes.parts().items()]
    total, learning = elements(plan.sizes.parameters), elements(plan.sizes.learning)
    return (*rows, ("together", f"{total:,}"), ("of them learning", f"{learning:,}"))


def _run(plan: Plan) -> dict[str, str]:
    config = plan.config
    rows = {
        "stage": config.stage,
        "processes": _mesh(plan),
        "precision": _precision(plan),
        "recompute, compile": f"{config.recompute}, {'yes' if config.compile else 'no'}",
        "planned pack": plan.pack.contents(),
        "its texts": plan.pack.lengths(),
        "tokens per step": f"{plan.tokens:,} at most: {plan.world_size} processes × {config.accumulate} × "
        f"{config.loader.max_tokens:,}",
        "steps, tokens of the run": f"{config.total_steps:,}, {config.total_steps * plan.tokens:,}",
        "learning rate": _schedule(plan),
        "checkpoints": _checkpoints(plan),
        "looks": _looks(plan),
        "useful operations": f"{plan.operations:.3g} per step and rank",
    }
    return {name: value for name, value in rows.items() if value}


def _mesh(plan: Plan) -> str:
    if plan.world_size == 1:
        return "1, nothing is sharded"
    copies = f"{plan.replicate} cop{'y' if plan.replicate == 1 else 'ies'}"
    offload = ", shards on the host" if plan.config.parallel.cpu_offload else ""
    return f"{plan.world_size}: {copies} of the model, each sharded over {plan.shard}{offload}"


def _precision(plan: Plan) -> str:
    if plan.config.precision == "fp32":
        return "fp32"
    how = "autocast" if plan.world_size == 1 else "gathered copies of sharded weights"
    return f"bf16 ({how}), weights, gradients and optimizer in fp32"


def _schedule(plan: Plan) -> str:
    optimizer = plan.config.optimizer
    warmup = optimizer.warmup(plan.config.total_steps)
    after = "constant" if optimizer.schedule == "constant" else f"cosine to {optimizer.final_lr:g} of it"
    return f"{optimizer.lr:g} after {warmup:,} steps of warm-up, then {after}"


def _checkpoints(plan: Plan) -> str:
    config = plan.config
    if config.output is None:
        return "none, output is null"
    every = f"every {config.save_every:,} steps and at the end" if config.save_every else "at the end"
    most = sum(plan.disk.values()) * (config.keep_checkpoints + 1)
    return f"{every}, the last {config.keep_checkpoints} are kept: up to {gib(most)} GiB while one is written"


def _looks(plan: Plan) -> str:
    watch = plan.config.watch
    if not watch.every:
        return ""
    pictures = len(watch.prompts) * watch.count
    seen = [f"{pictures} pictures"] * bool(pictures) + [f"{watch.limit} held-out images"] * bool(watch.detection)
    return f"every {watch.every:,} steps, at the start and at the end" + (f": {' and '.join(seen)}" if seen else "")
