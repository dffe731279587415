"""Attention's Triton kernels compiled: needs a CUDA device, and nothing installed but what the package needs."""

import pytest
import torch
from attention_cases import DTYPES, arguments, factor_of, plain
from numerics import in_float64, outputs_and_gradients
from op_checks import assert_same

from unigendet.layout import Layout
from unigendet.ops import symbiotic_attention

pytestmark = pytest.mark.gpu

# A few thousand tokens: splits longer than any tile and shorter than one; lengths that divide by nothing.
TRAINING = [
    [(2050, "full"), (530, "full"), (37, "causal"), (171, "causal")],
    [(71, "causal"), (1027, "noise"), (259, "noise"), (130, "full"), (400, "causal")],
    [(1, "causal")],
]
LAYOUTS = {
    "training": (TRAINING, None, None),
    "cached": (
        [[(1500, "full"), (700, "causal"), (300, "full")], [(64, "causal"), (1026, "noise")], [(900, "causal")]],
        [1900, 64, 899],
        [3000, 1200, 1024],
    ),
}
SHAPES = [((28, 4), 128), ((16, 16), 72), ((8, 2), 64)]


def layout_of(name):
    samples, cached, capacity = LAYOUTS[name]
    queries = sum(n for s in samples for n, _ in s) - sum(cached or [])
    streams = [int(i % 3 == 1) for i in range(queries)]
    return Layout.from_splits(samples, streams=streams, cached=cached, capacity=capacity).to("cuda")


def on_gpu(layout, **options):
    return [x.detach().cuda().requires_grad_() for x in arguments(layout, **options)]


def op(layout, **options):
    return lambda q, k, v: symbiotic_attention(q, k, v, layout, backend="triton", return_lse=True, **options)


def group(inputs, kv_head):
    """One kv head and its query heads, so that the scores of a reference fit in memory."""
    per_group = inputs[0].shape[1] // inputs[1].shape[1]
    cut = (slice(kv_head * per_group, (kv_head + 1) * per_group), slice(kv_head, kv_head + 1))
    return cut, [x[:, c].detach().requires_grad_() for x, c in zip(inputs, (cut[0], cut[1], cut[1]), strict=True)]


def largest(x):
    return x.abs().max().item()


def check(layout, *, out_order="sequence", deterministic=True, **shape):
    """Every output and gradient against the float64 result of the first and the last group of heads."""
    inputs = on_gpu(layout, **shape)
    generator = torch.Generator().manual_seed(0)
    call = op(layout, out_order=out_order, deterministic=deterministic)
    outputs = call(*inputs)
    incoming = [torch.randn(x.shape, generator=generator).bfloat16().to(x.device, x.dtype) for x in outputs]
    gradients = torch.autograd.grad(outputs, inputs, incoming)
    expected = plain(layout, out_order=out_order)
    for kv_head in {0, inputs[1].shape[1] - 1}:
        cut, parts = group(inputs, kv_head)
        heads, own = cut
        tested = [outputs[0][:, heads], outputs[1][heads], gradients[0][:, heads], *(g[:, own] for g in gradients[1:])]
        weights = [incoming[0][:, heads], incoming[1][heads]]
        found = []
        for leaves in (parts, [in_float64(x) for x in parts]):
            results = expected(*leaves)
            weighted = [w.to(x.dtype) for w, x in zip(weights, results, strict=True)]
            found.append([x.detach() for x in (*results, *torch.autograd.grad(results, leaves, weighted))])
        names = ("out", "lse", "dq", "dk", "dv")
        for name, have, usual, exact in zip(names, tested, *found, strict=True):
            allowed = factor_of("triton", shape["dtype"]) * largest(usual - exact)
            allowed += torch.finfo(have.dtype).eps * largest(exact)
            assert largest(have - exact) <= allowed, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), SHAPES)
def test_accuracy(heads, head_dim, dtype):
    check(layout_of("training"), heads=heads, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deterministic", [True, False])
def test_accuracy_in_stream_order(deterministic, dtype):
    check(
        layout_of("training"),
        heads=(7, 1),
        head_dim=128,
        dtype=dtype,
        out_order="stream",
        deterministic=deterministic,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), SHAPES)
