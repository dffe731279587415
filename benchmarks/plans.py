"""Write the tables of ``docs/training.md``: ``python -m benchmarks.plans``.

They are plans of the published recipes (``configs/gduf_bagel7b.yaml``, ``configs/diga_bagel7b.yaml``), computed from
sizes alone as ``unigendet train --dry-run`` does; nothing in them is measured. ``--check`` writes nothing and exits
with 1 unless the document is exactly what the program gives.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence

from unigendet.device import GIB
from unigendet.quickstart import default_config
from unigendet.training.config import load_train_config
from unigendet.training.plan import CARD, CARD_GIB, Plan, make_plan
from unigendet.training.plan_text import gib
from unigendet.training.planned_pack import PlannedPack, planned_pack
from unigendet.training.preflight import model_settings, planned_processes
from unigendet.training.sizes import RunSizes

from .environment import ROOT
from .report import with_section

DOCUMENT = ROOT / "docs" / "training.md"
STAGES = ("gduf", "diga")
MESHES = ((1, 8), (1, 64), (8, 8), (1, 512), (64, 8))  # copies, and processes that each is sharded over
# Of GDUF on 8 GPUs: what is changed, and what that costs. In the order in which to try them.
REMEDIES = (
    ((), "the recipe"),
    (("recompute=attention",), "for comparison: attention is not computed again"),
    (("recompute=selective",), "for comparison: nor are matrix products"),
    (("recompute=none",), "for comparison: nothing is computed again"),
    (("ema_decay=null",), "no averaged weights, which the recipe judges and exports"),
    (("loader.max_tokens=24576",), "a quarter fewer tokens per step"),
    (
        ("loader.max_tokens=16384", "accumulate=2"),
        "weights are gathered twice per step, and the first pack's gradients wait",
    ),
    (("parallel.shard=16",), "twice the GPUs, twice the tokens per step"),
    (("parallel.cpu_offload=true",), "the state goes over PCIe and Adam runs on the host, in every step"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plans", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only check that the document says what is computed")
    options = parser.parse_args(arguments)
    text = wanted = DOCUMENT.read_text(encoding="utf-8")
    for mark, section in (("node", node), ("remedies", remedies), ("scale", scale)):
        wanted = with_section(wanted, f"plans:{mark}", "\n".join(section()), DOCUMENT.name)
    if options.check:
        if wanted != text:
            print(f"{DOCUMENT.name} does not say what is computed; run python -m benchmarks.plans", file=sys.stderr)
        return int(wanted != text)
    if wanted != text:
        DOCUMENT.write_text(wanted, encoding="utf-8")
    return 0


def recipe(stage: str, *overrides: str) -> Plan:
    """The plan of a published recipe, with settings changed."""
    config = load_train_config(default_config(f"{stage}_bagel7b.yaml"), overrides)
    options = {"sizes": _sizes(stage), "packs": _packs(stage, config.loader.max_tokens)}
    return make_plan(config, model_settings(config), planned_processes(config), **options)


@functools.cache
def _sizes(stage: str) -> RunSizes:
    """Of a recipe's model: no setting that is changed here has a part in them."""
    config = load_train_config(default_config(f"{stage}_bagel7b.yaml"))
    return RunSizes.of(config, model_settings(config))


@functools.cache
def _packs(stage: str, tokens: int) -> PlannedPack:
    """A recipe's packs with ``loader.max_tokens``, the only setting that is changed here and matters to them."""
    config = load_train_config(default_config(f"{stage}_bagel7b.yaml"), [f"loader.max_tokens={tokens}"])
    return planned_pack(config, model_settings(config))


def node() -> Iterator[str]:
    """Both recipes on 8 GPUs: the peak in its parts, and what comes with it."""
    plans = [recipe(stage) for stage in STAGES]
    yield "| per rank, 8 GPUs | GDUF | DIGA |"
    yield "|---|--:|--:|"
    names = dict.fromkeys(name for plan in plans for name in (*plan.held, *plan.moments[plan.worst]))
    for name in names:
        parts = [plan.held | plan.moments[plan.worst] for plan in plans]
        yield _row(f"{name}, GiB", *(gib(part[name]) if name in part else "–" for part in parts))
    yield _row("**peak, GiB**", *(f"**{gib(plan.peak)}**" for plan in plans))
    yield _row("at the moment", *(plan.worst for plan in plans))
    yield _row(f"left of {CARD_GIB} GiB, an {CARD} card", *(gib(CARD_GIB * GIB - plan.peak) for plan in plans))
    yield _row("host memory, GiB", *(gib(sum(plan.host.values())) for plan in plans))
    yield _row("a checkpoint on disk, GiB", *(gib(sum(plan.disk.values())) for plan in plans))
    yield _row("received and sent per step, GiB", *(gib(sum(plan.communication.values())) for plan in plans))
    yield _row("tokens per step, all ranks, at most", *(f"{plan.tokens:,}" for plan in plans))
    yield _row("useful operations per step, 10¹⁵", *(f"{plan.operations / 1e15:.2f}" for plan in plans))


def remedies() -> Iterator[str]:
    """What GDUF needs with other settings."""
    yield "| settings | peak, GiB | fits 79 GiB | what it costs |"
    yield "|---|--:|---|---|"
    for overrides, cost in REMEDIES:
        plan = recipe("gduf", *overrides)
        settings = " ".join(f"`{override}`" for override in overrides) or "–"
        yield _row(settings, gib(plan.peak), "yes" if plan.peak <= CARD_GIB * GIB else "no", cost)


def scale() -> Iterator[str]:
    """Both recipes on more GPUs."""
    yield (
        "| stage | GPUs | copies × shards | weights and state, GiB | peak, GiB | gathered, GiB | "
        "summed over shards, GiB | summed over copies, GiB | tokens per step, at most |"
    )
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    for stage in STAGES:
        for copies, shards in MESHES:
            plan = recipe(stage, f"parallel.replicate={copies}", f"parallel.shard={shards}")
            sent = list(plan.communication.values()) + [0] * (copies == 1)
            state = sum(plan.held.values())
            cells = (gib(state), gib(plan.peak), *map(gib, sent), f"{plan.tokens:,}")
            yield _row(stage.upper(), str(copies * shards), f"{copies} × {shards}", *cells)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
