"""Record a study as evidence: ``python -m benchmarks.study DIR``.

Its numbers go to ``benchmarks/results/study.json``, and from them the sections of ``docs/study.md`` and the README are
written anew. Without DIR only that is done, from what is recorded already. ``--check`` writes nothing and exits with 1
unless both are exactly what the record gives.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unigendet.config_file import load_settings
from unigendet.evaluation.results import plain
from unigendet.evaluation.study_report import STUDY_SCHEMA, study_texts
from unigendet.quickstart import default_config
from unigendet.study.config import StudyConfig

from .environment import RESULTS, ROOT, machine_line
from .quickstart import changes
from .report import with_section

RECORD = RESULTS / "study.json"
DOCUMENT = ROOT / "docs" / "study.md"
README = ROOT / "README.md"
MARK = "study"  # of the sections
NOTHING = "Not recorded yet."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="what `unigendet study` left")
    parser.add_argument("--check", action="store_true", help="only check that the documents say what is recorded")
    options = parser.parse_args(arguments)
    if options.check and options.folder:
        parser.error("--check takes no DIR: it compares the documents with what is recorded")
    if options.folder:
        require_planned(read_study(options.folder / "study.json"))  # nothing else may replace the record
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        RECORD.write_bytes((options.folder / "study.json").read_bytes())
    study = read_study(RECORD) if RECORD.is_file() else None
    stale = {}
    for file, section in ((DOCUMENT, document_section(study)), (README, readme_section(study))):
        text = file.read_text(encoding="utf-8")
        wanted = with_section(text, MARK, section, file.name)
        if wanted != text:
            stale[file] = wanted
    if options.check:
        for file in stale:
            print(f"{file.name} does not say what is recorded; run python -m benchmarks.study", file=sys.stderr)
        return int(bool(stale))
    for file, wanted in stale.items():
        file.write_text(wanted, encoding="utf-8")
    return 0


def read_study(file: Path) -> dict[str, Any]:
    """A ``study.json``. Raises ValueError if it has another schema than this program knows."""
    study = json.loads(file.read_text(encoding="utf-8"))
    if study.get("schema") != STUDY_SCHEMA:
        raise ValueError(f"{file} has schema {study.get('schema')}; it must be {STUDY_SCHEMA}")
    return study


def current() -> StudyConfig:
    """The study that the shipped settings plan."""
    return load_settings(StudyConfig, default_config("study.yaml"))


def require_planned(study: Mapping[str, Any]) -> None:
    """Raise ValueError unless a study is the one that the settings plan: every seed of every arm, and none beyond.

    A study that is recorded as soon as its numbers please, or that goes on until they do, proves nothing.
    """
    config = current()
    planned = list(range(1, config.seeds + 1))
    found = {arm["name"]: arm["seeds"] for arm in study["arms"]}
    wrong = {name: found.get(name) for name in (*config.arms, *found) if found.get(name) != planned}
    if wrong:
        raise ValueError(
            f"the study's seeds by arm are {wrong}; they must be {planned} for each of {list(config.arms)}"
        )
    primary = {(c["arm"], c["control"], c["metric"]) for c in study["comparisons"] if c["primary"]}
    named = {(c.arm, c.control, c.metric) for c in config.primary}
    if primary != named:
        raise ValueError(f"the study's primary comparisons are {sorted(primary)}; they must be {sorted(named)}")
    if len(study["environments"]) != 1:
        raise ValueError(
            f"the study's runs come from {len(study['environments'])} environments; code and versions must be one"
        )


def readme_section(study: Mapping[str, Any] | None) -> str:
    """The README's section in Markdown: how it was done in a sentence, and the primary comparisons."""
    if study is None:
        return NOTHING
    texts = study_texts(study)
    differences = _differences(texts, primary=True)
    return "\n".join([*_how(study, texts), "", *differences, "", _chance(texts), *_outdated(study)])


