"""``unigendet quickstart``: the whole path on handwritten digits."""

from __future__ import annotations

import argparse
from pathlib import Path

from unigendet.commands.common import Commands


def add(commands: Commands) -> None:
    """Describe the command."""
    quick = commands.add(
        "quickstart", run, "Train a small model on handwritten digits in both stages, on the CPU, and report."
    )
    quick.add_argument(
        "--out",
        type=Path,
        default=Path("quickstart"),
        metavar="DIR",
        help="where everything goes (default: quickstart)",
    )
    quick.add_argument("--seed", type=int, default=0, help="of data, weights and noise (default: 0)")
    quick.add_argument(
        "--config", type=Path, metavar="FILE", help="settings (default: the ones that ship with the package)"
    )


def run(options: argparse.Namespace) -> int:
    """Carry it out."""
    from unigendet.quickstart import run as quickstart

    quickstart(options.out, seed=options.seed, config=options.config)
    return 0
