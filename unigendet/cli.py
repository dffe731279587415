"""The command line: ``unigendet COMMAND``, as ``COMMANDS`` lists them.

Every command is a thin layer over the package, in a module of ``unigendet.commands``. Exit codes: 0 done, 1 the request
could not be carried out (the message says why), 2 the command line itself is wrong, 130 interrupted; ``train`` that a
signal stopped: 128 + signal. A user's mistake gives one line, not a traceback; ``--traceback`` shows it.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Sequence

from unigendet import __version__
from unigendet.commands import (
    bench,
    calibrate,
    data,
    detect,
    evaluate,
    export,
    generate,
    info,
    quickstart,
    study,
    train,
)
from unigendet.commands.common import Commands, Parser, UserError, say

# In the order of the help.
COMMANDS = (quickstart, study, data, train, generate, detect, calibrate, evaluate, export, bench, info)
NEEDS_EXTRA = {"PIL", "diffusers", "jinja2", "jsonargparse", "markupsafe", "matplotlib", "rich", "rouge_score",
               "safetensors", "scipy", "sklearn", "tensorboard", "tokenizers", "transformers", "yaml"}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what the terminal's encoding lacks must not end the run
            stream.reconfigure(errors="backslashreplace")
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if hasattr(options, "overrides") and all("=" in r and not r.startswith("-") for r in rest):
        options.overrides += rest  # argparse takes only the first run of them
    elif rest:
        parser.prog = options.label
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        code = options.run(options)
        sys.stdout.flush()  # here, where what goes wrong is still told
        return code
    except KeyboardInterrupt:
        say(options, "interrupted")
        return 130
    except (UserError, ValueError, OSError, ModuleNotFoundError, RuntimeError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to be flushed at the end
        elif options.traceback:
            raise
        else:
            say(options, _explain(error))
        return 1


def _nobody_reads() -> bool:
    """Whether standard output is a pipe of which the reader has seen enough and gone."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _explain(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] in NEEDS_EXTRA:
        return f"this command needs the package {error.name.partition('.')[0]!r}: pip install 'unigendet[train]'"
    if isinstance(error, MemoryError) and not str(error):
        kind, text = "", "not enough memory"
    else:
        kind = (
            ""
            if isinstance(error, UserError | ValueError | OSError | ModuleNotFoundError)
            else f"{type(error).__name__}: "
        )
        text = str(error)
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return " ".join(f"{kind}{text}{notes}".split("\n"))


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(
        prog="unigendet",
        description="One transformer that generates images and detects generated ones, on fused kernels.",
    )
    parser.add_argument("--version", action="version", version=f"unigendet {__version__}")
    commands = Commands(parser)
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