def document_section(study: Mapping[str, Any] | None) -> str:
    """The section of ``docs/study.md``: everything."""
    if study is None:
        return NOTHING
    texts = study_texts(study)
    real = texts["reference"]
    lines = [*_how(study, texts), *_outdated(study)]
    lines += ["", "### Primary comparisons", "", *_differences(texts, primary=True), "", "### All arms", ""]
    lines += [
        "Mean over the seeds, with the 95 % interval of Student's t. Arms of a seed share data and weights, so these"
    ]
    lines += ["intervals overlap more than the differences do. Real training digits, as many as are generated, have a"]
    lines += [f"Fréchet distance of {real['frechet']}; the reader of the digits gets {real['agreement']} of the real"]
    lines += ["test digits right.", "", *_arms(texts), "", "| metric | what it is |", "|---|---|"]
    lines += [f"| {metric['title']} | {metric['meaning']} |" for metric in study["metrics"]]
    lines += ["", "### Exploratory differences", "", _chance(texts), "", *_differences(texts, primary=False)]
    lines += [
        "",
        "### Arms",
        "",
        "| arm | settings that differ from the quickstart's | goes on from |",
        "|---|---|---|",
    ]
    titles = {arm["name"]: arm["title"] for arm in study["arms"]}
    for arm in study["arms"]:
        settings = ", ".join(f"`{override}`" for override in arm["overrides"])
        lines.append(f"| {arm['title']} | {settings} | {titles.get(arm['after'], 'new weights')} |")
    return "\n".join(lines)


def _how(study: Mapping[str, Any], texts: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{len(study['runs'])} runs: {len(study['arms'])} arms, {len(texts['seeds'])} seeds, {study['draws']} draws of "
        f"the test prompts each; {texts['cost']['seconds']}, {texts['cost']['cpu_seconds']} of processor time."
    ).replace("\u00a0", " ")
    yield from (f"{machine_line(place)}." for place in study["environments"])


def _differences(texts: Mapping[str, Any], *, primary: bool) -> Iterator[str]:
    wide = f" {texts['joint']} interval |" if primary else ""
    yield f"| arm against control | metric | difference | 95 % interval |{wide} seeds | reading |"
    yield "|---|---|--:|--:|" + ("--:|" if primary else "") + "---|---|"
    for entry in texts["primary" if primary else "exploratory"]:
        joint = f" {entry['joint']} |" if primary else ""
        numbers = f"{entry['mean']} | {entry['interval']} |{joint} {entry['seeds']}"
        yield f"| {entry['what']} | {entry['metric']} | {numbers} | {entry['verdict']} |"


def _chance(texts: Mapping[str, Any]) -> str:
    chance = texts["chance"]
    return (
        f"Of {chance['count']} exploratory differences, {chance['apart']} have a 95 % interval that leaves out zero; "
        f"about {chance['expected']} would if nothing had any effect."
    )


def _arms(texts: Mapping[str, Any]) -> Iterator[str]:
    titles = texts["table"]["titles"]
    yield "| arm | seeds | " + " | ".join(titles) + " |"
    yield "|---|--:|" + "--:|" * len(titles)
    for line in texts["table"]["lines"]:
        yield f"| {line['arm']} | {line['seeds']} | " + " | ".join(line["values"]) + " |"


def _outdated(study: Mapping[str, Any]) -> list[str]:
    """What the settings are now where they are not those of the record."""
    config = current()
    now = plain({"draws": config.draws, "quickstart": config.base(), "arms": config.arms, "names": list(config.arms)})
    arms = {arm["name"]: arm for arm in study["arms"]}
    then = {"draws": study["draws"], "quickstart": study["quickstart"], "arms": arms, "names": list(arms)}
    if other := sorted(changes(then, now)):
        return [
            "",
            f"**Not what `unigendet study` does now.** Settings that differ (recorded → now): {'; '.join(other)}.",
        ]
    return []


if __name__ == "__main__":
    sys.exit(main())
