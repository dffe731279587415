"""Traces as packs: the trace's own layout, random contents of the right kind, the models of the benchmarks."""

import dataclasses

import pytest
import torch

from benchmarks import packs, traces
from unigendet.config import bagel_7b, quickstart
from unigendet.layout import Layout

PAIRS = [
    ("gduf_4k", packs.small_config()),
    ("gduf_32k", packs.small_config(64, 1)),
    ("diga_23k", packs.small_config(64, 1)),
    ("diga_23k_teacher", packs.small_config(64, 1)),
    ("text_only_8k", packs.small_config(64, 1)),
    ("many_small_16k", quickstart()),
    ("tiny", quickstart()),
]


def trace_named(name):
    return traces.tiny() if name == "tiny" else traces.trace(name)


@pytest.mark.parametrize(("name", "config"), PAIRS, ids=[name for name, _ in PAIRS])
def test_the_layout_is_the_trace(name, config):
    trace = trace_named(name)
    batch = packs.pack_of(trace, config)
    for field in Layout._DEVICE + Layout._HOST:
        have, need = getattr(batch.layout, field), getattr(trace.layout, field)
        assert torch.equal(have, need) if isinstance(have, torch.Tensor) else have == need, field
    images = [segment for sample in trace.samples for segment in sample if segment.grid]
    assert batch.latent_sizes == tuple(s.grid for s in images if s.latent)
    assert batch.vit_sizes == tuple(s.grid for s in images if not s.latent)
    assert batch.noised_images.tolist() == [s.mode == "noise" for s in images if s.latent]


def test_losses_of_each_kind_of_sample():
    trace = traces.trace("gduf_4k")
    batch = packs.pack_of(trace, packs.small_config(64, 1))
    answers = [sample[-1].tokens - 1 for sample in trace.samples if len(sample) == 4]
    assert batch.targets.shape == (sum(answers),)
    assert batch.labels.shape == (len(answers),)
    for name, targets in (("diga_23k", 0), ("diga_23k_teacher", 0), ("text_only_8k", 7120 - 11)):
        batch = packs.pack_of(traces.trace(name), packs.small_config(64, 1))
        assert (batch.targets.shape[0], batch.labels.shape[0]) == (targets, 0)


def test_contents_follow_from_the_seed():
    first, again, other = (packs.pack_of(traces.tiny(), quickstart(), seed) for seed in (0, 0, 1))
    for field in ("text_ids", "vit_patches", "latents"):
        assert torch.equal(getattr(first, field), getattr(again, field))
        assert not torch.equal(getattr(first, field), getattr(other, field))
    many = packs.pack_of(traces.trace("many_small_16k"), quickstart())
    assert set(many.labels.tolist()) == {0, 1}


def test_images_larger_than_the_position_tables():
    with pytest.raises(ValueError, match=r"gduf_4k 0.*16×12 patches; the model's position table holds 4 a side"):
        packs.pack_of(traces.trace("gduf_4k"), quickstart())


def test_models():
    config = packs.small_config(1024, 2, heads=16)
    assert (config.hidden_size, config.num_layers, config.head_dim) == (1024, 2, 64)
    assert (config.latent.token_dim, config.vision.patch_size, config.vision.max_patches_per_side) == (64, 14, 70)
    assert packs.bagel_width(3) == dataclasses.replace(bagel_7b(), num_layers=3)
