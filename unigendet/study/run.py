"""Running a study: what is missing of it, one run after another, and its report."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from unigendet.config import check
from unigendet.config_file import load_settings
from unigendet.environment import environment
from unigendet.evaluation.comparisons import METRICS, summarise
from unigendet.evaluation.pages import seconds as duration
from unigendet.evaluation.results import plain
from unigendet.evaluation.study_report import write_study
from unigendet.files import claim_folder, make_folder, write_text
from unigendet.quickstart import default_config
from unigendet.study.config import StudyConfig
from unigendet.study.work import SeedWork

MARK = ".unigendet-study"  # a folder without it is not ours, whatever the names in it
PARTS = ("results", "grids", "work", "report.html", "study.json")
Results = dict[tuple[int, str], dict[str, Any]]  # by (seed, arm)


def run(
    out: str | Path,
    *,
    seeds: int | None = None,
    arms: Sequence[str] | None = None,
    config: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run what is missing of a study and write its report.

    Args:
        out: the folder; it is created. One that holds something other than a study is refused.
        seeds: how many seeds, from 1, if not as many as the settings say.
        arms: only these; the report covers whatever results there are.
        config: YAML file with the fields of ``StudyConfig``; default: the one that ships.
        console: where progress goes; default: standard output.

    Returns:
        What ``study.json`` holds (``write_study`` documents it).

    Raises:
        ValueError: a setting or ``out`` is unfit, or ``out`` holds a result of other settings.
    """
    settings = load_settings(StudyConfig, default_config("study.yaml") if config is None else config)
    settings = settings if seeds is None else dataclasses.replace(settings, seeds=seeds)
    for name in arms or ():
        check(name in settings.arms, "arms", name, f"some of {list(settings.arms)}")
    study = _Study(Path(out), settings, console or Console())
    study.prepare()
    results = study.results()
    wanted = [name for name in settings.arms if arms is None or name in arms]
    missing = [(s, name) for s in range(1, settings.seeds + 1) for name in wanted if (s, name) not in results]
    study.console.print(f"{len(missing)} to do, {len(results)} done")
    try:
        for seed in sorted({seed for seed, _ in missing}):
            work = study.work(seed)
            for name in [name for s, name in missing if s == seed]:
                study.say(seed, name, results, [key for key in missing if key not in results])
                results[seed, name] = study.keep(seed, name, work.run(name))
            if all((seed, name) in results for name in settings.arms):  # otherwise the other arms may yet be asked for
                shutil.rmtree(work.folder)
            study.report(results)
    except KeyboardInterrupt:
        study.console.print("Interrupted. The same command goes on with what is missing.")
        raise
    found = study.report(results)
    study.console.print(f"The report: {study.out / 'report.html'}")
    return found


class _Study:
    """A study's folder and its screen."""

    def __init__(self, out: Path, config: StudyConfig, console: Console) -> None:
        self.out, self.config, self.console = out, config, console
        self.settings = config.resolved()
        self.recipes = {name: config.recipe(name, self.settings) for name in config.arms}
        self.environment = environment()

    def prepare(self) -> None:
        """Make the folder, with its mark."""
        note = "A study made this folder, and goes on in it."
        claim_folder(self.out, MARK, PARTS, by="a study", note=note)

    def work(self, seed: int) -> SeedWork:
        """What is needed to run arms of a seed."""
        folder, grids = self.out / "work" / f"seed-{seed:04}", self.out / "grids"
        return SeedWork(folder, seed, self.config, self.settings, self.recipes, grids, self.console)

    def file(self, seed: int, name: str) -> Path:
        """Where a result is."""
        return self.out / "results" / f"seed-{seed:04}" / f"{name}.json"

    def results(self) -> Results:
        """The results in the folder, by (seed, arm). Raises ValueError for one that other settings made."""
        found = {}
        for folder in sorted((self.out / "results").glob("seed-*")):
            seed = int(folder.name.removeprefix("seed-"))
            for name in self.config.arms:
                file = self.file(seed, name)
                if file.is_file():
                    found[seed, name] = json.loads(file.read_text(encoding="utf-8"))
                    self._check(file, found[seed, name]["recipe"], self.recipes[name])
        return found

    def _check(self, file: Path, made: dict[str, Any], wanted: dict[str, Any]) -> None:
        if made != wanted:
            listed = "; ".join(_differences(made, wanted))
            raise ValueError(
                f"{file} is a result of other settings ({listed}); choose another folder, or remove the results"
            )

    def keep(self, seed: int, name: str, result: dict[str, Any]) -> dict[str, Any]:
        """Write a result, whole or not at all, and return it as it will be read."""
        file = self.file(seed, name)
        where = {"seed": seed, "arm": name, "recipe": self.recipes[name], "environment": self.environment}
        result = plain(where | result)
        make_folder(file.parent)
        write_text(file, json.dumps(result, indent=1, allow_nan=False) + "\n")
        return result

    def say(self, seed: int, name: str, results: Results, left: list[tuple[int, str]]) -> None:
        """Announce a run, and how long everything that is left will take, if that is known."""
        costs: dict[bool, list[float]] = {True: [], False: []}
        for (_, arm), result in results.items():
            costs[self.config.arms[arm].after is None].append(sum(result["seconds"].values()))
        kinds = [self.config.arms[arm].after is None for _, arm in left]
        known = all(costs[kind] for kind in kinds)
        rest = f", about {duration(sum(np.mean(costs[kind]) for kind in kinds))} left" if known else ""
        title = self.config.arms[name].title
        self.console.print(f"[bold]Seed {seed}: {title}[/bold]  {len(left)} to do{rest}", highlight=False)

    def report(self, results: Results) -> dict[str, Any]:
        """Write the report on these results and return its numbers."""
        arms = self.config.arms
        metrics = {key: result["metrics"] for key, result in results.items()}
        summary = summarise([(name, arm.controls) for name, arm in arms.items()], self.config.primary, metrics)
        ordered = [results[key] for key in sorted(results, key=lambda key: (key[0], list(arms).index(key[1])))]
        kept = [{name: value for name, value in r.items() if name not in ("recipe", "environment")} for r in ordered]
        places: list[dict[str, Any]] = []
        for result in ordered:
            if result["environment"] not in places:
                places.append(result["environment"])
        named = [{"name": name, **dataclasses.asdict(arm)} for name, arm in arms.items()]
        study = {
            "draws": self.config.draws,
            "quickstart": self.config.base(),
            "metrics": METRICS,
            "arms": [entry | {"seeds": sorted(s for s, a in results if a == entry["name"])} for entry in named],
            **summary,
            "environments": places,
            "runs": kept,
        }
        return write_study(self.out, plain(study))


def _differences(made: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """Where two nestings of settings differ, as ``name made → wanted``."""
    if isinstance(made, Mapping) and isinstance(wanted, Mapping):
        for key in sorted({*made, *wanted}):
            yield from _differences(made.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif made != wanted:
        yield f"{name} {json.dumps(made)} → {json.dumps(wanted)}"
