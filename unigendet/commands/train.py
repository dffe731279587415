"""``unigendet train``: one stage of training."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from unigendet.commands.common import Commands, UserError, say

if TYPE_CHECKING:
    from unigendet.training import TrainConfig, TrainResult


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
    train.add_argument("--dry-run", action="store_true",
                       help="show what the run would need (memory, tokens, disk, communication) and end; it takes "
                            "neither a GPU nor weights nor data; the settings, and the files that are "
                            "there, are checked as by a run, and those that are not there are named")  # fmt: skip
    train.add_argument("--world-size", type=int, metavar="N",
                       help="with --dry-run: plan for N processes (default: torchrun's, or those that the settings "
                            "under parallel name)")  # fmt: skip


def setting(text: str) -> str:
    """An override of a run's settings, as argparse takes it: ``NAME=VALUE``."""
    name, equals, _ = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no setting; write NAME=VALUE, say optimizer.lr=1e-5")
    return text


def run(options: argparse.Namespace) -> int:
    """Carry it out."""
    from unigendet.training import load_train_config, train

    if options.world_size is not None and not options.dry_run:
        raise UserError("--world-size goes with --dry-run; torchrun --nproc-per-node N starts a run of N processes")
    config = load_train_config(options.config, options.overrides)
    if options.dry_run:
        return _dry_run(options, config)
    result = train(config, resume=options.resume, catch_signals=True)
    if result.stopped_by is None:
        return 0
    if os.environ.get("RANK", "0") == "0":  # with several processes, one tells
        say(options, _stopped(options, result))
    return 128 + result.stopped_by


def _dry_run(options: argparse.Namespace, config: TrainConfig) -> int:
    """Print the plan; what is not there goes to standard error."""
    from unigendet.training.plan import make_plan
    from unigendet.training.plan_text import plan_text
    from unigendet.training.preflight import planned_processes, rehearse

    processes = planned_processes(config) if options.world_size is None else options.world_size
    model, warnings = rehearse(config, options.resume)
    print(plan_text(make_plan(config, model, processes)))
    for line in warnings:
        say(options, f"warning: {line}")
    return 0


def _stopped(options: argparse.Namespace, result: TrainResult) -> str:
    """What a signal ended, and the command that goes on."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    start = ["torchrun", "…", "-m", "unigendet"] if several else ["unigendet"]
    command = [*start, "train", "--config", str(options.config), *options.overrides]
    if result.checkpoint is not None:
        where, how, command = f"its checkpoint is {result.checkpoint}", "go on with", [*command, "--resume"]
    elif isinstance(options.resume, Path):
        where, how, command = "nothing is saved", "go on again with", [*command, "--resume", str(options.resume)]
    else:
        where, how = "nothing is saved", "start again with"
    return f"{result.stopped_by.name} after step {result.step}; {where}; {how}: {shlex.join(command)}"
