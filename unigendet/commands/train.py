"""``unigendet train``: one stage of training."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from unigendet.commands.common import Commands, say

if TYPE_CHECKING:
    from unigendet.training import TrainResult


def add(commands: Commands) -> None:
    """Describe the command."""
    train = commands.add("train", run, "Train one stage (GDUF or DIGA) as a YAML file says.",
                epilog="Example: unigendet train --config gduf.yaml total_steps=500 optimizer.lr=1e-5. SIGTERM and "
                       "Ctrl-C end the run after its present step, with a checkpoint and exit code 143 or 130; a "
                       "second one ends it at once.")  # fmt: skip
    train.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML file of the run")
    train.add_argument("overrides", nargs="*", type=setting, metavar="SETTING=VALUE",
                       help="a setting that wins over the file's; dots for nested ones, values as in YAML")  # fmt: skip
    train.add_argument("--resume", nargs="?", const=True, default=False, type=Path, metavar="FOLDER",
                       help="go on from this checkpoint; without FOLDER, from the newest of the run "
                            "(put --resume last then)")  # fmt: skip


def setting(text: str) -> str:
    """An override of a run's settings, as argparse takes it: ``NAME=VALUE``."""
    name, equals, _ = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no setting; write NAME=VALUE, say optimizer.lr=1e-5")
    return text


def run(options: argparse.Namespace) -> int:
    """Carry it out."""
    from unigendet.training import load_train_config, train

    config = load_train_config(options.config, options.overrides)
    result = train(config, resume=options.resume, catch_signals=True)
    if result.stopped_by is None:
        return 0
    say(options, _stopped(options, result))
    return 128 + result.stopped_by


def _stopped(options: argparse.Namespace, result: TrainResult) -> str:
    """What a signal ended, and the command that goes on."""
    command = ["unigendet", "train", "--config", str(options.config), *options.overrides]
    if result.checkpoint is not None:
        where, how, command = f"its checkpoint is {result.checkpoint}", "go on with", [*command, "--resume"]
    elif isinstance(options.resume, Path):
        where, how, command = "nothing is saved", "go on again with", [*command, "--resume", str(options.resume)]
    else:
        where, how = "nothing is saved", "start again with"
    return f"{result.stopped_by.name} after step {result.step}; {where}; {how}: {shlex.join(command)}"
