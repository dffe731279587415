"""``unigendet evaluate``: a model's scores on a data set; each kind of them is a command of its own."""

from __future__ import annotations

from unigendet.commands import evaluate_detection
from unigendet.commands.common import Commands

KINDS = (evaluate_detection,)  # in the order of the help


def add(commands: Commands) -> None:
    """Describe the command and those below it."""
    kinds = commands.group("evaluate", "Score a model on a data set: numbers as JSON, and a page to look at.")
    for kind in KINDS:
        kind.add(kinds)
