"""The standard traces: the same everywhere, within their limits, made of what the model is fed."""

import re

import numpy as np
import pytest

from benchmarks import traces
from unigendet.config import DataConfig
from unigendet.layout import MODES

LIMITS = {
    "gduf_32k": 32_768,
    "diga_23k": 23_000,
    "gduf_64k": 65_536,
    "gduf_4k": 4_096,
    "text_only_8k": 8_192,
    "many_small_16k": 16_384,
}
FIRST = {"gduf_32k": [[1922, 2432, 34, 66], [2050, 2522, 47, 171]], "diga_23k": [[71, 4098], [29, 2306]]}
every_trace = pytest.mark.parametrize("name", traces.NAMES)


def modes(sample):
    return [(segment.mode, segment.latent) for segment in sample]


DETECTION = [("full", True), ("full", False), ("causal", False), ("causal", False)]
GENERATION = [("causal", False), ("noise", True)]
TEACHER = [("full", True), ("causal", False), ("full", False)]


@every_trace
def test_deterministic_and_well_formed(name):
    trace, again = traces.trace(name), traces.trace(name)
    assert trace.samples == again.samples
    layout = trace.layout
    assert layout.num_queries == layout.num_keys == sum(n for sample in trace.splits for n, _ in sample)
    assert {mode for sample in trace.splits for _, mode in sample} <= set(MODES)
    segments = [segment for sample in trace.samples for segment in sample]
    assert all((s.grid is None) == (s.mode == "causal") for s in segments)
    assert all(s.grid[0] * s.grid[1] + 2 == s.tokens for s in segments if s.grid)
    latents = [s.tokens - 2 for s in segments if s.latent]
    assert layout.stream_lengths[1] == sum(latents)
    assert trace.streams.sum() == sum(latents)


@pytest.mark.parametrize(("name", "limit"), LIMITS.items())
def test_full_to_the_limit(name, limit):
    """The largest sample that may come is what may be missing."""
    tokens = traces.trace(name).layout.num_queries
    largest = {"gduf": 10_000, "diga": 5_000, "text": 1_540, "many": 100}[name.split("_")[0]]
    largest = 1_200 if name == "gduf_4k" else largest
    assert limit - largest < tokens <= limit


def test_kinds_of_samples():
    kinds = {"gduf_32k": [DETECTION, GENERATION], "gduf_64k": [DETECTION, GENERATION], "diga_23k": [GENERATION]}
    kinds |= {"diga_23k_teacher": [TEACHER], "text_only_8k": [[("causal", False)]]}
    kinds |= {"many_small_16k": [DETECTION, GENERATION], "gduf_4k": [DETECTION, GENERATION]}
    for name, allowed in kinds.items():
        found = [modes(sample) for sample in traces.trace(name).samples]
        assert all(kind in allowed for kind in found)
        assert all(kind in found for kind in allowed)


def test_the_first_lengths():
    """As drawn when the traces were fixed: another random generator or order of draws would move every result."""
    assert [[n for n, _ in s] for s in traces.trace("gduf_32k").splits[:2]] == FIRST["gduf_32k"]
    assert [[n for n, _ in s] for s in traces.trace("diga_23k").splits[:2]] == FIRST["diga_23k"]


def test_sizes_of_images_and_texts():
    sides = np.array(traces.DETECTION_SIDES)
    latents = {h * w + 2 for h in sides // 16 for w in sides // 16}
    vit = np.minimum(sides, 980) // 14
    patches = {h * w + 2 for h in vit for w in vit}
    for sample in traces.trace("gduf_64k").samples:
        if modes(sample) == DETECTION:
            assert sample[0][0] in latents
            assert sample[1][0] in patches
            assert 22 <= sample[2][0] <= 61
            assert 62 <= sample[3][0] <= 181
        else:
            assert 10 <= sample[0][0] <= 81
            assert sample[1][0] in {48 * 48 + 2, 48 * 64 + 2, 64 * 64 + 2}
    rows = [(12, 13), (16, 18), (20, 22)]  # of the latent image and of the ViT's
    for sample in traces.trace("gduf_4k").samples:
        latent, *vit = (segment.grid for segment in sample if segment.grid)
        assert {latent[0], latent[1]} <= {12, 16, 20}
        assert all(pair in rows for grid in vit for pair in zip(latent, grid, strict=True))
    assert {sample[0][0] for sample in traces.trace("many_small_16k").samples if len(sample) == 4} == {18}


def test_the_teacher_reads_the_same_images_and_captions():
    student, teacher = (traces.trace(name).samples for name in ("diga_23k", "diga_23k_teacher"))
    for (caption, image), (clean, prompt, vit) in zip(student, teacher, strict=True):
        assert clean.grid == image.grid
        assert prompt.tokens == caption.tokens + traces.TEACHER_PROMPT
        assert vit.tokens > clean.tokens
    words = re.findall(r"\w+|[^\w\s]", DataConfig().teacher_prompt.replace("{caption}", ""))
    assert len(words) == traces.TEACHER_PROMPT


def test_tiny_has_every_kind():
    assert [modes(sample) for sample in traces.tiny().samples] == [DETECTION, GENERATION]


def test_unknown_names():
    with pytest.raises(ValueError, match="trace is 'gduf'; it must be one of gduf_32k, "):
        traces.trace("gduf")
