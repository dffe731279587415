"""The standard traces: packs as training makes them, drawn from seed 0, without any data.

A trace is samples of segments with their lengths (docs/model.md §2): a text of n tokens is n + 2 long, an image of
h × w patches h·w + 2. Detection samples are ``[clean latent image] [ViT image] [question] [answer]``, generation
samples ``[caption] [noised latent image]``, those of DIGA's teacher ``[clean latent image] [prompt] [ViT image]``.
Height and width of an image are drawn independently; samples are drawn until the next would pass the token limit.

========================== ===========================================================================================
``gduf_32k``, ``gduf_64k`` detection to generation 5 : 1. Detection: sides of 512, 640, 768 or 1024 pixels (the ViT
                           sees 980 at most), question of 20 to 59 tokens, answer of 60 to 179. Generation: caption of
                           8 to 79 tokens, sides of 768 or 1024 pixels
``gduf_4k``                the same for CPUs: 4,096 tokens, all sides of 192, 256 or 320 pixels
``diga_23k``               the generation samples of the above
``diga_23k_teacher``       their teacher's pack: same images, same captions inside a prompt of 35 more tokens
``diga_4k``                the same for CPUs, with ``diga_4k_teacher``
``text_only_8k``           texts of 64 to 1535 tokens
``many_small_16k``         the quickstart's 8 × 8 images: 4 × 4 patches in both views, texts of 8 to 29 tokens, 5 : 1
``many_small_2k``          as many of them as the quickstart packs: 2,100 tokens
========================== ===========================================================================================
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from unigendet.layout import Layout

VIT_PATCH, LATENT_PATCH, VIT_LARGEST = 14, 16, 980  # pixels
DETECTION_SIDES, GENERATION_SIDES = (512, 640, 768, 1024), (768, 1024)
CPU_SIDES = (192, 256, 320)
DETECTION_SHARE = 5 / 6
TEACHER_PROMPT = 35  # words and punctuation of DataConfig's default, without the caption
SMALL_GRID = (4, 4)
JUDGED_TOKENS = 1024  # enough for several tiles of every kernel


class Segment(NamedTuple):
    """A split: its tokens, its mode, whether it is a latent image, and an image's rows and columns (a text: None)."""

    tokens: int
    mode: str
    latent: bool = False
    grid: tuple[int, int] | None = None


Sample = tuple[Segment, ...]


@dataclass(frozen=True)
class Trace:
    """A pack: its samples, each a tuple of segments."""

    name: str
    samples: tuple[Sample, ...]

    @property
    def splits(self) -> list[list[tuple[int, str]]]:
        """The argument of ``Layout.from_splits``."""
        return [[(segment.tokens, segment.mode) for segment in sample] for sample in self.samples]

    @property
    def streams(self) -> np.ndarray:
        """int64 [T]: 1 for latent tokens, 0 for all others, an image's two delimiters among them."""
        parts = []
        for segment in (segment for sample in self.samples for segment in sample):
            parts.append(np.full(segment.tokens, int(segment.latent)))
            if segment.latent:
                parts[-1][[0, -1]] = 0
        return np.concatenate(parts)

    def judged(self) -> list[int]:
        """The samples that stand for all when results are compared with a definition that costs a lot.

        One of each kind, a kind being the modes of a sample's splits: the shortest of at least 1,024 tokens, or the
        longest if there is none.
        """
        kinds: dict[tuple[str, ...], list[int]] = {}
        for i, sample in enumerate(self.samples):
            kinds.setdefault(tuple(segment.mode for segment in sample), []).append(i)
        length = [sum(segment.tokens for segment in sample) for sample in self.samples]
        far = lambda i: (length[i] < JUDGED_TOKENS, abs(length[i] - JUDGED_TOKENS))  # noqa: E731
        return sorted(min(own, key=far) for own in kinds.values())

    def part(self, chosen: Sequence[int]) -> Trace:
        """The pack of some of the samples."""
        return Trace(f"part of {self.name}", tuple(self.samples[i] for i in chosen))

    @functools.cached_property
    def layout(self) -> Layout:
        """The pack's layout, on the CPU."""
        return Layout.from_splits(self.splits, streams=self.streams)


def _text(tokens: int) -> Segment:
    return Segment(tokens + 2, "causal")


def _image(grid: tuple[int, int], mode: str, *, latent: bool) -> Segment:
    return Segment(grid[0] * grid[1] + 2, mode, latent, grid)


