"""``unigendet study``: the quickstart over several seeds and arms, and what the differences are."""

from __future__ import annotations

import argparse
from pathlib import Path

from unigendet.commands.common import Commands


def add(commands: Commands) -> None:
    """Describe the command."""
    study = commands.add(
        "study",
        run,
        "Compare variants of the training over several seeds, on handwritten digits, on the CPU.",
        epilog="The same command goes on with what is missing in the folder, also after an interruption.",
    )
    study.add_argument(
        "--out", type=Path, default=Path("study"), metavar="DIR", help="where everything goes (default: study)"
    )
    study.add_argument("--seeds", type=int, metavar="N", help="how many seeds, from 1 (default: the settings')")
    study.add_argument("--arms", nargs="+", metavar="ARM", help="only these arms (default: all)")
    study.add_argument(
        "--config", type=Path, metavar="FILE", help="settings (default: the ones that ship with the package)"
    )


def run(options: argparse.Namespace) -> int:
    """Carry it out."""
    from unigendet.study.run import run as study

    study(options.out, seeds=options.seeds, arms=options.arms, config=options.config)
    return 0
