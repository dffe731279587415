"""From a run's settings to the sources of its loader."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unigendet.config import ModelConfig
from unigendet.data.datasets import DetectionRecord, SampleBuilder, read_captions
from unigendet.data.entries import Malformed
from unigendet.data.labelled import FAKE_NAME, REAL_NAME, read_labelled, with_texts
from unigendet.data.shards import Item, Source
from unigendet.data.tokenizer import Tokenizer, load_tokenizer
from unigendet.model.settings import require_whole
from unigendet.training.config import AnnotationFile, TrainConfig, naming_setting

DETECTION, CAPTIONS = "detection", "captions"


@dataclass(frozen=True)
class DataSet:
    """One entry of ``datasets``: its kind, ``DETECTION`` or ``CAPTIONS``, its ``setting`` (``datasets.captions[0]``),
    its file or folder (``name``), and what reads it into its sources.

    ``read`` raises FileNotFoundError or ValueError that name what is wrong with the files. It may be given the list
    ``malformed`` of ``read_detection``.
    """

    kind: str
    setting: str
    name: str
    read: Callable[..., list[Source]]


def encodes_here(model: ModelConfig) -> bool:
    """Whether images are encoded in the training process, on its device; pixel latents are made by data workers."""
    return model.latent.autoencoder == "flux"


def sample_builder(config: TrainConfig, model: ModelConfig, tokenizer: Tokenizer, autoencoder: Any) -> SampleBuilder:
    """What makes the run's samples. Errors: ``SampleBuilder``'s."""
    encode = None if encodes_here(model) else autoencoder.encode
    return SampleBuilder(model, tokenizer, config.datasets.views, encode=encode)


def require_data_sets(config: TrainConfig) -> None:
    """Raise ValueError if the settings name no data set that ``config.stage`` learns from."""
    datasets = config.datasets
    if config.stage == "diga":
        if not datasets.captions:
            raise ValueError("datasets.captions is empty; DIGA needs annotation files with captions")
    elif not datasets.detection and not datasets.captions:
        raise ValueError("datasets.detection and datasets.captions are empty; GDUF needs annotation files")


def data_sets(config: TrainConfig, builder: SampleBuilder | None) -> Iterator[DataSet]:
    """The data sets that ``config.stage`` learns from, none of them read yet.

    ``builder``: None reads records that nothing can be built of. Raises ValueError if the settings name none.
    """
    require_data_sets(config)
    datasets = config.datasets
    build: Callable[..., Item] | None
    if config.stage == "gduf":
        build = builder and functools.partial(builder.detection, with_latent=datasets.detection_latents)
        question = datasets.views.question
        for i, entry in enumerate(datasets.detection):
            setting = f"datasets.{DETECTION}[{i}]"
            read = functools.partial(_detection, entry, setting, build, question)
            yield DataSet(DETECTION, setting, entry.file, read)
    build = builder and (builder.generation_with_teacher if config.stage == "diga" else builder.generation)
    for i, entry in enumerate(datasets.captions):
        yield DataSet(CAPTIONS, f"datasets.{CAPTIONS}[{i}]", entry.file, functools.partial(_captions, entry, build))


def build_sources(config: TrainConfig, builder: SampleBuilder) -> list[Source]:
    """The sources of all data sets that ``config.stage`` learns from. Errors: those of ``data_sets`` and ``read``."""
    return [source for data_set in data_sets(config, builder) for source in data_set.read()]


def _captions(
    entry: AnnotationFile, build: Callable[..., Item] | None, malformed: list[Malformed] | None = None
) -> list[Source]:
    return [Source(read_captions(entry.file, entry.image_root, malformed), build, entry.weight, entry.file)]


def _detection(
    entry: AnnotationFile,
    setting: str,
    build: Callable[..., Item] | None,
    question: str,
    malformed: list[Malformed] | None = None,
) -> list[Source]:
    """One source; of a balanced entry one for either label, each with half of its weight."""
    options = {"image_root": entry.image_root, "root_option": f"{setting}.image_root", "malformed": malformed}
    records = with_texts(read_labelled(entry.file, **options), question)
    if not entry.balance:
        return [Source(_with_label(records, entry, entry.label, setting), build, entry.weight, entry.file)]
    labels = ((1, REAL_NAME), (0, FAKE_NAME))
    return [Source(_with_label(records, entry, label, setting), build, entry.weight / 2, f"{entry.file} ({name})")
            for label, name in labels]  # fmt: skip


def _with_label(
    records: list[DetectionRecord], entry: AnnotationFile, label: int | None, setting: str
) -> list[DetectionRecord]:
    chosen = [record for record in records if label in (None, record.label)]
    if not chosen:
        asked = "balance is true" if entry.balance else f"label is {label}"
        which = f"label {label}" if entry.balance else "this label"
        raise ValueError(f"{setting}: {asked}, and {entry.file} has no record with {which}")
    return chosen


def tokenizer_setting(config: TrainConfig) -> str:
    """The setting that names the tokenizer's folder."""
    alone = config.model.tokenizer is None and config.model.checkpoint is not None
    return "model.checkpoint" if alone else "model.tokenizer"


def build_tokenizer(config: TrainConfig) -> Tokenizer:
    """The tokenizer that ``config.model`` names.

    Raises ValueError if it names none, and ``load_tokenizer``'s errors; all name the setting.
    """
    name, folder = tokenizer_setting(config), config.model.tokenizer or config.model.checkpoint
    if folder is None:
        raise ValueError("model.tokenizer is null; it must be a folder (only a checkpoint folder brings its own)")
    if not Path(folder).is_dir():
        own = "" if name == "model.tokenizer" else ", or model.tokenizer must be set: a file brings no tokenizer"
        what = f"it must be a folder{own}" if Path(folder).exists() else "there is no such folder"
        raise FileNotFoundError(f"{name} is {folder!r}; {what}")
    with naming_setting(name):
        require_whole(Path(folder))  # the weights are read later, and must be of the same save
        return load_tokenizer(folder)
