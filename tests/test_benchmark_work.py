"""Counts of work against what PyTorch's counter sees the baseline compute, and attention against the dense masks."""

import dataclasses

import pytest
import torch
from benchmark_cases import ALIGN, GDUF, GENERATIONS, TEACHERS, prepared, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import packs, published, traces, work
from unigendet.model import flops
from unigendet.model.alignment import ConvProjector

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)


def counted(call):
    """The result of a call, and the operations of its matrix products; attention is counted by formula."""
    with FlopCounterMode(display=False) as counter:
        result = call()
    by_operator = counter.get_flop_counts()["Global"]
    others = [name for name in by_operator if name not in PRODUCTS]
    assert not any("attention" not in str(name) for name in others), others
    return result, sum(by_operator.get(name, 0) for name in PRODUCTS)


def without_attention(step):
    kept = [part for name, part in step.parts.items() if "attention" not in name]
    return sum(part.forward for part in kept), sum(part.backward for part in kept)


@pytest.fixture(scope="module")
def model():
    return tiny_model(torch.float32)


@pytest.mark.parametrize("samples", GDUF.values(), ids=GDUF)
def test_gduf_step(model, samples):
    baseline = published.PublishedModel.of(model)
    batch, pack, latents = prepared(samples, model, torch.float32)
    total, forward = counted(lambda: sum(baseline.gduf_losses(pack, latents).values()))
    _, backward = counted(total.backward)
    step = flops.gduf_step(model.config, dataclasses.replace(batch, readout=None))  # the baseline computes all rows
    assert without_attention(step) == (forward, backward)
    assert step.total == step.forward + step.backward == sum(part.total for part in step.parts.values())


@pytest.mark.parametrize("teacher_layer", [1, 3])
def test_diga_step(model, teacher_layer):
    baseline = published.PublishedModel.of(model)
    alignment = published.PublishedAlignment(baseline, align_layer=ALIGN, teacher_layer=teacher_layer)
    batch, pack, latents = prepared(GENERATIONS, model, torch.float32)
    teacher_batch, teacher_pack, _ = prepared(TEACHERS, model, torch.float32)
    total, forward = counted(lambda: sum(alignment.losses(pack, latents, teacher_pack).values()))
    _, backward = counted(total.backward)
    batch = dataclasses.replace(batch, readout=None)
    step = flops.diga_step(model.config, batch, teacher_batch, align_layer=ALIGN, teacher_layer=teacher_layer)
    teacher_pairs = visible_pairs(TEACHERS) * teacher_layer * model.config.hidden_size
    teacher_pairs += sum((h * w) ** 2 for h, w in teacher_batch.vit_sizes) * 2 * 64  # the quickstart's ViT
    assert without_attention(step) == (forward + 4 * teacher_pairs, backward)


@pytest.mark.parametrize("trained", [("und", "gen"), ("gen",), ()])
def test_decoder_layer(model, trained):
    layer = published.PublishedLayer.of(model.decoder.layers[0], model.config)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(any(f".{stream}" in name for stream in trained))
    batch, pack, _ = prepared(GDUF["mixed"], model, torch.float32)
    x = torch.randn(batch.layout.num_queries, model.config.hidden_size, requires_grad=True)
    rope = published.rope_of(pack, model.config, x.dtype)
    y, forward = counted(lambda: layer(x, pack, rope))
    _, backward = counted(y.sum().backward)
    own = flops.decoder_layer(model.config, batch.layout, trained)
    assert without_attention(own) == (forward, backward)


def visible_pairs(samples):
    splits = traces.Trace("test", samples).splits
    return sum(int((mask == 0).sum()) for mask in published.dense_masks(splits, torch.float32))