def test_cached_keys(heads, head_dim, dtype):
    """Spare rows of the cache hold NaN."""
    check(layout_of("cached"), heads=heads, head_dim=head_dim, dtype=dtype, deterministic=False)


@pytest.mark.parametrize("head_dim", [8, 40, 80, 96])
def test_other_head_dims(head_dim):
    check(layout_of("training"), heads=(4, 2), head_dim=head_dim, dtype=torch.bfloat16)


@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_pointers_and_descriptors_agree(head_dim, monkeypatch):
    """Loaded either way, in tiles of other sizes."""
    from unigendet.kernels import launch

    layout = layout_of("cached")
    inputs = on_gpu(layout, heads=(4, 2), head_dim=head_dim, dtype=torch.bfloat16)
    expected = outputs_and_gradients(op(layout), inputs)
    monkeypatch.setattr(launch, "describable", lambda *_: False)
    actual = outputs_and_gradients(op(layout), inputs)
    for name, value in expected.items():
        assert largest(value.double() - actual[name]) <= 4 * torch.finfo(value.dtype).eps * largest(value), name


@pytest.mark.parametrize("strided", ["projection", "expanded", "transposed"])
def test_strided_inputs(strided):
    layout = layout_of("training")
    q, k, v = (x.detach() for x in on_gpu(layout, heads=(4, 2), head_dim=64, dtype=torch.bfloat16))
    if strided == "projection":
        q, k, v = torch.cat((q, k, v), 1).split((4, 2, 2), 1)
    elif strided == "expanded":
        k, v = (x[:, :1].expand(-1, 2, -1) for x in (k, v))
    else:
        q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    views = [x.detach().requires_grad_() for x in (q, k, v)]
    expected = outputs_and_gradients(
        op(layout), [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in views]
    )
    actual = outputs_and_gradients(op(layout), views)
    for name, value in expected.items():
        assert largest(value.double() - actual[name]) <= 4 * torch.finfo(value.dtype).eps * largest(value), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), SHAPES)
def test_runs_are_equal_to_the_last_bit(heads, head_dim, dtype):
    layout = layout_of("training")
    inputs = on_gpu(layout, heads=heads, head_dim=head_dim, dtype=dtype)
    first, *others = (outputs_and_gradients(op(layout), inputs) for _ in range(3))
    for other in others:
        assert_same(other, first)


def packs_of_other_lengths():
    for lengths in ((512, 64), (97, 1), (1024, 33), (130, 600), (16, 16)):
        yield Layout.from_splits([[(lengths[0], "full"), (lengths[1], "causal")], [(5, "noise")]]).to("cuda")


def test_packs_of_other_lengths_share_their_kernels(monkeypatch):
    import triton

    compiled = []
    record = lambda **details: compiled.append(details["fn"].name)  # noqa: E731
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", record)
    counts = []
    for layout in packs_of_other_lengths():
        for deterministic in (True, False):
            inputs = on_gpu(layout, heads=(3, 1), head_dim=56, dtype=torch.bfloat16)
            outputs_and_gradients(op(layout, out_order="stream", deterministic=deterministic), inputs)
        counts.append(len(compiled))
    # Forward; delta, dk and dv, dq; with atomics dk and dv, and the copy, which an earlier test may have compiled.
    assert counts[0] in (5, 6), compiled
    assert counts == [counts[0]] * len(counts), compiled


def test_nothing_waits_for_the_device():
    """Once kernels are compiled: also for a pack that was never seen, whose schedule has to be made and copied."""
    shape = {"heads": (4, 2), "head_dim": 64, "dtype": torch.bfloat16}
    prepared = []
    for layout in packs_of_other_lengths():
        inputs = on_gpu(layout, **shape)
        gradients = (torch.randn_like(inputs[0]), torch.randn(4, layout.num_queries, device="cuda"))
        prepared.append((layout, inputs, gradients))

    def run(layout, inputs, gradients):
        for deterministic in (True, False):
            results = op(layout, out_order="stream", deterministic=deterministic)(*inputs)
            torch.autograd.grad(results, inputs, gradients)

    run(*prepared[0])
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for pack in prepared[1:]:
            run(*pack)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.cuda.synchronize()
