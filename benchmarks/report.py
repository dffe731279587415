"""Turn recorded benchmark results into documents and plots: ``python -m benchmarks.report``.

Writes the generated sections of README.md and docs/performance.md and the pictures in docs/images/performance/ from the
results of a folder. ``--check`` writes nothing and exits with 1 unless all of them are what the results give; a picture
is known by the fingerprint of its data, so nothing is drawn. ``--out DIR`` writes one report with pictures into DIR.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import tables, targets
from .environment import RESULTS, ROOT
from .plots import fingerprint, fingerprint_of, plots
from .recorded import BENCHMARKS, Device, Recorded, Result, load

README = ROOT / "README.md"
DOCUMENT = ROOT / "docs" / "performance.md"
PICTURES = ROOT / "docs" / "images" / "performance"
HOPPER_NAME, CPU_NAME = "H100/H200-class GPU", "CPU"
NOT_MEASURED = "not measured"
SUMMARY = "performance"  # the mark of the README's section

SPECIAL = ("decoder_layer", "training_step", "packing_cost", "scaling")  # benchmarks with sections of their own
COST_COLUMNS = ("op", "trace or shape", "backend", ">ms (20–80 %)", ">speed-up", ">peak MiB", "right?")
HEADLINE_COLUMNS = (*tables.CASE, "backend", ">ms (20–80 %)", ">of ceiling", ">speed-up")
HEADLINE_STEPS = ("op", "trace or shape", "backend", ">ms (20–80 %)", ">tokens/s", ">MFU", ">speed-up", ">peak MiB")
ALT = {
    "roofline": "Roofline: rate against useful FLOPs per byte, under the measured ceilings",
    "peers": "Speed-up of our best backend over each peer, by op",
    "scaling": "Picoseconds per useful FLOP along each sweep",
}

Links = Callable[[Device, str], str | None]  # where a document finds a device's picture; None: it is not drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="the results (default: recorded)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write one report here, not the documents")
    parser.add_argument("--check", action="store_true", help="only check that the documents say what is recorded")
    options = parser.parse_args(arguments)
    if options.check and options.out:
        parser.error("--check takes no --out: it compares the documents with the results")
    if options.out:
        print(write_report(options.results, options.out))
        return 0
    recorded = load(options.results)
    if not options.check:
        write_documents(recorded)
        return 0
    found = differences(recorded)
    for line in found:
        print(line, file=sys.stderr)
    if found:
        print("run python -m benchmarks.report", file=sys.stderr)
    return int(bool(found))


def write_report(results: Path, out: Path) -> Path:
    """Write ``report.md``, with pictures beside it in ``images/``, from the results in ``<results>/<device>/*.json``.

    Returns the path of the report. Without matplotlib it holds the tables, and says what pictures need.
    """
    recorded = load(results)
    drawn = importlib.util.find_spec("matplotlib") is not None
    links = (lambda device, plot: f"images/{device.slug}-{plot}.png") if drawn else (lambda device, plot: None)
    lines = ["# Benchmark report", "", *summary(recorded, lambda device, plot: None), ""]
    for name, (title, section) in SECTIONS.items():
        lines += [f"## {title}", "", *section(recorded, links), ""]
        if name == "ops" and not drawn:
            lines += ["Plots need matplotlib, which is not installed: `pip install 'unigendet[bench]'`.", ""]
    out.mkdir(parents=True, exist_ok=True)
    if drawn:
        draw_all(recorded, out / "images")
    file = out / "report.md"
    file.write_text(_joined(lines) + "\n", encoding="utf-8")
    return file


def write_documents(recorded: Recorded) -> None:
    """Write the sections of README and document, draw the pictures, and remove pictures that nothing gives."""
    for file, wanted in wanted_texts(recorded).items():
        text = file.read_text(encoding="utf-8")
        for mark, section in wanted.items():
            text = with_section(text, mark, section, file.name)
        file.write_text(text, encoding="utf-8")
    for stray in set(PICTURES.glob("*.png")) - wanted_pictures(recorded).keys():
        stray.unlink()
    draw_all(recorded, PICTURES)


def draw_all(recorded: Recorded, folder: Path) -> None:
    """Draw every plot of every device into ``folder``."""
    if not any(plots(device) for device in recorded.devices):
        return
    from .figures import draw  # matplotlib, which tables do not need

    for device in recorded.devices:
        for name, data in plots(device).items():
            draw(name, data, folder / f"{device.slug}-{name}.png")


def differences(recorded: Recorded) -> list[str]:
    """What of the documents and pictures is not what the results give, one line for each."""
    found = []
    for file, wanted in wanted_texts(recorded).items():
        text = file.read_text(encoding="utf-8")
        changed = [mark for mark, section in wanted.items() if with_section(text, mark, section, file.name) != text]
        found += [f"{file.name}: the section {mark!r} does not say what is recorded" for mark in changed]
    pictures = wanted_pictures(recorded)
    for file, data in pictures.items():
        if not file.exists():
            found.append(f"{file.name}: the picture is missing")
        elif fingerprint_of(file) != fingerprint(data):
            found.append(f"{file.name}: the picture was drawn from other data than are recorded")
    strays = sorted(set(PICTURES.glob("*.png")) - pictures.keys())
    return found + [f"{file.name}: the picture belongs to no result" for file in strays]


def wanted_texts(recorded: Recorded) -> dict[Path, dict[str, str]]:
    """What must stand between which marks of which document."""
    from_readme = lambda device, plot: (PICTURES / f"{device.slug}-{plot}.png").relative_to(README.parent)  # noqa: E731
    from_document = lambda device, plot: (PICTURES / f"{device.slug}-{plot}.png").relative_to(DOCUMENT.parent)  # noqa: E731
    parts = {f"{SUMMARY}:{name}": _joined(part(recorded, from_document)) for name, (_, part) in SECTIONS.items()}
    return {README: {SUMMARY: _joined(readme_section(recorded, from_readme))}, DOCUMENT: parts}


def wanted_pictures(recorded: Recorded) -> dict[Path, dict[str, Any]]:
    """The pictures that must be there, with their data."""
    return {
        PICTURES / f"{device.slug}-{name}.png": data
        for device in recorded.devices
        for name, data in plots(device).items()
    }


def with_section(document: str, mark: str, text: str, name: str) -> str:
    """``document`` with ``text`` between its marks. Raises ValueError unless each stands there once, in order."""
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
        raise ValueError(f"{name} must hold {begin} and then {end}, each once")
    return document[: document.index(begin) + len(begin)] + "\n" + text + "\n" + document[document.index(end) :]


def _joined(lines: Sequence[str]) -> str:
    """Lines as a text, without blank lines at its end or two in a row."""
    kept = [line for i, line in enumerate(lines) if line or (i and lines[i - 1])]
    return "\n".join(kept).rstrip("\n")


# Sections


def summary(recorded: Recorded, links: Links) -> list[str]:
    """For each device the best of ours in each op's headline case, and the training steps."""
    lines = _missing(recorded)
    for device in recorded.devices:
        cases, steps = device.headlines(), device.steps()
        used = list({id(result): result for result, _ in (*cases, *steps)}.values())
        if used:
            lines += ["", " · ".join([f"**{tables.text(device.name)}**", *_background(used), *_marks(used)]), ""]
        if cases:
            lines += [*tables.headline(cases, HEADLINE_COLUMNS), ""]
        if steps:
            lines += [*tables.headline(steps, HEADLINE_STEPS), ""]
        if absent := [name for name in BENCHMARKS if name not in device.results]:
            lines += [f"**{tables.text(device.name)}** · {NOT_MEASURED}: {', '.join(absent)}.", ""]
    return [*lines, *_pictures(recorded.devices[:1], ("peers", "roofline"), links)]


def readme_section(recorded: Recorded, links: Links) -> list[str]:
    """The README's section: the summary, and where the rest is."""
    where = "All tables, the targets, and how it was measured: [docs/performance.md](docs/performance.md)."
    return [*summary(recorded, links), "", where]


def _targets(recorded: Recorded, links: Links) -> list[str]:
    lines = []
    for name, hopper, chosen in ((HOPPER_NAME, True, targets.HOPPER), (CPU_NAME, False, targets.CPU)):
        for device in recorded.of_class(hopper) or [None]:
            title = f"**{name}:** {NOT_MEASURED}" if device is None else f"**{tables.text(device.name)}**"
            lines += [title, "", *tables.targets(device, chosen), ""]
    return lines


def _machines(recorded: Recorded, links: Links) -> list[str]:
    lines = _missing(recorded)
    for device in recorded.devices:
        lines += ["", *tables.machine(device)]
    return lines


def _ops(recorded: Recorded, links: Links) -> list[str]:
    lines = _missing(recorded)
    for device in recorded.devices:
        lines += ["", *_pictures([device], ("peers", "roofline"), links)]
        for name, result in device.results.items():
            if name not in SPECIAL:
                lines += ["", *tables.of_result(device, result)]
        absent = [name for name in BENCHMARKS if name not in SPECIAL and name not in device.results]
        if absent:
            lines += ["", f"**{tables.text(device.name)}** · {NOT_MEASURED}: {', '.join(absent)}."]
    return lines


def _one(benchmark: str, write: Callable[[Device, Result], list[str]], plot: str | None = None) -> Callable[..., Any]:
    """A section on one benchmark."""

    def section(recorded: Recorded, links: Links) -> list[str]:
        lines = _missing(recorded)
        for device in recorded.devices:
            result = device.results.get(benchmark)
            own = [f"**{tables.text(device.name)}** · {NOT_MEASURED}."] if result is None else write(device, result)
            pictures = [] if plot is None else _pictures([device], (plot,), links)
            lines += ["", *own, "", *pictures]
        return lines

    return section


def _missing(recorded: Recorded) -> list[str]:
    """A line for each class of device of which nothing was recorded, and for each file that could not be read."""
    classes = ((HOPPER_NAME, True), (CPU_NAME, False))
    lines = [f"**{name}:** {NOT_MEASURED}." for name, hopper in classes if not recorded.of_class(hopper)]
    lines += [f"**Unreadable:** `{file}`: {tables.text(why)}." for file, why in recorded.unreadable.items()]
    return [part for line in lines for part in (line, "")]


def _pictures(devices: Sequence[Device], names: Sequence[str], links: Links) -> list[str]:
    lines = []
    for device in devices:
        for name in (name for name in names if name in plots(device)):
            if (link := links(device, name)) is not None:
                lines += [f"![{ALT[name]}, {device.name}]({link})", ""]
    return lines


def _background(results: Sequence[Result]) -> list[str]:
    """Platform, PyTorch, commit and ceilings of results, as far as they share them."""
    environments = [result.environment for result in results]
    shared = {
        "platforms": [environment.get("platform", "unknown") for environment in environments],
        "versions of PyTorch": [f"PyTorch {e.get('versions', {}).get('torch', 'unknown')}" for e in environments],
        "commits": [f"commit {result.commit}" for result in results],
    }
    parts = [values[0] if len(set(values)) == 1 else f"{len(set(values))} {name}" for name, values in shared.items()]
    for name, key, unit in (("matrix product", "matmul_tflops", "TFLOP/s"), ("copy", "copy_gbs", "GB/s")):
        rates = sorted(result.ceilings[key] for result in results if key in result.ceilings)
        if rates:
            shown = dict.fromkeys(tables.number(rate) for rate in (rates[0], rates[-1]))
            parts.append(f"{name} {'–'.join(shown)} {unit}")
    return parts


def _marks(results: Sequence[Result]) -> list[str]:
    """What of the results is stale or incomplete."""
    groups = {
        tables.STALE: [result.benchmark for result in results if result.stale],
        tables.INCOMPLETE: [result.benchmark for result in results if not result.complete],
    }
    return [
        mark if len(names) == len(results) else f"{mark} ({', '.join(names)})"
        for mark, names in groups.items()
        if names
    ]


SECTIONS: dict[str, tuple[str, Callable[[Recorded, Links], list[str]]]] = {
    "targets": ("Targets", _targets),
    "machines": ("Machines", _machines),
    "ops": ("Operations", _ops),
    "decoder_layer": ("Decoder layer", _one("decoder_layer", tables.of_result)),
    "training_step": (
        "Training step",
        _one("training_step", lambda device, result: tables.of_result(device, result, tables.STEP_COLUMNS)),
    ),
    "shares": ("Where the time goes", _one("training_step", tables.shares)),
    "packing_cost": (
        "Host work per pack",
        _one("packing_cost", lambda device, result: tables.of_result(device, result, COST_COLUMNS)),
    ),
    "scaling": ("Scaling", _one("scaling", tables.scaling, "scaling")),
}


if __name__ == "__main__":
    sys.exit(main())
