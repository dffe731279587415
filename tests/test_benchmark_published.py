"""The baseline of the benchmarks computes what the model computes: masks, layers, both stages' losses and gradients."""

import copy
import dataclasses

import pytest
import torch
from benchmark_cases import ALIGN, DETECTIONS, GDUF, GENERATIONS, TEACHER, TEACHERS, prepared, tiny_model

from benchmarks import published, traces
from unigendet.model.losses import Counts, align_loss, gduf_losses, mse_loss
from unigendet.model.unigendet import UniGenDet
from unigendet.training.stages import DIGAStage, alignment_grids

RELATIVE = 1e-10  # of the largest value; both sides are float64


@pytest.fixture(scope="module")
def model():
    return tiny_model(torch.float64)


def assert_close(have, need, what):
    assert have.shape == need.shape, what
    largest = need.abs().max()
    assert largest > 0, f"{what} is zero, which compares nothing"
    assert (have - need).abs().max() <= RELATIVE * largest, what


def assert_same_gradients(model, baseline, ours, theirs):
    """Every parameter's gradient of two totals; the fused ones put together from their parts."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parts = {name: published.counterparts(name) for name in names}
    parameters = dict(baseline.named_parameters())
    assert {part for own in parts.values() for part in own} == {n for n, p in parameters.items() if p.requires_grad}
    own = torch.autograd.grad(ours, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    flat = [part for own in parts.values() for part in own]
    found = dict(zip(flat, torch.autograd.grad(theirs, [parameters[n] for n in flat], allow_unused=True), strict=True))
    compared = 0
    for name, need in zip(names, own, strict=True):
        have = [found[part] for part in parts[name]]
        if need is None or not need.any():  # a stream or a head that the pack does not use
            assert all(part is None or not part.any() for part in have), name
            continue
        assert_close(torch.cat(have), need, name)
        compared += 1
    return compared


@pytest.mark.parametrize("samples", GDUF.values(), ids=GDUF)
def test_gduf_losses_and_gradients(model, samples):
    baseline = published.PublishedModel.of(model.requires_grad_(True))
    batch, pack, latents = prepared(samples, model)
    output = model(batch, latent_tokens=latents.tokens, timesteps=latents.timesteps)
    ours, theirs = gduf_losses(model, batch, output, latents), baseline.gduf_losses(pack, latents)
    assert ours.keys() == theirs.keys()
    for name, need in ours.items():
        assert_close(theirs[name].detach(), need.detach(), name)
    compared = assert_same_gradients(model, baseline, sum(ours.values()), sum(theirs.values()))
    unused = sum(name.startswith("align_head.") for name, _ in model.named_parameters())
    if len(ours) == 3:
        assert compared == len(list(model.parameters())) - unused


def test_diga_losses_and_gradients(model):
    baseline = published.PublishedModel.of(model)
    stage = DIGAStage(model, align_layer=ALIGN, teacher_layer=TEACHER)
    alignment = published.PublishedAlignment(baseline, align_layer=ALIGN, teacher_layer=TEACHER)
    batch, pack, latents = prepared(GENERATIONS, model)
    teacher_batch, teacher_pack, _ = prepared(TEACHERS, model)
    output = model(batch, latent_tokens=latents.tokens, timesteps=latents.timesteps, capture=(ALIGN,))
    student, grids = output.captured[ALIGN], alignment_grids(batch, teacher_batch)
    features = stage.features(teacher_batch)
    ours = {"mse": mse_loss(model, batch, output, latents, Counts.of(batch))}
    ours["diga"] = align_loss(model, batch, student, features, grids)
    theirs = alignment.losses(pack, latents, teacher_pack)
    assert ours.keys() == theirs.keys()
    for name, need in ours.items():
        assert_close(theirs[name].detach(), need.detach(), name)
    compared = assert_same_gradients(model, baseline, sum(ours.values()), sum(theirs.values()))
    assert compared == len(stage.trained)


@pytest.mark.parametrize("samples", GDUF.values(), ids=GDUF)
def test_a_layer_and_its_gradients(model, samples):
    layer = model.requires_grad_(True).decoder.layers[0]
    baseline = published.PublishedLayer.of(layer, model.config)
    batch, pack, _ = prepared(samples, model)
    layout, config = batch.layout, model.config
    generator = torch.Generator().manual_seed(2)
    shape = (layout.num_queries, config.hidden_size)
    x, incoming = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    rope = model.decoder.rope(x.device)
    rows, delta = layer(x[layout.stream_to_sequence], None, layout, rope, None, "reference")
    ours = (rows + delta)[layout.sequence_to_stream]
    theirs = baseline(x, pack, published.rope_of(pack, config, x.dtype))
    assert_close(theirs.detach(), ours.detach(), "output")
    gradients = [torch.autograd.grad(y, x, incoming, retain_graph=True)[0] for y in (theirs, ours)]
    assert_close(*gradients, "input")
    assert_same_gradients(layer, baseline, (ours * incoming).sum(), (theirs * incoming).sum())


@pytest.mark.parametrize("samples", GDUF.values(), ids=GDUF)
def test_dense_masks_are_the_layout_s(samples):
    trace = traces.Trace("test", samples)
    masks = published.dense_masks(trace.splits, torch.float64)
    assert all(set(mask.unique().tolist()) <= {0.0, float("-inf")} for mask in masks)
    assert torch.equal(torch.block_diag(*((mask == 0).float() for mask in masks)) > 0, trace.layout.dense_mask())


def test_recomputed_layers_change_nothing(model):
    baseline = published.PublishedModel.of(model)
    _, pack, latents = prepared(GDUF["mixed"], model)
    gradients = []
    for recompute in (False, True):
        baseline.decoder.recompute = recompute
        total = sum(baseline.gduf_losses(pack, latents).values())
        gradients.append(torch.autograd.grad(total, list(baseline.decoder.parameters())))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(model, dtype):
    """Losses as near to those in float64 as the precision allows; gradients in the parameters' dtype."""
    lower = copy.deepcopy(model).requires_grad_(True).to(dtype)
    exact = copy.deepcopy(lower).double()
    _, pack, latents = prepared(GDUF["mixed"], model, dtype)
    _, pack64, _ = prepared(GDUF["mixed"], model)
    baseline = published.PublishedModel.of(lower)
    have = baseline.gduf_losses(pack, latents)
    need = published.PublishedModel.of(exact).gduf_losses(pack64, latents)
    for name, value in need.items():
        assert have[name].dtype == torch.float32
        assert (have[name] - value).abs() <= 4 * torch.finfo(dtype).eps * value.abs(), name
    sum(have.values()).backward()
    assert {p.grad.dtype for n, p in baseline.named_parameters() if not n.startswith("align_head.")} == {dtype}


