"""Checks of data sets before a run: every image decoded once, every sample's tokens counted, without a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from unigendet.config import DataConfig, LoaderConfig, ModelConfig
from unigendet.data.datasets import CaptionRecord, DetectionRecord, SampleBuilder
from unigendet.data.fill import Fill, packing_fill
from unigendet.data.loader import as_it_is, leave_signals_to_the_parent
from unigendet.data.shards import Source
from unigendet.data.tokenizer import Tokenizer
from unigendet.data.transforms import BrokenImageError, read_image
from unigendet.packing import Sample

Size = tuple[int, int]  # width, height in pixels
Record = DetectionRecord | CaptionRecord


class _Decoded:
    """Image files by number: their upright size, or why they cannot be read. What data workers map over."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> Size | str:
        try:
            return read_image(self._paths[i]).size
        except (BrokenImageError, FileNotFoundError) as error:
            return str(error)


def decode_all(
    paths: Sequence[Path], workers: int = 0, progress: Callable[[], None] = lambda: None
) -> Iterator[Size | str]:
    """Decode image files completely, each once, in so many processes (0: in this one).

    Yields, in the order of ``paths``, the (width, height) that ``read_image`` gives, or its error's text. ``progress``
    is called after each.
    """
    if workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as in the loader
    loader = DataLoader(
        _Decoded(paths),
        batch_size=None,
        num_workers=workers,
        collate_fn=as_it_is,
        worker_init_fn=leave_signals_to_the_parent,
        prefetch_factor=16 if workers else None,
    )
    for size in loader:
        progress()
        yield size


class SizedBuilder(SampleBuilder):
    """Builds samples whose images have a shape and no contents, from the sizes of image files.

    So what a sample consists of is said in one place, and its tokens are those that training will see.
    """

    def __init__(
        self, model: ModelConfig, tokenizer: Tokenizer, data: DataConfig, sizes: Mapping[Path, Size | str]
    ) -> None:
        super().__init__(model, tokenizer, data)
        self._sizes = sizes

    def views(self, image: Any) -> tuple[Tensor, Tensor]:
        """Both views of the image of this path, on the meta device."""
        return tuple(
            torch.empty((1, *reversed(transform.size_of(*self._sizes[image]))), device="meta")
            for transform in (self.latent_view, self.vit_view)
        )

    def _latent_of(self, record: CaptionRecord) -> Tensor:
        return self.views(record.image)[0]


@dataclass
class SourceCheck:
    """What was found in one source: of its ``records``, those ``checked`` have ``lengths`` in tokens or are broken.

    ``labels``: how many records are (real, fake); None for captions. ``too_long``: (name, tokens) of the samples that
    no pack may hold. ``broken``: (image, place, reason).
    """

    name: str
    weight: float
    records: int
    labels: tuple[int, int] | None
    checked: int = 0
    lengths: list[int] = field(default_factory=list)
    too_long: list[tuple[str, int]] = field(default_factory=list)
    broken: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def usable(self) -> int:
        """How many of the checked samples a pack can hold."""
        return len(self.lengths) - len(self.too_long)

    def quantiles(self) -> dict[str, int]:
        """Tokens of a sample: the least, the median, the 95th percentile and the most."""
        values = np.quantile(self.lengths, (0, 0.5, 0.95, 1), method="higher")
        return dict(zip(("min", "median", "p95", "max"), map(int, values), strict=True))

    def to_json(self) -> dict[str, Any]:
        """Everything, with names."""
        labels = None if self.labels is None else dict(zip(("real", "fake"), self.labels, strict=True))
        return {
            "name": self.name,
            "weight": self.weight,
            "records": self.records,
            "labels": labels,
            "checked": self.checked,
            "tokens": self.quantiles() if self.lengths else None,
            "too_long": [{"name": name, "tokens": tokens} for name, tokens in self.too_long],
            "broken": [dict(zip(("image", "where", "reason"), one, strict=True)) for one in self.broken],
        }


def chosen_records(records: Sequence[Record], most: int | None) -> list[Record]:
    """At most so many records, evenly over the sequence; None: all."""
    if most is None or most >= len(records):
        return list(records)
    return [records[i * len(records) // most] for i in range(most)]


def check_source(
    source: Source, most: int | None, sizes: Mapping[Path, Size | str], length: Callable[[Sample], int], limit: int
) -> SourceCheck:
    """Build a sample of each chosen record and count its tokens.

    Args:
        source: its ``build`` is a ``SizedBuilder``'s.
        most: see ``chosen_records``.
        sizes: what ``decode_all`` gave for every chosen record's image.
        length: tokens of a sample.
        limit: ``max_sample_tokens``.
    """
    chosen = chosen_records(source.records, most)
    labels = None
    if isinstance(chosen[0], DetectionRecord):
        real = sum(record.label for record in source.records)
        labels = real, len(source.records) - real
    found = SourceCheck(source.name, source.weight, len(source.records), labels, len(chosen))
    for i, record in enumerate(chosen):
        where = record.where or f"{source.name}, image {i}"
        if isinstance(reason := sizes[record.image], str):
            found.broken.append((str(record.image), where, reason))
            continue
        try:
            item = source.build(record)
        except ValueError as error:  # a text that is none
            found.broken.append((str(record.image), where, str(error)))
            continue
        tokens = length(item if isinstance(item, Sample) else item[0])
        found.lengths.append(tokens)
        if tokens > limit:
            found.too_long.append((str(record.image), tokens))
    return found


@dataclass(frozen=True)
class Expectation:
    """What packs the sources will give: ``fill``, measured on some packs, and each source's packs per epoch."""

    fill: Fill
    epochs: tuple[float, ...]


def expected_packs(sources: Sequence[SourceCheck], config: LoaderConfig, packs: int = 500) -> Expectation:
    """Pack the lengths that were found. An epoch of a source is over when each of its records was drawn once.

    Raises ValueError if a source has no usable sample.
    """
    for source in sources:
        if not source.usable:
            raise ValueError(f"{source.name} has no sample that a pack can hold")
    fill = packing_fill([s.lengths for s in sources], [s.weight for s in sources], config, packs)
    epochs = []
    for source, drawn in zip(sources, fill.samples, strict=True):
        usable = source.records * source.usable / source.checked
        epochs.append(usable * fill.packs / drawn if drawn else float("inf"))
    return Expectation(fill, tuple(epochs))
