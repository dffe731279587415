"""Record a finished quickstart as evidence: ``python -m benchmarks.quickstart DIR``.

Its numbers go to ``benchmarks/results/quickstart/report.json`` (without the curves), its sample grids, composed, to
``docs/images/quickstart.png``, and the README's section between the two marks is written anew from the numbers. Without
DIR that section alone is rewritten, from the numbers that are recorded already. ``--check`` writes nothing and exits
with 1 unless the section is exactly what the record gives.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from unigendet.config_file import load_settings
from unigendet.evaluation.pages import number, percent
from unigendet.evaluation.quickstart_report import aim_view
from unigendet.evaluation.results import SCHEMA, Aim, plain
from unigendet.quickstart import QuickstartConfig, default_config

from .environment import machine_line

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "results" / "quickstart" / "report.json"
PICTURE = ROOT / "docs" / "images" / "quickstart.png"
README = ROOT / "README.md"
BEGIN, END = "<!-- quickstart:begin -->", "<!-- quickstart:end -->"

MARGIN, LABEL_SIZE, TITLE_SIZE = 32, 24, 30  # pixels of the composed picture
INK, PAPER = 30, 255  # grey levels


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quickstart", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="what `unigendet quickstart` left")
    parser.add_argument("--check", action="store_true", help="only check that the README says what is recorded")
    options = parser.parse_args(arguments)
    if options.check and options.folder:
        parser.error("--check takes no DIR: it compares the README with what is recorded")
    if options.folder:
        record(options.folder)
    report, readme = read_report(RECORD), README.read_text(encoding="utf-8")
    wanted = with_section(readme, section(report, current_settings()))
    if not options.check:
        README.write_text(wanted, encoding="utf-8")
    elif wanted != readme:
        print("README.md does not say what is recorded; run python -m benchmarks.quickstart", file=sys.stderr)
        return 1
    return 0


def record(folder: Path) -> None:
    """Keep the numbers and the composed grids of the finished quickstart in ``folder``."""
    report = read_report(folder / "report.json")
    files = sorted((folder / "grids").glob("*.png"))
    if len(files) != len(report["grids"]):
        raise ValueError(f"{folder / 'grids'} holds {len(files)} pictures; the report names {len(report['grids'])}")
    picture = compose([Image.open(file) for file in files], report["grids"])
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    picture.save(PICTURE, optimize=True)
    del report["curves"]  # the run's own report shows them
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_report(file: Path) -> dict[str, Any]:
    """A ``report.json``. Raises ValueError if it has another schema than this program knows."""
    report = json.loads(file.read_text(encoding="utf-8"))
    if report.get("schema") != SCHEMA:
        raise ValueError(f"{file} has schema {report.get('schema')}; it must be {SCHEMA}")
    return report


def current_settings() -> dict[str, Any]:
    """The settings with which ``make quickstart`` would run now."""
    return plain(dataclasses.asdict(load_settings(QuickstartConfig, default_config())))


# Values of settings that older records have and that mean what another one does now: by another word, or (data read in
# the training process or in one other) with the very same packs.
SAME = {"recompute": {False: "none", True: "full"}, "num_workers": {0: 1}}


def changes(recorded: Any, current: Any, name: str = "") -> Iterator[str]:
    """Settings that a record has and that have another value now, as ``name recorded → current``."""
    if isinstance(recorded, Mapping) and isinstance(current, Mapping):
        for key in recorded.keys() & current.keys():
            then, now = recorded[key], current[key]
            if key not in SAME or SAME[key].get(then, then) != now:
                yield from changes(then, now, f"{name}.{key}" if name else key)
    elif recorded != current:
        yield f"`{name}` {json.dumps(recorded)} → {json.dumps(current)}"


def section(report: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """The README's section in Markdown: aims, generation before and after DIGA, where and with what it was measured."""
    settings = report["settings"]["quickstart"]
    steps = [f"{settings[stage]['total_steps']:,}" for stage in ("gduf", "diga")]
    lines = [
        f"One run with seed {report['seed']}, {steps[0]} steps of GDUF and {steps[1]} of DIGA, on "
        f"{machine_line(report['environment'])}:",
        "",
        *_aims_table(report),
        "",
        *_generation_table(report),
    ]
    if other := sorted(changes(settings, current)):
        listed = "; ".join(other)
        lines += ["", f"**Not what `make quickstart` does now.** Settings that differ (recorded → now): {listed}."]
    return "\n".join(lines)


def _aims_table(report: Mapping[str, Any]) -> Iterator[str]:
    yield from ("| | value | aim | | what it is |", "|---|--:|--:|---|---|")
    names = {field.name for field in dataclasses.fields(Aim)}
    for entry in report["aims"]:
        view = aim_view(Aim(**{name: value for name, value in entry.items() if name in names}))
        yield f"| {view['name']} | {view['value']} | {view['aim'] or ''} | {view['verdict']} | {view['meaning']} |"


def _generation_table(report: Mapping[str, Any]) -> Iterator[str]:
    agreement, frechet, reference = report["agreement"], report["frechet"], report["reference"]
    yield from ("| images | prompt agreement | Fréchet distance |", "|---|--:|--:|")
    for name in dict.fromkeys([*agreement, *frechet]):
        read = percent(agreement[name]["accuracy"]) if name in agreement else ""
        yield f"| {name.replace('_', ' ')} | {read} | {number(frechet.get(name))} |"
    yield f"| real digits | {percent(reference['svm_accuracy'])} | {number(reference['frechet_train_matched'])} |"


def with_section(readme: str, text: str) -> str:
    """``readme`` with ``text`` between its marks. Raises ValueError unless each stands there once, in order."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"the README must hold {BEGIN} and then {END}, each once")
    return readme[: readme.index(BEGIN) + len(BEGIN)] + "\n" + text + "\n" + readme[readme.index(END) :]


def compose(pictures: Sequence[Image.Image], grids: Sequence[Mapping[str, Any]]) -> Image.Image:
    """The grids side by side, titles above, the prompts of their rows (which must agree) on the left; 8-bit grey."""
    prompts, (width, height) = grids[0]["rows"], pictures[0].size
    if any(grid["rows"] != prompts for grid in grids) or any(p.size != (width, height) for p in pictures):
        raise ValueError("the grids have different rows or sizes; they must be comparable side by side")
    label, title = (ImageFont.load_default(size) for size in (LABEL_SIZE, TITLE_SIZE))
    left = 2 * MARGIN + round(max(label.getlength(prompt) for prompt in prompts))
    top = 2 * MARGIN + TITLE_SIZE
    canvas = Image.new("L", (left + len(grids) * (width + MARGIN), top + height + MARGIN), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, prompt in enumerate(prompts):
        middle = top + round((i + 0.5) * height / len(prompts))
        draw.text((left - MARGIN, middle), prompt, INK, label, anchor="rm")
    for i, (grid, picture) in enumerate(zip(grids, pictures, strict=True)):
        x = left + i * (width + MARGIN)
        draw.text((x, MARGIN), grid["title"], INK, title, anchor="lt")
        rgba = picture.convert("RGBA")
        canvas.paste(rgba.convert("L"), (x, top), rgba.getchannel("A"))  # the gaps between samples are transparent
    return canvas


if __name__ == "__main__":
    sys.exit(main())
