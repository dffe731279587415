"""``unigendet bench``: the ops and training steps against their peers."""

from __future__ import annotations

import argparse
from pathlib import Path

from unigendet.commands.common import Commands, UserError


def add(commands: Commands) -> None:
    """Describe the command."""
    bench = commands.add(
        "bench", run, "Measure the ops and training steps against their peers and this machine's own ceilings.",
        epilog="Exit code 1: an answer was wrong, a benchmark failed, or something became slower than OLD.",
    )  # fmt: skip
    bench.add_argument("--quick", action="store_true", help="smaller and shorter: under two minutes on two cores")
    for name, text in (
        ("op", "only these ops or benchmarks"),
        ("trace", "only these packs"),
        ("backend", "only these backends and peers"),
        ("direction", "only these directions: forward, backward, both, step, host"),
    ):
        bench.add_argument(f"--{name}", nargs="+", action="extend", metavar="NAME", help=f"{text} (see --list)")
    bench.add_argument("--list", action="store_true", help="show what there is to measure, and stop")
    bench.add_argument("--device", default="auto", help="cpu or cuda (default: cuda where there is one)")
    bench.add_argument("--out", type=Path, default=Path("unigendet-bench"), metavar="DIR",
                       help="where results and the report go (default: unigendet-bench)")  # fmt: skip
    bench.add_argument("--json", type=Path, metavar="FILE", help="also write all rows into this one file")
    bench.add_argument("--compare", type=Path, metavar="OLD",
                       help="file or folder of an earlier run on this machine: show what became slower")  # fmt: skip
    bench.add_argument("--seconds", type=float,
                       help="measuring time of one candidate (default: 1, on a GPU 0.3, with --quick 0.1)")  # fmt: skip
    bench.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        help="begin nothing new after this time (default: none, with --quick 100)",
    )
    bench.add_argument("--record", action="store_true",
                       help="keep the results in the checkout's benchmarks/results instead")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Carry it out."""
    from unigendet.benchmarks.suite import Settings, bench, describe
    from unigendet.device import find_device

    for name in ("seconds", "limit"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} is {value}; it must be a positive number of seconds")
    settings = Settings(
        device=find_device(options.device),
        size="quick" if options.quick else "full",
        ops=options.op,
        traces=options.trace,
        backends=options.backend,
        directions=options.direction,
        out=options.out,
        seconds=options.seconds,
        limit=options.limit,
    )
    if options.list:
        print("\n".join(describe(settings)))
        return 0
    return bench(settings, json=options.json, old=options.compare, record=options.record)
