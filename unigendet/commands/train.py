"""``unigendet train``: one stage of training."""

from __future__ import annotations

import argparse
from pathlib import Path

from unigendet.commands.common import Commands


def add(commands: Commands) -> None:
    """Describe the command."""
    train = commands.add("train", run, "Train one stage (GDUF or DIGA) as a YAML file says.",
                epilog="Example: unigendet train --config gduf.yaml total_steps=500 optimizer.lr=1e-5")  # fmt: skip
    train.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML file of the run")
    train.add_argument("overrides", nargs="*", type=_setting, metavar="SETTING=VALUE",
                       help="a setting that wins over the file's; dots for nested ones, values as in YAML")  # fmt: skip
    train.add_argument("--resume", nargs="?", const=True, default=False, type=Path, metavar="FOLDER",
                       help="go on from this checkpoint; without FOLDER, from the newest of the run "
                            "(put --resume last then)")  # fmt: skip


def _setting(text: str) -> str:
    name, equals, _ = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no setting; write NAME=VALUE, say optimizer.lr=1e-5")
    return text


def run(options: argparse.Namespace) -> int:
    """Carry it out."""
    from unigendet.training import load_train_config, train

    train(load_train_config(options.config, options.overrides), resume=options.resume)
    return 0
