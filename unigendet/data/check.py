"""Checks of data sets before a run: every image decoded once, every sample's tokens counted, without a model."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from unigendet.config import DataConfig, LoaderConfig, ModelConfig
from unigendet.data.consistency import Answer, BothLabels, check_answers, repeated
from unigendet.data.datasets import CaptionRecord, DetectionRecord, SampleBuilder
from unigendet.data.entries import Malformed
from unigendet.data.fill import Fill, packing_fill
from unigendet.data.loader import as_it_is, leave_signals_to_the_parent
from unigendet.data.tokenizer import Tokenizer
from unigendet.data.transforms import BrokenImageError, read_image

Size = tuple[int, int]  # width, height in pixels
Record = DetectionRecord | CaptionRecord


@dataclass(frozen=True)
class Unreadable:
    """Why an image file cannot be read; ``missing``: there is no such file."""

    reason: str
    missing: bool


class _Decoded:
    """Image files by number: their upright size, or why they cannot be read. What data workers map over."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> Size | Unreadable:
        try:
            return read_image(self._paths[i]).size
        except (BrokenImageError, FileNotFoundError) as error:
            return Unreadable(str(error), missing=isinstance(error, FileNotFoundError))


def decode_all(
    paths: Sequence[Path], workers: int = 0, progress: Callable[[], None] = lambda: None
) -> Iterator[Size | Unreadable]:
    """Decode image files completely, each once, in so many processes (0: in this one).

    Yields, in the order of ``paths``, the (width, height) that ``read_image`` gives, or its error. ``progress`` is
    called after each.
    """
    if workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as in the loader
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than there are CPUs
        found = iter(
            DataLoader(
                _Decoded(paths),
                batch_size=None,
                num_workers=workers,
                collate_fn=as_it_is,
                worker_init_fn=_begin_worker,
                prefetch_factor=16 if workers else None,
            )
        )
    for size in found:
        progress()
        yield size


def _begin_worker(worker: int) -> None:
    """In a worker: signals are the parent's, and so are messages. What decoders write to standard error themselves,
    a line or more for each damaged file and without its name, would bury them.
    """
    leave_signals_to_the_parent(worker)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


class SizedBuilder(SampleBuilder):
    """Builds samples whose images have a shape and no contents, from the sizes of image files.

    So what a sample consists of is said in one place, and its tokens are those that training will see.
    """

    def __init__(
        self, model: ModelConfig, tokenizer: Tokenizer, data: DataConfig, sizes: Mapping[Path, Size | Unreadable]
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


@dataclass(frozen=True)
class Broken:
    """A record of no use: its image, its place, and why; ``missing``: there is no such image."""

    image: str
    where: str
    reason: str
    missing: bool = False


@dataclass
class SourceCheck:
    """What was found in one source: of its ``records``, the images of those ``checked`` were decoded.

    ``kind``: detection, captions or held_out. ``root``: the setting that says what its image paths are relative to;
    None where nothing does. ``labels``: how many records are (real, fake); None for captions. ``lengths``: tokens of
    the samples that are not broken; of held-out images, which are in no pack, there are none. ``too_long``: (name,
    tokens) of the samples that no pack may hold. ``contradictions``, ``undecided``: see ``check_answers``. ``repeated``
    images and how often they occur. ``held_out_too``: images that are among the held-out ones. ``error``: why it cannot
    be read at all.
    """

    name: str
    kind: str
    weight: float | None = None
    root: str | None = None
    records: int = 0
    labels: tuple[int, int] | None = None
    checked: int = 0
    lengths: list[int] = field(default_factory=list)
    too_long: list[tuple[str, int]] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    contradictions: list[Answer] = field(default_factory=list)
    undecided: list[Answer] = field(default_factory=list)
    repeated: dict[str, int] = field(default_factory=dict)
    held_out_too: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def usable(self) -> int:
        """How many of the checked samples a pack can hold."""
        return len(self.lengths) - len(self.too_long)

    @property
    def lost(self) -> bool:
        """Whether none of the checked images is there."""
        return self.checked > 0 and sum(one.missing for one in self.broken) == self.checked

    def quantiles(self) -> dict[str, int]:
        """Tokens of a sample: the least, the median, the 95th percentile and the most."""
        values = np.quantile(self.lengths, (0, 0.5, 0.95, 1), method="higher")
        return dict(zip(("min", "median", "p95", "max"), map(int, values), strict=True))

    def to_json(self) -> dict[str, Any]:
        """Everything, with names."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in ("root", "lengths")}
        return values | {
            "labels": None if self.labels is None else dict(zip(("real", "fake"), self.labels, strict=True)),
            "tokens": self.quantiles() if self.lengths else None,
            "too_long": [{"name": name, "tokens": tokens} for name, tokens in self.too_long],
            "repeated": [{"image": image, "times": times} for image, times in self.repeated.items()],
        }


def chosen_records(records: Sequence[Record], most: int | None) -> list[Record]:
    """At most so many records, evenly over the sequence; None: all."""
    if most is None or most >= len(records):
        return list(records)
    return [records[i * len(records) // most] for i in range(most)]


def check_annotations(
    found: SourceCheck, records: Sequence[Record], images: Sequence[str], held_out: Set[str] = frozenset()
) -> None:
    """Put into ``found`` what the records of a source say.

    ``images``: of each record, its path without links; ``held_out``: those of the held-out images.
    """
    found.records = len(records)
    if isinstance(records[0], DetectionRecord):
        real = sum(record.label for record in records)
        found.labels = real, len(records) - real
        found.contradictions, found.undecided = check_answers(records)
    found.repeated = repeated(images)
    found.held_out_too = [image for image in dict.fromkeys(images) if image in held_out]


def check_images(
    found: SourceCheck,
    chosen: Sequence[Record],
    sizes: Mapping[Path, Size | Unreadable],
    tokens: Callable[[Record], int] | None = None,
    limit: int = 0,
) -> None:
    """Put into ``found`` which images are broken, and how long the samples are.

    Args:
        found: of a source.
        chosen: those of its records whose images were decoded.
        sizes: what ``decode_all`` gave for them.
        tokens: of a record's sample; None: there are no samples.
        limit: ``max_sample_tokens``.
    """
    found.checked = len(chosen)
    for i, record in enumerate(chosen):
        image, where = str(record.image), record.where or f"{found.name}, image {i}"
        if isinstance(size := sizes[record.image], Unreadable):
            found.broken.append(Broken(image, where, size.reason, size.missing))
            continue
        if tokens is None:
            continue
        try:
            length = tokens(record)
        except ValueError as error:  # a text that is none
            found.broken.append(Broken(image, where, str(error)))
            continue
        found.lengths.append(length)
        if length > limit:
            found.too_long.append((image, length))


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


@dataclass
class Findings:
    """Everything that was found of a run's data.

    ``sources``: what it trains on. ``held_out``: images that it looks at, ``prompts``: how many it has for that; None
    without them. ``malformed``: entries of any annotation file. ``unread``: errors of what is of no use. ``expected``:
    None where a run would get no packs.
    """

    sources: list[SourceCheck] = field(default_factory=list)
    held_out: SourceCheck | None = None
    prompts: int | None = None
    malformed: list[Malformed] = field(default_factory=list)
    both_labels: list[BothLabels] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    expected: Expectation | None = None

    @property
    def all_sources(self) -> list[SourceCheck]:
        """The held-out images are the last of them."""
        return self.sources if self.held_out is None else [*self.sources, self.held_out]
