"""How full packs become with a look-ahead buffer: ``python -m benchmarks.packing_fill [--record]``.

Endless samples as ``traces`` draws them for ``gduf_32k`` (and ``diga_23k``), packed by the loader's own code with
``lookahead`` 0, 8, 16, 32 and 64, by one data worker. Nothing is timed, so the numbers are the same on every machine:
``--record`` writes them to ``benchmarks/results/packing_fill.json``, from which documents quote; a test computes them
anew. It needs the package's data room, with its libraries.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unigendet.config import LoaderConfig

from . import traces
from .environment import RESULTS

RECORD = RESULTS / "packing_fill.json"
LOOKAHEADS = (0, 8, 16, 32, 64)
SAMPLES, PACKS = 20_000, 1000
BUDGETS = {"gduf_32k": 32_768, "diga_23k": 23_000}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packing_fill", description=__doc__.partition("\n")[0])
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name} among the results")
    options = parser.parse_args(arguments)
    found = measure()
    print("\n".join(table(found)))
    if options.record:
        RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def measure() -> dict[str, Any]:
    """The fill of every trace with every look-ahead, as JSON can hold it."""
    rows = [row(name, lookahead) for name in BUDGETS for lookahead in LOOKAHEADS]
    return {"samples": SAMPLES, "packs": PACKS, "rows": rows}


def row(name: str, lookahead: int) -> dict[str, Any]:
    """What ``PACKS`` packs of the samples of a trace hold."""
    from unigendet.data.fill import packing_fill

    draw = {"gduf_32k": traces.draw_gduf, "diga_23k": traces.draw_generation}[name]
    rng = np.random.default_rng(0)
    lengths = [sum(segment.tokens for segment in draw(rng)) for _ in range(SAMPLES)]
    config = LoaderConfig(BUDGETS[name], min(BUDGETS[name], LoaderConfig.max_sample_tokens), lookahead=lookahead)
    fill = packing_fill([lengths], [1.0], config, PACKS)
    return {
        "trace": name,
        "max_tokens": fill.max_tokens,
        "lookahead": lookahead,
        "fill": round(fill.share, 4),
        "least": round(fill.least / fill.max_tokens, 4),
        "waste": round(fill.max_tokens - fill.tokens / fill.packs, 1),  # tokens a pack
        "samples_per_pack": round(fill.per_pack, 3),
    }


def table(found: Mapping[str, Any]) -> list[str]:
    """The rows as a table in Markdown."""
    lines = [
        "| packs of | look-ahead | full | emptiest | left empty | samples per pack |",
        "|---|---|---|---|---|---|",
    ]
    for one in found["rows"]:
        lines.append(
            f"| {one['trace']}, {one['max_tokens']:,} tokens | {one['lookahead']} | {one['fill']:.1%} | "
            f"{one['least']:.1%} | {one['waste']:,.0f} tokens | {one['samples_per_pack']:.2f} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
