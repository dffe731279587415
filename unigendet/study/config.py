"""Settings of a study: its arms, each the quickstart with a few settings changed, and what is compared."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unigendet.config import check
from unigendet.config_file import load_settings
from unigendet.evaluation.comparisons import METRICS, Comparison
from unigendet.evaluation.results import plain
from unigendet.quickstart import QuickstartConfig, default_config


@dataclass(frozen=True)
class Arm:
    """One treatment.

    ``after``: the arm whose trained model it goes on from, with DIGA; None: it trains a new model with GDUF.
    ``overrides``: its settings, as ``name=value`` with the fields of ``QuickstartConfig``, after those of ``after``.
    ``controls``: the arms that it is compared with.
    """

    title: str
    after: str | None = None
    overrides: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()


@dataclass(frozen=True)
class StudyConfig:
    """Settings of a study.

    ``arms`` by name. ``primary``: the comparisons that are named in advance. ``seeds``: how many, from 1. ``draws``:
    how often the test prompts are generated, each time with other noise; scores are means over them. ``quickstart``:
    file of the settings that the arms change, null: the ones that ship; ``overrides``: changes of them in all arms.
    """

    arms: dict[str, Arm] = field(default_factory=dict)
    primary: tuple[Comparison, ...] = ()
    seeds: int = 5
    draws: int = 3
    quickstart: str | None = None
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(len(self.arms) > 0, "arms", self.arms, "at least one arm")
        for name in ("seeds", "draws"):
            check(getattr(self, name) > 0, name, getattr(self, name), "positive")
        known = list(self.arms)
        first = [name for name, arm in self.arms.items() if arm.after is None]
        for name, arm in self.arms.items():
            check(bool(re.fullmatch("[a-z0-9_]+", name)), "an arm's name", name, "of letters a-z, digits and _")
            check(arm.after is None or arm.after in first, f"arms.{name}.after", arm.after, f"one of {first}, or null")
            for control in arm.controls:
                check(control in known and control != name, f"arms.{name}.controls", control, "other arms' names")
        for comparison in self.primary:
            for what in (comparison.arm, comparison.control):
                check(what in known, "an arm in primary", what, f"one of {known}")
            metrics = [metric.name for metric in METRICS if metric.compared]
            check(comparison.metric in metrics, "a metric in primary", comparison.metric, f"one of {metrics}")

    def base(self, overrides: tuple[str, ...] = ()) -> QuickstartConfig:
        """The settings that the arms change, with more ``overrides``."""
        file = Path(self.quickstart) if self.quickstart else default_config()
        return load_settings(QuickstartConfig, file, [*self.overrides, *overrides])

    def resolved(self) -> dict[str, QuickstartConfig]:
        """The whole settings of every arm. Raises ValueError naming an arm whose settings do not fit."""
        found: dict[str, QuickstartConfig] = {}
        for name, arm in sorted(self.arms.items(), key=lambda item: item[1].after is not None):
            inherited = self.arms[arm.after].overrides if arm.after else ()
            found[name] = own = self.base((*inherited, *arm.overrides))
            if arm.after:
                same = dataclasses.replace(found[arm.after], diga=own.diga)
                check(
                    own == same, f"arms.{name}.overrides", arm.overrides, f"of diga only: it goes on from {arm.after}"
                )
        fakes = {own.fakes_per_real for own in found.values()}
        check(len(fakes) == 1, "fakes_per_real", sorted(fakes), "the same in all arms: they share the data")
        return found

    def recipe(self, name: str, resolved: Mapping[str, QuickstartConfig]) -> dict[str, Any]:
        """Everything that decides a result of arm ``name`` beside the seed, as JSON has it."""
        own = dataclasses.asdict(resolved[name])
        for stage in ("gduf", "diga"):
            del own[stage]["watch"]  # a run that is looked at is the same run
        if self.arms[name].after is None:
            del own["diga"]
        return plain({"after": self.arms[name].after, "draws": self.draws, "quickstart": own})
