"""Where the shards of a run's data stand, and how what is left is dealt out anew to another number of shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Remaining:
    """What is left of a source's endless sequence of places at some moment: a few places that others have overtaken,
    in ascending order, and then ``next``, ``next`` + 1, … Element i of it is what shards count by.
    """

    left: tuple[int, ...] = ()
    next: int = 0

    def place(self, element: int) -> int:
        """The place that element ``element`` stands for."""
        beyond = element - len(self.left)
        return self.left[element] if beyond < 0 else self.next + beyond


@dataclass
class Position:
    """Where one shard stands.

    ``drawn``: elements taken per source. ``held``: those of them that wait for a pack, as (source, place), oldest
    first. ``skipped``: samples left out as too long. ``packs``: packs made.
    """

    drawn: list[int]
    held: list[tuple[int, int]] = field(default_factory=list)
    skipped: int = 0
    packs: int = 0

    def copy(self) -> Position:
        """Another one that moves by itself."""
        return dataclasses.replace(self, drawn=self.drawn.copy(), held=self.held.copy())

    def to_json(self) -> dict[str, Any]:
        """As plain numbers in lists."""
        return {**vars(self), "drawn": self.drawn.copy(), "held": [list(pair) for pair in self.held]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Position:
        """The inverse of ``to_json``."""
        return cls(**{**values, "drawn": list(values["drawn"]), "held": [tuple(pair) for pair in values["held"]]})


def what_remains(origin: Remaining, which: int, positions: Sequence[Position]) -> Remaining:
    """What is left of source ``which`` when the shards, all of them and in order, have come from ``origin`` to
    ``positions``: all that no shard has taken, and what they hold.
    """
    shards = len(positions)
    drawn = [position.drawn[which] for position in positions]
    # Shard s takes the elements s, s + shards, …; beyond ``reach`` nobody has taken any.
    reach = max(len(origin.left), *((n - 1) * shards + s + 1 for s, n in enumerate(drawn) if n), 0)
    elements = range(min(drawn) * shards, reach)
    left = [origin.place(e) for e in elements if e // shards >= drawn[e % shards]]
    left += [place for position in positions for source, place in position.held if source == which]
    return Remaining(tuple(sorted(left)), origin.next + reach - len(origin.left))
