"""How full packs become, from the lengths of samples alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from unigendet.config import LoaderConfig
from unigendet.data.shards import FAILED, Shards, Source
from unigendet.packing import Sample


@dataclass(frozen=True)
class Fill:
    """Some packs: how many, their samples by source, their tokens, and those of the emptiest."""

    packs: int
    samples: tuple[int, ...]
    tokens: int
    least: int
    max_tokens: int

    @property
    def share(self) -> float:
        """The part of the budget that is used."""
        return self.tokens / (self.packs * self.max_tokens)

    @property
    def per_pack(self) -> float:
        """Samples per pack."""
        return sum(self.samples) / self.packs


def packing_fill(
    lengths: Sequence[Sequence[int]], weights: Sequence[float], config: LoaderConfig, packs: int = 1000
) -> Fill:
    """Pack samples of given lengths as one data worker of the loader would, endlessly shuffled.

    Args:
        lengths: the tokens of the samples of each source.
        weights: of the sources.
        config: budget, look-ahead, seed.
        packs: how many to make.

    Raises:
        ValueError: a source is empty, or nothing in it fits into a pack.
    """
    sources = [
        Source([(which, tokens) for tokens in own], _sized, weight, f"source {which}")
        for which, (own, weight) in enumerate(zip(lengths, weights, strict=True))
    ]
    config = dataclasses.replace(config, num_workers=0, cache=False)
    totals, samples = [], [0] * len(sources)
    for batch, _, index, *_ in islice(Shards(sources, config, _length), packs):
        if index == FAILED:
            raise batch
        totals.append(sum(map(_length, batch)))
        for sample in batch:
            samples[sample.label] += 1
    return Fill(len(totals), tuple(samples), sum(totals), min(totals), config.max_tokens)


def _sized(record: tuple[int, int]) -> Sample:
    """A sample that is nothing but its source, as the label, and its length, as the name."""
    which, tokens = record
    return Sample((), which, str(tokens))


def _length(sample: Sample) -> int:
    return int(sample.name)