@pytest.mark.parametrize("samples", [*GDUF.values(), traces.trace("gduf_4k").samples], ids=[*GDUF, "gduf_4k"])
def test_attention(samples):
    config = packs.small_config(64, 3, heads=4)
    batch = packs.pack_of(traces.Trace("test", samples), config)
    step = flops.gduf_step(config, dataclasses.replace(batch, readout=None))
    pairs = visible_pairs(samples)
    assert step.parts["decoder attention"] == flops.Work(4 * 64 * 3 * pairs, 8 * 64 * 3 * pairs)
    grids = [s.grid for sample in samples for s in sample if s.grid and not s.latent]
    assert step.parts["ViT attention"].forward == 4 * 256 * 4 * sum((h * w) ** 2 for h, w in grids)


def test_of_the_last_layer_counts_what_is_read(model):
    """Keys and values of all tokens; queries, attention and the rest of those from the first split on that is read."""
    config = model.config
    batch, _, _ = prepared(GDUF["mixed"], model, torch.float32)
    full, own = (flops.gduf_step(config, b).parts for b in (dataclasses.replace(batch, readout=None), batch))
    assert {name for name in full if full[name] != own[name]} == {"decoder linear layers", "decoder attention"}
    read = torch.zeros(batch.layout.num_queries, dtype=torch.bool)
    read[batch.layout.stream_to_sequence[batch.readout.stream_rows]] = True
    pairs = int(batch.layout.dense_mask()[~read].sum())
    assert pairs > 0
    assert full["decoder attention"].forward - own["decoder attention"].forward == 4 * config.hidden_size * pairs
    assert full["decoder attention"].backward - own["decoder attention"].backward == 8 * config.hidden_size * pairs
    heads = config.num_heads * config.head_dim
    weights = config.hidden_size * (2 * heads + 3 * config.intermediate_size)  # q, output, MLP
    unread = int((~read).sum())
    assert full["decoder linear layers"].forward - own["decoder linear layers"].forward == 2 * weights * unread
    assert full["decoder linear layers"].backward - own["decoder linear layers"].backward == 4 * weights * unread


def test_an_aligned_last_layer_is_read_whole(model):
    batch, _, _ = prepared(GENERATIONS, model, torch.float32)
    teacher_batch, _, _ = prepared(TEACHERS, model, torch.float32)
    last, third, whole = (
        flops.diga_step(model.config, b, teacher_batch, align_layer=layer, teacher_layer=1).total
        for b, layer in ((batch, 4), (batch, 3), (dataclasses.replace(batch, readout=None), 3))
    )
    assert last == whole > third


def test_alignment_by_convolution(model):
    """φ's other form, the alignment left out, and nothing else that they change."""
    config = dataclasses.replace(model.config, align_projector="conv")
    batch, _, _ = prepared(GENERATIONS, model, torch.float32)
    teacher_batch, _, _ = prepared(TEACHERS, model, torch.float32)
    step, usual = (flops.diga_step(c, batch, teacher_batch, teacher_layer=1) for c in (config, model.config))
    assert {name for name in step.parts if step.parts[name] != usual.parts[name]} == {"alignment head"}
    projector = ConvProjector(config.hidden_size)
    rows = torch.randn(batch.noised_tokens.shape[0], config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        projected = projector(rows, batch.latent_sizes)
        forward = counter.get_total_flops()
        projected.sum().backward()
    assert step.parts["alignment head"] == flops.Work(forward, counter.get_total_flops() - forward)
    alone = flops.diga_step(config, batch, None, align_layer=4, teacher_layer=1)
    assert alone.parts == {n: w for n, w in usual.parts.items() if n not in ("alignment head", "teacher")}


def test_published_convention(model):
    baseline = published.PublishedModel.of(model)
    weights = baseline.embed_tokens.weight.numel() + baseline.lm_head.weight.numel()
    for name, parameter in baseline.decoder.named_parameters():
        weights += parameter.numel() if ".und.weight" in name else 0
    assert work.published_convention(model.config, 50, [20, 30]) == 6 * weights * 50 + 12 * 4 * 128 * (400 + 900)


def test_a_teacher_deeper_than_the_model(model):
    batch, _, _ = prepared(GENERATIONS, model, torch.float32)
    with pytest.raises(ValueError, match=r"teacher_layer is 8; it must be in 1\.\.4"):
        flops.diga_step(model.config, batch, batch)
