"""Attention of packs: contract, accuracy, every path of the torch backend, and its cost in calls and masks."""

import math

import pytest
import torch
from attention_cases import DTYPES, PACKS, arguments, factor_of, layout_of, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_accurate, outputs_and_gradients
from op_checks import (
    BACKENDS,
    CPP_BACKENDS,
    assert_same,
    check_checkpoints,
    check_compiles_once,
    check_writes_everything,
    randn,
)

from unigendet.layout import MODES, Layout
from unigendet.ops import symbiotic_attention
from unigendet.ops import symbiotic_attention_torch as torch_backend

ALL = (*BACKENDS, *CPP_BACKENDS, "triton")
WIDE = [(backend, torch.float64) for backend in BACKENDS]

# How the torch backend works: fused batches, fused splits, and the unfused formulas in one or in many chunks.
PATHS = {
    "batched": {},
    "by split": {"SMALL_SAMPLE": 0},
    "one by one": {"BATCH_PAIRS": 1},
    "unfused": {"_fused": lambda q: False},
    "unfused by split, chunked": {"_fused": lambda q: False, "SMALL_SAMPLE": 0, "CHUNK_SCORES": 12},
    "unfused batches, chunked": {"_fused": lambda q: False, "CHUNK_SCORES": 40, "PADDING": 9.0},
}


@pytest.fixture
def path(request, monkeypatch):
    """Force a path of the torch backend."""
    for name, value in PATHS[request.param].items():
        monkeypatch.setattr(torch_backend, name, value)
    torch_backend._plan.cache_clear()
    yield request.param
    torch_backend._plan.cache_clear()


every_path = pytest.mark.parametrize("path", PATHS, indirect=True)
every_pack = pytest.mark.parametrize("pack", PACKS)


def assert_accurate_attention(candidate, expected, inputs, backend="torch", **options):
    assert_accurate(candidate, expected, expected, inputs, factor=factor_of(backend, inputs[0].dtype), **options)


def op(layout, backend="auto", **options):
    return lambda q, k, v: symbiotic_attention(q, k, v, layout, backend=backend, **options)


def op_arguments(layout, inputs, backend, out_rows=None):
    return (*inputs, layout.query_begin, layout.query_end, layout.splits, out_rows, 0.3, backend)


@pytest.mark.parametrize(
    ("backend", "pack"),
    [*((b, p) for b in (*BACKENDS, *CPP_BACKENDS) for p in ("training", "cached")), ("triton", "single tokens")],
)
def test_operator_contract(backend, pack):
    layout = layout_of(pack)
    inputs = arguments(layout, heads=(2, 1), holes=0.0)
    for out_rows in (None, layout.sequence_to_stream):
        torch.library.opcheck(
            torch.ops.unigendet.symbiotic_attention.default, op_arguments(layout, inputs, backend, out_rows)
        )
        tensors = [x.detach() for x in inputs]
        out, lse = torch.ops.unigendet.symbiotic_attention(*op_arguments(layout, tensors, backend, out_rows))
        for gradients in ((out * 2, None), (out * 2, lse * 3), (None, lse * 3)):
            torch.library.opcheck(
                torch.ops.unigendet.symbiotic_attention_backward.default,
                (*gradients, *tensors, out, lse, *op_arguments(layout, [], backend, out_rows)),
            )


@every_pack
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend, pack):
    layout = layout_of(pack)
    inputs = arguments(layout, heads=(2, 1), head_dim=3, dtype=torch.float64, holes=0.0)
    call = op(layout, backend, return_lse=True, out_order="stream")
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *args: call(*args)[1], inputs, fast_mode=True)


def test_gradients_entry_by_entry():
    inputs = arguments(layout_of("cached"), heads=(2, 1), head_dim=2, dtype=torch.float64, holes=0.0)
    assert torch.autograd.gradcheck(op(layout_of("cached"), return_lse=True), inputs)


@every_pack
@every_path
@pytest.mark.parametrize("out_order", ["sequence", "stream"])
def test_accuracy(path, pack, out_order):
    """Also with gradients through lse, which take the unfused formulas."""
    layout = layout_of(pack)
    expected = plain(layout, out_order=out_order)
    inputs = arguments(layout)
    assert_accurate_attention(op(layout, "torch", return_lse=True, out_order=out_order), expected, inputs)
    without_lse = lambda *args: expected(*args)[0]  # noqa: E731
    assert_accurate_attention(op(layout, "torch", out_order=out_order), without_lse, inputs)


