"""``unigendet data check``: whether a run could read all of its data, and what packs it would get."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigendet.commands.common import Commands, UserError, quiet_pillow
from unigendet.commands.progress import Progress
from unigendet.commands.rows import cell, check_out
from unigendet.commands.train import setting

if TYPE_CHECKING:
    from unigendet.data.check import Expectation, SourceCheck
    from unigendet.data.shards import Source
    from unigendet.training import TrainConfig

SHOWN = 20  # broken images
NAMED = 3  # samples that are too long
BARS = 12  # lines of a histogram, at most
MOST_WORKERS = 16
WIDTH = 40  # letters of its longest bar


def add(commands: Commands) -> None:
    """Describe the command."""
    check = commands.add(
        "check", run, "Read everything that a training run would read, and say what is broken and how packs fill.",
        epilog="Example: unigendet data check gduf.yaml loader.lookahead=32. It needs the tokenizer and the model's "
               "settings, but no weights and no GPU. The exit code is 1 if anything is broken.",
    )  # fmt: skip
    check.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the run")
    check.add_argument("overrides", nargs="*", type=setting, metavar="SETTING=VALUE",
                       help="a setting that wins over the file's, as for unigendet train")  # fmt: skip
    check.add_argument("--sample", type=int, metavar="N",
                       help="look at N images of each data set only (of a balanced one, of either label), evenly "
                            "spread; numbers are then estimates")  # fmt: skip
    check.add_argument("--workers", type=int, default=None, metavar="N",
                       help=f"processes that decode (default: one per CPU, at most {MOST_WORKERS}; 0: none "
                            "besides this one)")  # fmt: skip
    check.add_argument("--json", type=Path, metavar="FILE", help="write everything there, with all that is broken")


def run(options: argparse.Namespace) -> int:
    """Carry it out."""
    from unigendet.files import write_text
    from unigendet.training import load_train_config

    for name, least in (("sample", 1), ("workers", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}; it must be at least {least}")
    config = load_train_config(options.config, options.overrides)
    check_out(options.json, overwrite=True)
    sources, unread = _check(options, config)
    expected = _expected(config, sources, unread)
    for line in report(config, sources, unread, expected):
        print(line)
    broken = bool(unread) or any(source.broken for source in sources)
    if options.json is not None:
        found = as_json(config, sources, unread, expected)
        write_text(options.json, json.dumps({"ok": not broken, "sample": options.sample, **found}, indent=2) + "\n")
    return int(broken)


def _check(options: argparse.Namespace, config: TrainConfig) -> tuple[list[SourceCheck], list[str]]:
    """What was found in each source, and the errors of data sets that cannot be read at all."""
    from unigendet.data.check import SizedBuilder, check_source, chosen_records, decode_all
    from unigendet.training.preflight import model_settings
    from unigendet.training.sources import build_tokenizer, data_sets

    tokenizer = build_tokenizer(config)
    sizes: dict[Path, Any] = {}
    builder = SizedBuilder(model_settings(config, tokenizer), tokenizer, config.datasets.views, sizes)
    sources: list[Source] = []
    unread = []
    for data_set in data_sets(config, builder):
        try:
            sources += data_set.read()
        except (ValueError, OSError) as error:
            unread.append(str(error))
    chosen = (record for source in sources for record in chosen_records(source.records, options.sample))
    paths = list(dict.fromkeys(record.image for record in chosen))  # an image in several data sets is decoded once
    workers = min(os.cpu_count() or 1, MOST_WORKERS, len(paths)) if options.workers is None else options.workers
    quiet_pillow()
    with Progress("unigendet data check", len(paths)) as bar:
        sizes.update(zip(paths, decode_all(paths, workers, bar.advance), strict=True))
    limit = config.loader.max_sample_tokens
    return [check_source(source, options.sample, sizes, builder.length, limit) for source in sources], unread


def _expected(config: TrainConfig, sources: Sequence[SourceCheck], unread: list[str]) -> Expectation | None:
    """What packs to expect; None where a run would get none, which joins what cannot be read."""
    from unigendet.data.check import expected_packs

    unread += [f"{source.name} has no sample that a pack can hold" for source in sources if not source.usable]
    return None if unread else expected_packs(sources, config.loader)


def report(
    config: TrainConfig, sources: Sequence[SourceCheck], unread: Sequence[str], expected: Expectation | None
) -> Iterator[str]:
    """Everything for people, line by line."""
    for source in sources:
        yield from _source(source, config.loader.max_sample_tokens)
        yield ""
    if expected is not None:
        yield from _packs(config, sources, expected)
        yield ""
    broken = [one for source in sources for one in source.broken]
    for image, where, reason in broken[:SHOWN]:
        yield cell(f"{reason} ({where})" if image in reason else f"{image}: {reason} ({where})")
    if len(broken) > SHOWN:
        yield f"and {len(broken) - SHOWN:,} more (--json FILE lists all)"
    yield from map(cell, unread)
    if any("does not exist" in reason for _, _, reason in broken):
        yield "image_root says where the images of a data set are"
    checked = sum(source.checked for source in sources)
    wrong = f"{len(broken):,} of {checked:,} samples are broken"
    wrong += f"; {len(unread)} data sets are of no use" if unread else ""
    yield wrong if broken or unread else f"nothing is broken in {checked:,} samples"


def _source(source: SourceCheck, limit: int) -> Iterator[str]:
    yield cell(source.name)
    labels = "" if source.labels is None else f": {source.labels[0]:,} real, {source.labels[1]:,} fake"
    looked = "" if source.checked == source.records else f", {source.checked:,} of them looked at"
    yield f"  records  {source.records:,}{labels}{looked}"
    yield f"  broken   {len(source.broken):,}"
    if not source.lengths:
        return
    quantiles = source.quantiles()
    names = {"min": "least", "median": "median", "p95": "95 % up to", "max": "most"}
    yield "  tokens   " + ", ".join(f"{names[key]} {value:,}" for key, value in quantiles.items())
    named = ", ".join(f"{cell(name)} ({tokens:,})" for name, tokens in source.too_long[:NAMED])
    more = ", …" if len(source.too_long) > NAMED else ""
    yield f"  above loader.max_sample_tokens = {limit:,}: {len(source.too_long):,}" + (f": {named}{more}" * bool(named))
    yield from (f"    {line}" for line in histogram(source.lengths))


def histogram(values: Sequence[int]) -> list[str]:
    """Bars of how many values lie in which range, at most ``BARS`` of them, with round limits."""
    least, most = min(values), max(values)
    rough = max(1, (most - least + 1) / (BARS - 1))
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    counts: dict[int, int] = dict.fromkeys(range(least // step * step, most + 1, step), 0)
    for value in values:
        counts[value // step * step] += 1
    width = len(f"{most + step:,}")
    tallest = max(counts.values())
    lines = []
    for begin, count in counts.items():
        bar = "#" * math.ceil(WIDTH * count / tallest)
        lines.append(f"{begin:>{width},} to {begin + step - 1:>{width},}  {count / len(values):6.1%}  {bar}".rstrip())
    return lines


def _packs(config: TrainConfig, sources: Sequence[SourceCheck], expected: Expectation) -> Iterator[str]:
    fill = expected.fill
    yield (
        f"packs of {fill.max_tokens:,} tokens with loader.lookahead = {config.loader.lookahead} (from {fill.packs:,} "
        "that were packed for this, before texts and images are dropped)"
    )
    emptiest = fill.least / fill.max_tokens
    yield f"  {fill.per_pack:.2f} samples a pack, {fill.share:.1%} full, the emptiest {emptiest:.1%}"
    total = sum(fill.samples)
    for source, drawn, packs in zip(sources, fill.samples, expected.epochs, strict=True):
        yield f"  {drawn / total:6.1%} of the samples, {packs:,.0f} packs an epoch: {cell(source.name)}"
    if (real := _share_of_real(sources, expected)) is not None:
        yield f"  real images among the labelled ones: {real:.1%}"


def _share_of_real(sources: Sequence[SourceCheck], expected: Expectation) -> float | None:
    """Of the labelled samples that are drawn; None without any."""
    labelled = [(s.labels[0] / s.records, n) for s, n in zip(sources, expected.fill.samples, strict=True) if s.labels]
    total = sum(drawn for _, drawn in labelled)
    return sum(real * drawn for real, drawn in labelled) / total if total else None


def as_json(
    config: TrainConfig, sources: Sequence[SourceCheck], unread: Sequence[str], expected: Expectation | None
) -> dict[str, Any]:
    """Everything for programs."""
    found: dict[str, Any] = {"sources": [source.to_json() for source in sources], "unread": list(unread), "packs": None}
    if expected is not None:
        fill = expected.fill
        found["packs"] = {
            "max_tokens": fill.max_tokens,
            "lookahead": config.loader.lookahead,
            "packed": fill.packs,
            "samples_per_pack": fill.per_pack,
            "fill": fill.share,
            "least_fill": fill.least / fill.max_tokens,
            "samples": list(fill.samples),
            "packs_per_epoch": list(expected.epochs),
            "real": _share_of_real(sources, expected),
        }
    return found