def test_weights_are_copies(model):
    baseline = published.PublishedModel.of(model)
    addresses = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own = [p.untyped_storage().data_ptr() for p in baseline.parameters()]
    assert len(set(own)) == len(own)
    assert not addresses & set(own)


def test_the_teacher_stays_when_the_model_learns(model):
    baseline = published.PublishedModel.of(model)
    alignment = published.PublishedAlignment(baseline, align_layer=ALIGN, teacher_layer=TEACHER)
    _, pack, latents = prepared(GENERATIONS, model)
    _, teacher_pack, _ = prepared(TEACHERS, model)
    features, before = alignment._features(teacher_pack), alignment.losses(pack, latents, teacher_pack)
    with torch.no_grad():
        for parameter in baseline.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    assert torch.equal(alignment._features(teacher_pack), features)
    after = alignment.losses(pack, latents, teacher_pack)
    assert all(after[name] != before[name] for name in before)


def test_a_pack_moves_whole(model):
    _, pack, _ = prepared(GDUF["mixed"], model)
    moved = pack.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert all(x.is_meta for x in (*tensors, *moved.masks, *moved.streams.values()))
    assert (moved.lengths, moved.vit_sizes, moved.latent_sizes) == (pack.lengths, pack.vit_sizes, pack.latent_sizes)


def test_errors(model):
    batch, _, _ = prepared(DETECTIONS, model)
    with pytest.raises(ValueError, match=r"splits make samples of \[9\] tokens; the batch has samples of \["):
        published.PublishedPack.of(batch, [[(9, "causal")]], torch.float32)
    with pytest.raises(ValueError, match=r"align_layer is 8; it must be in 1\.\.4"):
        published.PublishedAlignment(published.PublishedModel.of(model))
    headless = UniGenDet(dataclasses.replace(model.config, align_head=False))
    with pytest.raises(ValueError, match="no alignment head"):
        published.PublishedAlignment(published.PublishedModel.of(headless), align_layer=1, teacher_layer=1)