@every_pack
@pytest.mark.parametrize(("backend", "dtype"), [*WIDE, *((b, d) for b in ALL for d in DTYPES)])
def test_accuracy_of_each_dtype(backend, dtype, pack):
    layout = layout_of(pack)
    inputs = arguments(layout, dtype=dtype, head_dim=16)
    seeds = 1 if backend == "triton" else 3  # the interpreter is slow
    assert_accurate_attention(op(layout, backend), lambda *args: plain(layout)(*args)[0], inputs, backend, seeds=seeds)
    out, lse = op(layout, backend, return_lse=True)(*inputs)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("path", ["by split"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_accuracy_of_merged_splits(path, dtype):
    """A text with much before it is two calls; rounding between them must not add up."""
    layout = Layout.from_splits([[(40, "full"), (40, "noise"), (40, "causal"), (30, "causal")]])
    inputs = arguments(layout, dtype=dtype, head_dim=16)
    assert_accurate_attention(op(layout, "torch"), lambda *args: plain(layout)(*args)[0], inputs)


@pytest.mark.parametrize("backend", [*BACKENDS, *CPP_BACKENDS])
@pytest.mark.parametrize("heads", [(3, 3), (4, 1), (7, 1), (8, 2), (14, 2), (1, 1)])
@pytest.mark.parametrize("head_dim", [16, 72])
def test_heads_and_head_dims(backend, heads, head_dim):
    layout = layout_of("training")
    inputs = arguments(layout, heads=heads, head_dim=head_dim)
    assert_accurate_attention(op(layout, backend, return_lse=True), plain(layout), inputs, backend, seeds=1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("backend", "dtype"), [*WIDE, *((b, d) for b in ALL for d in DTYPES)])
def test_one_token(backend, mode, dtype):
    """It sees itself: out = v, lse = the score; q and k have no gradient but for the rounding of dO · v."""
    layout = Layout.from_splits([[(1, mode)]])
    inputs = arguments(layout, dtype=dtype, head_dim=16)
    q, k, v = (x.detach() for x in inputs)
    results = outputs_and_gradients(op(layout, backend), inputs)
    assert torch.equal(results["output 0"], v.repeat_interleave(2, 1))
    lse = op(layout, backend, return_lse=True)(q, k, v)[1]
    score = (q.double() * k.repeat_interleave(2, 1).double()).sum(-1).T / 4
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert (lse - score).abs().max() <= 16 * eps * q.abs().max().double() * k.abs().max()
    terms = 16 * 4 * v.abs().max().double() * max(q.abs().max(), k.abs().max())  # |dO| < 4
    assert results["gradient of input 0"].abs().max() <= 2 * eps * terms
    assert results["gradient of input 1"].abs().max() <= 2 * eps * terms


@pytest.mark.parametrize("backend", ALL)
def test_scale(backend):
    layout = layout_of("training")
    inputs = arguments(layout)
    assert_accurate_attention(
        op(layout, backend, scale=0.7, return_lse=True), plain(layout, 0.7), inputs, backend, seeds=1
    )


@st.composite
def layouts(draw, longest=6):
    split = st.tuples(st.integers(1, longest), st.sampled_from(MODES))
    samples = draw(st.lists(st.lists(split, min_size=1, max_size=5), min_size=1, max_size=4))
    tokens = [sum(n for n, _ in s) for s in samples]
    cached = [draw(st.integers(0, n)) for n in tokens]
    if sum(cached) == sum(tokens):
        cached[0] = 0
    capacity = [n + draw(st.integers(0, 2)) for n in tokens]
    queries = sum(tokens) - sum(cached)
    streams = draw(st.lists(st.integers(0, 1), min_size=queries, max_size=queries))
    return Layout.from_splits(samples, streams=streams, cached=cached, capacity=capacity)


@settings(max_examples=25)
@given(layouts(), st.sampled_from(sorted(PATHS)), st.sampled_from(["sequence", "stream"]), st.booleans())
def test_torch_agrees_with_the_reference(layout, path, out_order, use_lse):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PATHS[path].items():
            patch.setattr(torch_backend, name, value)
        torch_backend._plan.cache_clear()
        inputs = arguments(layout, dtype=torch.float64)
        options = {"out_order": out_order, "return_lse": use_lse}
        actual = outputs_and_gradients(op(layout, "torch", **options), inputs)
        expected = outputs_and_gradients(op(layout, "reference", **options), inputs)
        torch_backend._plan.cache_clear()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_over_disjoint_keys_merge(backend):
    """out and lse over two halves of the keys determine them over all keys."""
    whole = Layout.from_splits([[(6, "full"), (4, "full"), (5, "full")]], cached=[10])
    q, k, v = (x.detach() for x in arguments(whole, dtype=torch.float64))
    out, lse = op(whole, backend, return_lse=True)(q, k, v)
    first = Layout.from_splits([[(6, "full"), (5, "full")]], cached=[6])
    part_a, lse_a = op(first, backend, return_lse=True)(q, torch.cat((k[:6], k[10:])), torch.cat((v[:6], v[10:])))
    second = Layout.from_splits([[(4, "full")]])
    second_q = torch.cat((q, q[:1]))[:4]  # q's rows against the middle keys alone
    part_b, lse_b = op(second, backend, return_lse=True)(second_q, k[6:10], v[6:10])
    rows = slice(0, 4)
    merged = torch.logaddexp(lse_a[:, rows], lse_b)
    torch.testing.assert_close(merged, lse[:, rows])
    weights = ((x - merged).exp().T.unsqueeze(-1) for x in (lse_a[:, rows], lse_b))
    torch.testing.assert_close(sum(w * p for w, p in zip(weights, (part_a[rows], part_b), strict=True)), out[rows])


@every_path
@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits(path, sign):
    """Scores of ±10⁴ overflow an exponential that is not shifted; all rows then have one winner, or equal losers."""
    layout = layout_of("training")
    q, k, v = arguments(layout)
    with torch.no_grad():
        q.fill_(100.0 * sign)
        k.copy_(100.0 + torch.arange(layout.num_keys).remainder(5)[:, None, None] * 2)
    for backend in BACKENDS:
        results = outputs_and_gradients(op(layout, backend, return_lse=True, scale=0.125), [q, k, v])
        assert all(x.isfinite().all() for x in results.values())
        assert results["output 1"].abs().max() > 9e3
        # What goes through lse, the gradient's probabilities and the merging of two calls, has its rounding.
        exact = outputs_and_gradients(plain(layout, 0.125), [x.detach().double().requires_grad_() for x in (q, k, v)])
        for name, value in exact.items():
            bound = 4 * torch.finfo(torch.float32).eps * 1.1e4 * value.abs().max()
            assert (results[name] - value).abs().max() <= bound, name
        if backend == "reference" or "by split" not in path:
            call = op(layout, backend, scale=0.125, return_lse=True)
            assert_accurate_attention(call, plain(layout, 0.125), [x.detach() for x in (q, k, v)])


@every_path
@pytest.mark.parametrize("strided", ["q", "k", "v", "all"])
def test_strided_inputs(path, strided):
    """Any strides, also of the last dimension, as when a view of a fused or transposed tensor comes in."""
    layout = layout_of("training")
    dense = [x.detach() for x in arguments(layout, heads=(2, 2))]
    for spread in (
        lambda x: torch.stack((x, x + 1), -1)[..., 0],
        lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    ):
        views = [spread(x) if strided in (n, "all") else x for n, x in zip("qkv", dense, strict=True)]
        for use_lse in (True, False):
            call = op(layout, "torch", return_lse=use_lse)
            actual = outputs_and_gradients(call, [x.detach().requires_grad_() for x in views])
            expected = outputs_and_gradients(call, [x.clone().requires_grad_() for x in dense])
            for name, value in expected.items():
                torch.testing.assert_close(actual[name], value, msg=lambda m, n=name: f"{n}: {m}")


@every_path
def test_strided_gradients(path):
    """Incoming gradients as autograd hands them on: expanded by a sum, transposed by a reshape."""
    layout = layout_of("training")
    inputs = arguments(layout)
    for reduce in (
        lambda out: out.sum(),
        lambda out: (out.permute(2, 1, 0).reshape(8, -1) * randn(8, 4 * layout.num_queries, grad=False)).sum(),
    ):
        gradients = [
            torch.autograd.grad(reduce(op(layout, backend)(*inputs)), inputs) for backend in ("torch", "reference")
        ]
        for actual, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, expected)


@every_path
@every_pack
def test_unwritten_memory(path, pack, monkeypatch):
    layout = layout_of(pack)
    check_writes_everything(monkeypatch, op(layout, "torch", return_lse=True, out_order="stream"), arguments(layout))
    check_writes_everything(monkeypatch, op(layout, "torch"), arguments(layout))


@every_path
def test_determinism(path):
    layout = layout_of("training")
    inputs = arguments(layout, dtype=torch.bfloat16)
    for use_lse in (True, False):
        call = op(layout, "torch", return_lse=use_lse)
        assert_same(outputs_and_gradients(call, inputs), outputs_and_gradients(call, inputs))


@pytest.mark.parametrize("backend", ALL)
def test_inputs_are_left_alone_and_need_not_all_be_trained(backend):
    layout = layout_of("cached")
    for trained in range(1, 8):
        inputs = arguments(layout, heads=(2, 1), holes=0.0)
        inputs = [x.requires_grad_(bool(trained >> i & 1)) for i, x in enumerate(inputs)]
        copies = [x.detach().clone() for x in inputs]
        assert_accurate_attention(op(layout, backend, return_lse=True), plain(layout), inputs, backend, seeds=1)
        assert all(torch.equal(x, y) for x, y in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("backend", ALL)
def test_autocast_keeps_the_dtype(backend):
    layout = layout_of("training")
    for dtype in (torch.float32, torch.bfloat16):
        inputs = arguments(layout, heads=(2, 1), dtype=dtype)
        expected = outputs_and_gradients(op(layout, backend, return_lse=True), inputs)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(outputs_and_gradients(op(layout, backend, return_lse=True), inputs), expected)


@pytest.mark.parametrize("backend", ["torch", *CPP_BACKENDS, "triton"])
def test_checkpointing(backend):
    layout = layout_of("training")
    for use_lse in (True, False):
        check_checkpoints(op(layout, backend, return_lse=use_lse), arguments(layout, heads=(2, 1)))


@pytest.mark.parametrize("backend", ["torch", *CPP_BACKENDS, "triton"])
def test_compiled_packs_of_other_lengths_share_one_graph(backend):
    """Other lengths, numbers of splits, of samples, of streams."""
    packs = [
        ([[(3, "causal"), (4, "noise")]], None),
        ([[(5, "causal"), (8, "noise")], [(4, "full"), (2, "causal")]], None),
        ([[(2, "full")] * 3 + [(3, "causal")]], None),
        ([[(9, "noise")], [(3, "causal")], [(6, "full"), (2, "causal"), (2, "noise")]], None),
        ([[(9, "causal"), (4, "full")], [(5, "causal")]], [6, 2]),
    ]
    made = []
    for samples, cached in packs:
        queries = sum(n for s in samples for n, _ in s) - sum(cached or [])
        streams = torch.arange(queries) % 2
        made.append(Layout.from_splits(samples, cached=cached, streams=streams))

    def call(q, k, v, layout):
        out = symbiotic_attention(q, k, v, layout, out_order="stream", backend=backend)
        return symbiotic_attention(out * 2, k, v, layout, return_lse=True, backend=backend)

    check_compiles_once(call, [[*arguments(layout, heads=(2, 1)), layout] for layout in made])


def test_small_samples_share_calls():
    """A pack of a hundred small samples must not cost a hundred calls."""
    generator = torch.Generator().manual_seed(0)
    size = lambda low, high: int(torch.randint(low, high, (), generator=generator))  # noqa: E731
    detection = [[(18, "full"), (18, "full"), (size(8, 20), "causal"), (size(8, 30), "causal")] for _ in range(80)]
    generation = [[(size(8, 20), "causal"), (18, "noise")] for _ in range(20)]
    layout = Layout.from_splits(detection + generation)
    calls = torch_backend.plan(layout.splits, torch.device("cpu"))
    assert len(calls) <= 8
    assert sum(call.batch for call in calls) == 100
    computed = sum(call.batch * (call.mask.shape[1] * call.mask.shape[2]) for call in calls if call.mask is not None)
    useful = sum(sum(n for n, _ in s) ** 2 for s in detection + generation)
    assert computed <= torch_backend.PADDING * useful


def test_no_mask_over_a_large_sample():
    """Of a sample of 4 000 tokens, whose mask has 16 million entries, no call holds a mask."""
    layout = Layout.from_splits([[(20, "causal"), (3000, "noise"), (900, "full"), (80, "causal")], [(9, "causal")]])
    calls = torch_backend.plan(layout.splits, torch.device("cpu"))
    masks = [call.mask.numel() for call in calls if call.mask is not None]
    assert masks == [81]  # of the small sample
    assert len(calls) <= 1 + 2 * 4
    gathered = [call.key_rows.numel() for call in calls if isinstance(call.key_rows, torch.Tensor)]
    assert max(gathered) < 1000  # rows before the noised image and after it


def test_plans_are_kept_by_content():
    """Two layouts with the same splits share one plan; the cache is bounded."""
    torch_backend._plan.cache_clear()
    splits = [[(3, "causal"), (4, "noise")]]
    first, second = (Layout.from_splits(splits) for _ in range(2))
    assert torch_backend.plan(first.splits, torch.device("cpu")) is torch_backend.plan(
        second.splits, torch.device("cpu")
    )
    assert torch_backend._plan.cache_info().misses == 1
    assert torch_backend._plan.cache_info().maxsize


def test_plans_made_in_inference_mode_serve_training():
    layout = layout_of("cached")
    torch_backend._plan.cache_clear()
    inputs = arguments(layout, holes=0.0)
    with torch.inference_mode():
        op(layout, "torch")(*inputs)
    outputs_and_gradients(op(layout, "torch", return_lse=True, out_order="stream"), inputs)


def test_default_scale_is_one_over_the_root_of_head_dim():
    layout = layout_of("training")
    inputs = arguments(layout)
    assert torch.equal(op(layout)(*inputs), op(layout, scale=1 / math.sqrt(8))(*inputs))
