"""Loaders of samples that are nothing but a name and a length."""

import numpy as np

from unigendet.config import LoaderConfig
from unigendet.data.loader import Loader, Source
from unigendet.packing import Sample, Text

SETTINGS = ("seed", "shuffle", "cache", "lookahead", "max_broken")


def text_sample(record):
    """(name, number of tokens) → a sample of so many tokens."""
    name, tokens = record
    return Sample((Text(tuple([7] * (tokens - 2)), droppable=True), Text(())), name=name)


def length(sample):
    return len(sample.segments[0].ids) + 2


def records(letter, count, tokens=10):
    return [(f"{letter}{i}", tokens) for i in range(count)]


def odd_records(letter, count, seed=1, least=5, most=30):
    """Records of random lengths from ``least`` to ``most``."""
    sizes = np.random.default_rng(seed).integers(least, most + 1, count)
    return [(f"{letter}{i}", int(n)) for i, n in enumerate(sizes)]


def loader(*sources, max_tokens=40, workers=0, max_sample_tokens=None, **kwargs):
    config = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
    config = LoaderConfig(max_tokens, max_sample_tokens or max_tokens, num_workers=workers, **config)
    sources = [s if isinstance(s, Source) else Source(s, text_sample) for s in sources]
    return Loader(sources, config, length=length, **kwargs)


def names(packs):
    return [[sample.name for sample in pack] for pack in packs]