@dataclass(frozen=True)
class _Picture:
    """Height and width in pixels."""

    height: int
    width: int

    @classmethod
    def draw(cls, rng: np.random.Generator, sides: tuple[int, ...]) -> _Picture:
        return cls(*(int(side) for side in rng.choice(sides, 2)))

    def latent(self, mode: str) -> Segment:
        return _image((self.height // LATENT_PATCH, self.width // LATENT_PATCH), mode, latent=True)

    def vit(self) -> Segment:
        height, width = (min(side, VIT_LARGEST) // VIT_PATCH for side in (self.height, self.width))
        return _image((height, width), "full", latent=False)


def _detection(rng: np.random.Generator, sides: tuple[int, ...] = DETECTION_SIDES) -> Sample:
    picture = _Picture.draw(rng, sides)
    question, answer = int(rng.integers(20, 60)), int(rng.integers(60, 180))
    return picture.latent("full"), picture.vit(), _text(question), _text(answer)


def _caption_and_picture(rng: np.random.Generator, sides: tuple[int, ...] = GENERATION_SIDES) -> tuple[int, _Picture]:
    return int(rng.integers(8, 80)), _Picture.draw(rng, sides)


def draw_generation(rng: np.random.Generator, sides: tuple[int, ...] = GENERATION_SIDES) -> Sample:
    """A generation sample, its lengths drawn from ``rng``."""
    caption, picture = _caption_and_picture(rng, sides)
    return _text(caption), picture.latent("noise")


def _teacher(rng: np.random.Generator, sides: tuple[int, ...] = GENERATION_SIDES) -> Sample:
    """The teacher's sample for the generation sample that the same draws give."""
    caption, picture = _caption_and_picture(rng, sides)
    return picture.latent("full"), _text(caption + TEACHER_PROMPT), picture.vit()


def draw_gduf(rng: np.random.Generator) -> Sample:
    """A sample as GDUF draws them, detection or generation."""
    return _detection(rng) if rng.random() < DETECTION_SHARE else draw_generation(rng)


def _gduf_for_cpus(rng: np.random.Generator) -> Sample:
    draw = _detection if rng.random() < DETECTION_SHARE else draw_generation
    return draw(rng, CPU_SIDES)


def _texts(rng: np.random.Generator) -> Sample:
    return (_text(int(rng.integers(64, 1536))),)


def _small(rng: np.random.Generator) -> Sample:
    words = [int(n) for n in rng.integers(8, 30, 2)]
    if rng.random() < DETECTION_SHARE:
        views = [_image(SMALL_GRID, "full", latent=latent) for latent in (True, False)]
        return *views, *(_text(n) for n in words)
    return _text(words[0]), _image(SMALL_GRID, "noise", latent=True)


def _fill(draw: Callable[[np.random.Generator], Sample], limit: int) -> tuple[Sample, ...]:
    """Samples until the next would pass ``limit`` tokens."""
    rng, samples, total = np.random.default_rng(0), [], 0
    while True:
        sample = draw(rng)
        total += sum(segment.tokens for segment in sample)
        if total > limit:
            return tuple(samples)
        samples.append(sample)


def fill_for_cpus(limit: int) -> tuple[Sample, ...]:
    """The samples of ``gduf_4k``'s kind that fit into ``limit`` tokens."""
    return _fill(_gduf_for_cpus, limit)


def _diga(limit: int, sides: tuple[int, ...], *, teacher: bool = False) -> tuple[Sample, ...]:
    """Generation samples, or those of their teacher."""
    samples = _fill(functools.partial(draw_generation, sides=sides), limit)
    rng = np.random.default_rng(0)
    return tuple(_teacher(rng, sides) for _ in samples) if teacher else samples


_TRACES: dict[str, Callable[[], tuple[Sample, ...]]] = {
    "gduf_32k": lambda: _fill(draw_gduf, 32_768),
    "diga_23k": lambda: _diga(23_000, GENERATION_SIDES),
    "diga_23k_teacher": lambda: _diga(23_000, GENERATION_SIDES, teacher=True),
    "gduf_64k": lambda: _fill(draw_gduf, 65_536),
    "gduf_4k": lambda: fill_for_cpus(4_096),
    "diga_4k": lambda: _diga(4_096, CPU_SIDES),
    "diga_4k_teacher": lambda: _diga(4_096, CPU_SIDES, teacher=True),
    "text_only_8k": lambda: _fill(_texts, 8_192),
    "many_small_16k": lambda: _fill(_small, 16_384),
    "many_small_2k": lambda: _fill(_small, 2_100),
}
NAMES = tuple(_TRACES)


def trace(name: str) -> Trace:
    """The trace ``name``, one of ``NAMES``. Raises ValueError for any other name."""
    if name not in _TRACES:
        raise ValueError(f"trace is {name!r}; it must be one of {', '.join(NAMES)}")
    return Trace(name, _TRACES[name]())


def tiny() -> Trace:
    """A pack of a few dozen tokens with every kind of sample, for machines without a GPU. Not a standard trace."""
    samples = (
        (_image((4, 4), "full", latent=True), _image((3, 2), "full", latent=False), _text(3), _text(6)),
        (_text(4), _image((4, 4), "noise", latent=True)),
    )
    return Trace("tiny", samples)


def tiny_diga() -> tuple[Trace, Trace]:
    """A few generation samples, and their teacher's. Not standard traces."""
    grids = ((3, 4), (2, 3), (4, 4))
    view = _image((4, 3), "full", latent=False)
    samples = tuple((_text(5), _image(grid, "noise", latent=True)) for grid in grids)
    teacher = tuple((_image(grid, "full", latent=True), _text(7), view) for grid in grids)
    return Trace("tiny_diga", samples), Trace("tiny_diga_teacher", teacher)
