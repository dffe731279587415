"""What the last decoder layer may leave out: the part of a pack that training losses read."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import randn

from unigendet.config import quickstart
from unigendet.layout import MODES, Layout, Readout
from unigendet.model.losses import gduf_losses, noise_latents
from unigendet.model.unigendet import UniGenDet
from unigendet.packing import LatentImage, Sample, Text, VitImage, pack


@st.composite
def layouts_and_rows(draw):
    split = st.tuples(st.integers(1, 5), st.sampled_from(MODES))
    samples = draw(st.lists(st.lists(split, min_size=1, max_size=4), min_size=1, max_size=4))
    tokens = sum(n for sample in samples for n, _ in sample)
    streams = draw(st.lists(st.integers(0, 1), min_size=tokens, max_size=tokens))
    rows = draw(st.lists(st.integers(0, tokens - 1), max_size=5))
    return samples, Layout.from_splits(samples, streams=streams), np.array(rows, np.int64)


@given(layouts_and_rows())
def test_a_readout_is_a_part_of_the_pack(example):
    samples, layout, rows = example
    expected, begin = [], 0
    for sample in samples:
        ends = begin + np.cumsum([n for n, _ in sample])
        reads = rows[(rows >= begin) & (rows < ends[-1])]
        if len(reads):  # from the split of the first row that is read to the sample's end
            first = int(np.argmax(ends > reads.min()))
            expected.extend(range(int(ends[first]) - sample[first][0], int(ends[-1])))
        begin = int(ends[-1])
    readout = Readout.of(layout, rows)
    if len(expected) in (0, layout.num_queries):
        assert readout is None
        return
    assert readout.query_rows.tolist() == expected
    part = readout.layout
    assert torch.equal(part.dense_mask(), layout.dense_mask()[readout.query_rows])
    assert torch.equal(part.positions, layout.positions[readout.query_rows])
    assert torch.equal(readout.stream_rows, layout.sequence_to_stream[readout.query_rows[part.stream_to_sequence]])
    und = layout.stream_lengths[0]
    assert part.stream_lengths.tolist() == [
        int((readout.stream_rows < und).sum()),
        int((readout.stream_rows >= und).sum()),
    ]
    assert torch.equal(readout.places[readout.stream_rows], torch.arange(len(expected)))
    assert int((readout.places >= 0).sum()) == len(expected)


def image(channels, seed):
    return randn(channels, 8, 8, dtype=torch.float64, grad=False, seed=seed)


def samples():
    answer = Text([5, 6, 7, 8], loss=True)
    detection = (LatentImage(image(1, 1)), VitImage(image(1, 2)), Text([9, 10]), answer)
    return [
        Sample(detection, label=1),
        Sample((Text([4, 5, 6]), LatentImage(image(1, 3), noised=True))),
        Sample((Text([7, 8]),)),  # nothing of it is read
        Sample(detection[1:], label=0),
    ]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = UniGenDet(dataclasses.replace(quickstart(), align_head=False)).double()
    torch.nn.init.normal_(model.llm2vae.weight, std=0.1)  # or no gradient would come through it
    return model


def losses_and_gradients(model, batch, **options):
    model.zero_grad()
    noise = randn(batch.latent_positions.shape[0], 4, dtype=torch.float64, grad=False, seed=4)
    latents = noise_latents(model, batch, torch.where(batch.noised_images, 0.3, 0.0).double(), noise)
    output = model(batch, latent_tokens=latents.tokens, timesteps=latents.timesteps, **options)
    losses = gduf_losses(model, batch, output, latents)
    sum(losses.values()).backward()
    return output, losses, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("recompute", ["none", "full", "attention", "selective"])
def test_losses_and_gradients_are_those_of_the_whole(model, backend, recompute, monkeypatch):
    monkeypatch.setattr(model, "backend", backend)
    monkeypatch.setattr(model.decoder, "recompute", recompute)
    batch = pack(samples(), model.config)
    whole, losses, gradients = losses_and_gradients(model, batch)
    part, part_losses, part_gradients = losses_and_gradients(model, batch, only_read=True)
    assert part.hidden.shape[0] == batch.readout.layout.num_queries < whole.hidden.shape[0]
    assert losses.keys() == part_losses.keys() == {"mse", "ce", "label"}
    torch.testing.assert_close(part.hidden, whole.hidden[batch.readout.stream_rows], rtol=1e-10, atol=1e-12)
    for name, value in losses.items():
        torch.testing.assert_close(part_losses[name], value, rtol=1e-12, atol=0)
    for name, value in gradients.items():
        torch.testing.assert_close(part_gradients[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_all_rows_where_nothing_can_be_left_out(model):
    read_all = pack([Sample((Text([5, 6], loss=True),))], model.config)
    nothing = pack([Sample((Text([5, 6]),))], model.config)
    cached = pack(samples()[:1], model.config, cached=[0], capacity=[90])
    assert read_all.readout is nothing.readout is cached.readout is None
    batch = pack(samples(), model.config)
    last = model.config.num_layers
    output, _, _ = losses_and_gradients(model, batch, only_read=True, capture=(last,))
    assert output.readout is None
    assert output.captured[last].shape[0] == output.hidden.shape[0] == batch.layout.num_queries
    with pytest.raises(ValueError, match=f"capture names the last layer, {last}, of which only the rows of readout"):
        model.decoder(output.hidden, batch.layout, capture=(last,), readout=batch.readout)


def test_a_readout_moves_with_its_pack(model):
    batch = pack(samples(), model.config).to("meta")
    moved = (batch.readout.query_rows, batch.readout.stream_rows, batch.readout.places, batch.readout.layout.positions)
    assert all(x.is_meta for x in moved)
