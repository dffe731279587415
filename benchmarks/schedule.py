"""The benchmark of tile schedules: ``python -m benchmarks.schedule``.

For each trace and size of tiles: how long a schedule takes on the host, which is paid once per pack (NumPy, one core),
and how much of the work that its tiles launch is useful, visible pairs over pairs in visited tiles. ``--json`` keeps
the rows in ``benchmarks/results/<device>/schedule.json``, or in the file that it names.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import traces
from benchmarks.harness import Record, default_path, environment, measure, show_header
from unigendet import schedule as schedules
from unigendet.layout import Layout
from unigendet.schedule import TileSchedule, layout_schedule

CPU = torch.device("cpu")
BLOCKS = ((128, 128), (128, 64), (64, 64), (32, 128))
COLUMNS = ("trace", "block_m", "block_n", "ms", "p20", "p80", "useful")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = _parse(arguments)
    header = {"op": "tile_schedule", "environment": environment(CPU), "settings": {"seconds": options.seconds}}
    record = Record(options.json, header, COLUMNS)
    show_header(COLUMNS)
    for name in options.traces:
        layout = traces.trace(name).layout
        for block_m, block_n in options.blocks:
            call = lambda layout=layout, m=block_m, n=block_n: fresh_schedule(layout, m, n)  # noqa: E731
            timing = measure([call], CPU, seconds=options.seconds)
            useful = layout.visible_pairs() / call().launched_pairs
            record.add(trace=name, block_m=block_m, block_n=block_n, useful=useful, **dataclasses.asdict(timing))
    record.complete = True
    record.write()
    return 0


def fresh_schedule(layout: Layout, block_m: int, block_n: int) -> TileSchedule:
    """A schedule as a pack gets it that was never seen before."""
    schedules._cached.cache_clear()
    return layout_schedule(layout, block_m, block_n)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedule", description=__doc__.partition("\n")[0])
    several = {"nargs": "+", "metavar": "NAME"}
    names = ", ".join(traces.NAMES)
    parser.add_argument("--traces", choices=traces.NAMES, default=list(traces.NAMES), help=names, **several)
    parser.add_argument("--blocks", type=_block, default=list(BLOCKS), nargs="+", metavar="MxN", help="sizes of tiles")
    default = default_path("schedule", CPU)
    parser.add_argument("--json", type=Path, nargs="?", const=default, metavar="PATH", help="where to write the rows")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for one measurement (default 0.5)")
    return parser.parse_args(arguments)


def _block(text: str) -> tuple[int, int]:
    block_m, block_n = map(int, text.split("x"))
    return block_m, block_n


if __name__ == "__main__":
    raise SystemExit(main())
