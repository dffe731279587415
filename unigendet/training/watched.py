"""What a run's looks at its model are at: prompts, and held-out images with their labels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unigendet.config import check
from unigendet.data.datasets import DetectionRecord
from unigendet.data.entries import Malformed
from unigendet.data.labelled import check_present, limit_evenly, read_labelled
from unigendet.data.prompts import read_prompts
from unigendet.training.config import TrainConfig, WatchConfig, naming_setting


@dataclass(frozen=True)
class Watched:
    """What a run's looks are at: ``prompts``, and ``held_out`` images with their labels."""

    prompts: tuple[str, ...]
    held_out: tuple[DetectionRecord, ...]


def read_watched(config: TrainConfig, read: Callable[..., Any] = lambda function, *settings: function()) -> Watched:
    """Read what ``config.watch`` names.

    ``read`` calls the functions that read files, each given with the settings that name them; it may give None where a
    file is not there.

    Raises:
        FileNotFoundError: the file of prompts, the held-out images' file or folder, or one of the images is not there.
        ValueError: there is nothing to look at or nowhere to write to, or a file is malformed or empty. Both name the
            setting.
    """
    require_watched(config)
    prompts = read(functools.partial(watched_prompts, config.watch), "watch.prompts_file")
    records = read(functools.partial(_held_out, config.watch), "watch.detection", "watch.image_root")
    return Watched(prompts or (), records or ())


def require_watched(config: TrainConfig) -> None:
    """Raise ValueError if the settings name nothing to look at, or nowhere to write to."""
    watch = config.watch
    check(config.output is not None, "output", config.output, "a folder for watch.every to write to")
    seen = bool(watch.prompts) or watch.prompts_file is not None or watch.detection is not None
    check(seen, "watch.every", watch.every, "0 without watch.prompts, watch.prompts_file and watch.detection")


def watched_prompts(watch: WatchConfig) -> tuple[str, ...]:
    """The prompts that ``watch`` names. Errors: see ``read_watched``."""
    if watch.prompts_file is None:
        return watch.prompts
    if not Path(watch.prompts_file).is_file():
        raise FileNotFoundError(f"watch.prompts_file is {watch.prompts_file!r}; there is no such file")
    with naming_setting("watch.prompts_file"):
        records = read_prompts(watch.prompts_file)
    for record in records:
        alone = record.seed is None and record.size is None and not record.images
        check(alone, f"watch.prompts_file: {record.where}", record.prompt, "a prompt without seed, size and images")
    return tuple(record.prompt for record in records)


def held_out_records(watch: WatchConfig, malformed: list[Malformed] | None = None) -> list[DetectionRecord]:
    """All records of ``watch.detection``, whether their images are there or not; none if it is null.

    ``malformed``: see ``read_detection``. Errors: see ``read_watched``.
    """
    if watch.detection is None:
        return []
    if not Path(watch.detection).exists():
        raise FileNotFoundError(f"watch.detection is {watch.detection!r}; there is no such file or folder")
    options = {"image_root": watch.image_root, "root_option": "watch.image_root", "malformed": malformed}
    with naming_setting("watch.detection"):
        return read_labelled(watch.detection, **options)


def _held_out(watch: WatchConfig) -> tuple[DetectionRecord, ...]:
    """The held-out images that are looked at; all of them are there. Errors: see ``read_watched``."""
    records = limit_evenly(held_out_records(watch), watch.limit)
    try:
        check_present(records, "watch.image_root")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"watch.detection is {watch.detection!r}; {error}") from error
    return tuple(records)
