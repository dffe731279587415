"""How full packs become with a look-ahead buffer: ``python -m benchmarks.packing_fill [--record | --check]``.

Endless samples as ``traces`` draws them for ``gduf_32k`` (and ``diga_23k``), packed by the loader's own code with
``lookahead`` 0, 8, 16, 32 and 64, by one data worker. Nothing is timed, so the numbers are the same on every machine.
``--record`` writes them to ``benchmarks/results/packing_fill.json``, and the section of ``docs/performance.md`` between
its two marks anew; ``--check`` counts nothing and exits with 1 unless the section says what is recorded. It needs the
package's data room, with its libraries.
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
from .environment import RESULTS, ROOT

DOCUMENT = ROOT / "docs" / "performance.md"
RECORD = RESULTS / "packing_fill.json"
LOOKAHEADS = (0, 8, 16, 32, 64)
SAMPLES, PACKS = 20_000, 1000
BUDGETS = {"gduf_32k": 32_768, "diga_23k": 23_000}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packing_fill", description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--record", action="store_true", help="write the record and the section of the document")
    what.add_argument("--check", action="store_true", help="only check that the document says what is recorded")
    options = parser.parse_args(arguments)
    if options.check:
        if documented(json.loads(RECORD.read_text(encoding="utf-8"))) == DOCUMENT.read_text(encoding="utf-8"):
            return 0
        print(
            f"{DOCUMENT} does not say what is recorded; run python -m benchmarks.packing_fill --record", file=sys.stderr
        )
        return 1
    found = measure()
    print("\n".join(table(found)))
    if options.record:
        RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        DOCUMENT.write_text(documented(found), encoding="utf-8")
    return 0


def documented(found: Mapping[str, Any]) -> str:
    """The document with the table of ``found`` in its section."""
    from .report import with_section

    text = DOCUMENT.read_text(encoding="utf-8")
    return with_section(text, "packing_fill", "\n".join(table(found)), DOCUMENT.name)


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
