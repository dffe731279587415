"""What a run was: ``run.json`` in its output folder, with an entry for every time that it was started.

``{"starts": [...]}``, the oldest first. An entry has

* ``time`` (UTC), ``hostname``, ``command`` (the words of the command line) and the ``directory`` in which it was given;
* ``step`` (steps done before), ``resumed_from`` (a checkpoint, or null), and ``settings``, all of the run's;
* ``world_size`` (processes), ``devices`` (their names), ``cuda`` and ``driver`` (versions, or null), and what
  ``environment`` returns: ``versions``, ``platform``, ``cpus``, ``commit``.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from unigendet.environment import driver_version, environment
from unigendet.files import make_folder, write_text
from unigendet.training.config import TrainConfig

RUN_FILE = "run.json"


def record_start(config: TrainConfig, devices: Sequence[str], *, step: int = 0, resumed: Path | None = None) -> None:
    """Add an entry to ``run.json``; the file is the old one or the new one at every instant.

    Args:
        config: of the run; nothing is written if its ``output`` is None.
        devices: what each process's device calls itself, by rank.
        step: steps done before this start.
        resumed: the checkpoint that it goes on from.

    Raises:
        OSError: the file cannot be written; names it.
        ValueError: it exists and is no such record; names it.
    """
    if config.output is None:
        return
    file = Path(config.output) / RUN_FILE
    make_folder(file.parent)
    cuda = torch.cuda.is_available()
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "hostname": socket.gethostname(),
        "command": sys.orig_argv,
        "directory": str(Path.cwd()),
        "step": step,
        "resumed_from": None if resumed is None else str(resumed),
        "world_size": len(devices),
        "devices": list(devices),
        "cuda": torch.version.cuda,
        "driver": driver_version() if cuda else None,
        **environment(),
        "settings": dataclasses.asdict(config),
    }
    write_text(file, json.dumps({"starts": [*_starts(file), entry]}, indent=2) + "\n")


def _starts(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    try:
        starts = json.loads(file.read_text(encoding="utf-8"))["starts"]
        if not isinstance(starts, list):
            raise TypeError(f"starts is {starts!r}")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error}); it must be a record of a run's starts, or not exist") from error
    return starts
