"""``unigendet data``: what is done with data sets; each is a command of its own."""

from __future__ import annotations

from unigendet.commands import data_check
from unigendet.commands.common import Commands

KINDS = (data_check,)  # in the order of the help


def add(commands: Commands) -> None:
    """Describe the command and those below it."""
    kinds = commands.group("data", "Look at data sets before a run does.")
    for kind in KINDS:
        kind.add(kinds)
