"""``unigendet data check``: whether a run could read all of its data, and what packs it would get."""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigendet.commands.common import Commands, UserError, quiet_pillow
from unigendet.commands.progress import Progress
from unigendet.commands.rows import check_out
from unigendet.commands.train import setting

if TYPE_CHECKING:
    from unigendet.data.check import Findings, Record, SourceCheck
    from unigendet.data.datasets import DetectionRecord, SampleBuilder
    from unigendet.data.shards import Source
    from unigendet.training import TrainConfig

MOST_WORKERS = 16
HELD_OUT = "held_out"  # beside the kinds of data sets


def add(commands: Commands) -> None:
    """Describe the command."""
    check = commands.add(
        "check", run, "Read everything that a training run would read, and say what is wrong and how packs fill.",
        epilog="Example: unigendet data check gduf.yaml loader.lookahead=32. It needs the tokenizer and the model's "
               "settings, but no weights and no GPU. With watch.every, held-out images and prompts are read too. The "
               "exit code is 1 if images are broken, entries malformed, or labels contradict their answers or each "
               "other.",
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
    check.add_argument("--json", type=Path, metavar="FILE", help="write everything there, with all that is wrong")


def run(options: argparse.Namespace) -> int:
    """Carry it out."""
    from unigendet.commands.data_report import as_json, report, verdict
    from unigendet.files import write_text
    from unigendet.training import load_train_config

    for name, least in (("sample", 1), ("workers", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}; it must be at least {least}")
    config = load_train_config(options.config, options.overrides)
    check_out(options.json, overwrite=True)
    found = _check(options, config)
    for line in report(found, config.loader):
        print(line)
    wrong = bool(verdict(found))
    if options.json is not None:
        everything = {"ok": not wrong, "sample": options.sample, **as_json(found, config.loader)}
        write_text(options.json, json.dumps(everything, indent=2) + "\n")
    return int(wrong)


def _check(options: argparse.Namespace, config: TrainConfig) -> Findings:
    """Read annotations, look at what they say, decode images, and expect packs."""
    from unigendet.data.check import SizedBuilder, check_images, chosen_records, expected_packs
    from unigendet.data.datasets import check_views
    from unigendet.data.labelled import limit_evenly
    from unigendet.training.preflight import model_settings
    from unigendet.training.sources import build_tokenizer

    tokenizer = build_tokenizer(config)
    sizes: dict[Path, Any] = {}
    model = model_settings(config, tokenizer)
    check_views(config.datasets.views, model, "datasets.views")
    builder = SizedBuilder(model, tokenizer, config.datasets.views, sizes)
    found, sources, held_out = _read(config, builder)
    _check_annotations(found, sources, held_out)
    chosen = [chosen_records(source.records, options.sample) for _, source in sources]
    seen = chosen_records(limit_evenly(held_out, config.watch.limit), options.sample) if held_out else []
    _decode(options, [*chosen, seen], sizes)
    for (one, source), records in zip(sources, chosen, strict=True):
        tokens = functools.partial(_tokens, source.build, builder.length)
        check_images(one, records, sizes, tokens, config.loader.max_sample_tokens)
        if not one.usable and not one.lost:
            found.unread.append(f"{one.name} has no sample that a pack can hold")
    if found.held_out is not None:
        check_images(found.held_out, seen, sizes)
    if all(one.usable for one in found.sources):
        found.expected = expected_packs(found.sources, config.loader)
    return found


def _read(
    config: TrainConfig, builder: SampleBuilder
) -> tuple[Findings, list[tuple[SourceCheck, Source]], list[DetectionRecord]]:
    """The annotations of all sources and of held-out images; what cannot be read at all has a check all the same."""
    from unigendet.data.check import Findings, SourceCheck
    from unigendet.training.sources import data_sets
    from unigendet.training.watched import held_out_records, watched_prompts

    found, sources, held_out = Findings(), [], []
    for data_set in data_sets(config, builder):
        root = None if Path(data_set.name).is_dir() else f"{data_set.setting}.image_root"
        try:
            read = data_set.read(found.malformed)
        except (ValueError, OSError) as error:
            found.sources.append(SourceCheck(data_set.name, data_set.kind, root=root, error=str(error)))
            found.unread.append(str(error))
            continue
        own = [SourceCheck(source.name, data_set.kind, source.weight, root) for source in read]
        found.sources += own
        sources += zip(own, read, strict=True)
    watch = config.watch
    if watch.every and watch.detection is not None:
        root = None if Path(watch.detection).is_dir() else "watch.image_root"
        found.held_out = SourceCheck(watch.detection, HELD_OUT, root=root)
        try:
            held_out = held_out_records(watch, found.malformed)
        except (ValueError, OSError) as error:
            found.held_out.error = str(error)
            found.unread.append(str(error))
    if watch.every:
        try:
            found.prompts = len(watched_prompts(watch))
        except (ValueError, OSError) as error:
            found.unread.append(str(error))
    return found, sources, held_out


def _check_annotations(
    found: Findings, sources: list[tuple[SourceCheck, Source]], held_out: list[DetectionRecord]
) -> None:
    """Put into ``found`` what the records say, each source by itself and all together."""
    from unigendet.data.check import check_annotations
    from unigendet.data.consistency import RealPaths, with_both_labels
    from unigendet.data.datasets import DetectionRecord

    real_path = RealPaths()
    apart = [real_path(record.image) for record in held_out]
    images, labelled = [*apart], [*held_out]
    if found.held_out is not None and held_out:
        check_annotations(found.held_out, held_out, apart)
    held_out_images = set(apart)
    for one, source in sources:
        own = [real_path(record.image) for record in source.records]
        check_annotations(one, source.records, own, held_out_images)
        if isinstance(source.records[0], DetectionRecord):
            images += own
            labelled += source.records
    found.both_labels = with_both_labels(images, labelled)


def _decode(options: argparse.Namespace, chosen: list[list[Record]], sizes: dict[Path, Any]) -> None:
    """Decode the images of all records into ``sizes``, each once even if it is in several data sets."""
    from unigendet.data.check import decode_all

    paths = list(dict.fromkeys(record.image for records in chosen for record in records))
    workers = min(os.cpu_count() or 1, MOST_WORKERS, len(paths)) if options.workers is None else options.workers
    quiet_pillow()
    with Progress("unigendet data check", len(paths)) as bar:
        sizes.update(zip(paths, decode_all(paths, workers, bar.advance), strict=True))


def _tokens(build: Callable[[Record], Any], length: Callable[[Any], int], record: Record) -> int:
    """Those of a record's sample; of a student and its teacher, the student's."""
    item = build(record)
    return length(item[0] if isinstance(item, tuple) else item)
