"""The flash backend: its decomposition against the definition, with a plain function in the library's place."""

from types import SimpleNamespace

import dense_varlen
import pytest
import torch
from attention_cases import PACKS, arguments, layout_of, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_accurate, outputs_and_gradients
from op_checks import assert_same, check_checkpoints, check_compiles_once, check_writes_everything

from unigendet.layout import MODES, Layout
from unigendet.ops import backends, symbiotic_attention
from unigendet.ops import symbiotic_attention_flash as flash

CPU = torch.device("cpu")
every_pack = pytest.mark.parametrize("pack", PACKS)


def stand_in(patch):
    """The dense function in the library's place, on the CPU, in any dtype."""
    patch.setattr(flash, "library", lambda device: dense_varlen.LIBRARY)
    patch.setattr(backends, "_check_flash", lambda op, q: None)


@pytest.fixture
def dense(monkeypatch):
    stand_in(monkeypatch)


def op(layout, backend="flash", **options):
    return lambda q, k, v: symbiotic_attention(q, k, v, layout, backend=backend, **options)


def no_lse_gradient(layout, backend="flash", **options):
    """Both outputs, of which only the first is differentiated."""

    def call(q, k, v):
        out, lse = symbiotic_attention(q, k, v, layout, backend=backend, return_lse=True, **options)
        return out, lse.detach()

    return call


def as_rows(rows):
    return torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.long()


def pairs_of(call):
    """Every (query row, key row) of a call, and the key rows it gathers for each problem."""
    queries, keys = as_rows(call.query_rows), as_rows(call.key_rows)
    for rows, columns, mask in dense_varlen._problems(call, len(queries), len(keys)):
        q, k = mask.nonzero().unbind(1)
        yield queries[rows][q], keys[columns][k]


def check_plan(layout):
    """Every visible pair once, no other; every query once; no key that its problem's queries do not see."""
    calls = flash.plan(layout.splits, CPU)
    assert len(calls) <= 2
    assert len({call.causal for call in calls}) == len(calls)
    count = torch.zeros(layout.num_queries, layout.num_keys, dtype=torch.int64)
    for call in calls:
        seen = 0
        for q, k in pairs_of(call):
            count.index_put_((q, k), torch.ones_like(q), accumulate=True)
            seen += len(k.unique())
        assert seen == len(as_rows(call.key_rows))
    assert torch.equal(count, layout.dense_mask().long())
    queries = torch.cat([as_rows(call.query_rows) for call in calls])
    assert torch.equal(queries.sort().values, torch.arange(layout.num_queries))
    for call in calls:
        if call.rounds:
            places = torch.cat([places for _, places in call.rounds])
            assert torch.equal(places.sort().values, torch.arange(len(call.key_rows), dtype=torch.int32))
        for rows, places in call.rounds:
            assert len(rows.unique()) == len(rows)
            assert torch.equal(call.key_rows[places], rows)


@st.composite
def layouts(draw):
    split = st.tuples(st.integers(1, 6), st.sampled_from(MODES))
    samples = draw(st.lists(st.lists(split, min_size=1, max_size=6), min_size=1, max_size=4))
    tokens = [sum(n for n, _ in s) for s in samples]
    cached = [draw(st.integers(0, n)) for n in tokens]
    if sum(cached) == sum(tokens):
        cached[0] = 0
    capacity = [n + draw(st.integers(0, 2)) for n in tokens]
    queries = sum(tokens) - sum(cached)
    streams = draw(st.lists(st.integers(0, 1), min_size=queries, max_size=queries))
    return Layout.from_splits(samples, streams=streams, cached=cached, capacity=capacity)


@every_pack
def test_the_calls_are_the_mask(pack):
    check_plan(layout_of(pack))


@given(layouts())
def test_the_calls_are_the_mask_of_any_layout(layout):
    check_plan(layout)


@every_pack
@pytest.mark.parametrize("out_order", ["sequence", "stream"])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (7, 1)])
def test_agrees_with_the_reference(dense, pack, out_order, heads):
    layout = layout_of(pack)
    inputs = arguments(layout, heads=heads, dtype=torch.float64)
    actual = outputs_and_gradients(no_lse_gradient(layout, out_order=out_order, scale=0.4), inputs)
    expected = outputs_and_gradients(no_lse_gradient(layout, "reference", out_order=out_order, scale=0.4), inputs)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=40)
@given(layouts(), st.sampled_from(["sequence", "stream"]))
def test_agrees_with_the_reference_on_any_layout(layout, out_order):
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        inputs = arguments(layout, dtype=torch.float64)
        actual = outputs_and_gradients(no_lse_gradient(layout, out_order=out_order), inputs)
        expected = outputs_and_gradients(no_lse_gradient(layout, "reference", out_order=out_order), inputs)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@every_pack
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_accuracy_of_low_precision(dense, pack, dtype):
    """The parts of a key's gradient are summed in float32, each rounded once: no worse than plain PyTorch."""
    layout = layout_of(pack)
    expected = lambda *args: plain(layout)(*args)[0]  # noqa: E731
    assert_accurate(op(layout), expected, expected, arguments(layout, dtype=dtype, head_dim=16), factor=4)


@pytest.mark.parametrize(
    ("samples", "options", "sliced"),
    [
        ([[(9, "full")], [(4, "full")], [(6, "full")]], {}, {False: (19, 19)}),  # the ViT
        ([[(5, "noise")]], {}, {False: (5, 5)}),
        ([[(7, "causal"), (3, "causal")], [(4, "causal")]], {}, {True: (14, 14)}),
        ([[(6, "causal"), (4, "full")]], {"cached": [6]}, {False: (4, 10)}),  # an image against its prefix
        ([[(6, "full"), (4, "causal")]], {"cached": [9], "capacity": [12]}, {True: (1, 10)}),
        ([[(3, "noise"), (4, "causal")]], {"cached": [3]}, {True: (4, 7)}),  # and a noised image nobody sees
    ],
)
def test_consecutive_rows_are_not_gathered(samples, options, sliced):
    layout = Layout.from_splits(samples, **options)
    calls = flash.plan(layout.splits, CPU)
    assert {call.causal for call in calls} == set(sliced)
    for call in calls:
        queries, key_end = sliced[call.causal]
        assert call.query_rows == slice(0, queries)
        assert call.key_rows.stop == key_end
        assert call.rounds == ()
    check_plan(layout)


def test_nothing_is_copied_for_the_vit(dense, monkeypatch):
    """Outputs and gradients are those that the library made."""
    made = []
    wrap = lambda f: lambda *args: made.extend(results := f(*args)) or results  # noqa: E731
    library = flash.Library("recording", wrap(dense_varlen.forward), wrap(dense_varlen.backward))
    monkeypatch.setattr(flash, "library", lambda device: library)
    layout = Layout.from_splits([[(9, "full")], [(4, "full")]])
    q, k, v = (x.detach() for x in arguments(layout))
    out, lse = flash.forward(q, k, v, layout.splits, 0.3)
    assert out is made[0]
    assert lse is made[1]
    grads = flash.backward(out, None, q, k, v, out, lse, layout.splits, 0.3)
    assert all(x is y for x, y in zip(grads, made[2:], strict=True))


def test_texts_continue_over_noised_images():
    """Nobody sees a noised image, so the texts around it are one causal problem; a seen image ends it."""
    layout = Layout.from_splits(
        [[(3, "causal"), (2, "causal"), (4, "noise"), (2, "causal"), (1, "full"), (2, "causal")]]
    )
    full, causal = flash.plan(layout.splits, CPU)
    assert causal.cu_seqlens_q.tolist() == [0, 7, 9]
    assert causal.cu_seqlens_k.tolist() == [0, 7, 17]
    assert full.cu_seqlens_k.tolist() == [0, 9, 17]


def test_plans_are_kept_by_content():
    flash._plan.cache_clear()
    first, second = (layout_of("training") for _ in range(2))
    assert flash.plan(first.splits, CPU) is flash.plan(second.splits, CPU)
    assert flash._plan.cache_info().misses == 1
    assert flash._plan.cache_info().maxsize
    tensors = [x for call in flash.plan(first.splits, CPU) for x in vars(call).values() if isinstance(x, torch.Tensor)]
    assert {x.dtype for x in tensors} == {torch.int32}


def test_plans_made_in_inference_mode_serve_training(dense):
    layout = layout_of("cached")
    flash._plan.cache_clear()
    inputs = arguments(layout)
    with torch.inference_mode():
        op(layout)(*inputs)
    outputs_and_gradients(op(layout, out_order="stream"), inputs)


@pytest.mark.parametrize("pack", ["training", "cached"])
def test_operator_contract(dense, pack):
    layout = layout_of(pack)
    inputs = [x.detach().requires_grad_() for x in arguments(layout, holes=0.0)]
    for out_rows in (None, layout.sequence_to_stream):
        rest = (layout.query_begin, layout.query_end, layout.splits, out_rows, 0.3, "flash")
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")  # the fourth differentiates lse
        torch.library.opcheck(torch.ops.unigendet.symbiotic_attention.default, (*inputs, *rest), test_utils=checks)
        tensors = [x.detach() for x in inputs]
        out, lse = torch.ops.unigendet.symbiotic_attention(*tensors, *rest)
        backward = torch.ops.unigendet.symbiotic_attention_backward.default
        torch.library.opcheck(backward, (out * 2, None, *tensors, out, lse, *rest))


@every_pack
def test_strides_memory_determinism_and_checkpoints(dense, pack, monkeypatch):
    layout = layout_of(pack)
    inputs = arguments(layout, heads=(2, 2))
    call = op(layout, out_order="stream")
    expected = outputs_and_gradients(call, inputs)
    assert_same(outputs_and_gradients(call, inputs), expected)
    check_writes_everything(monkeypatch, call, inputs)
    check_checkpoints(call, inputs)
    for spread in (
        lambda x: torch.stack((x, x + 1), -1)[..., 0],
        lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),  # off by one element
    ):
        views = [spread(x.detach()).requires_grad_() for x in inputs]
        assert_same(outputs_and_gradients(call, views), expected)
    gradients = [torch.autograd.grad(op(layout, b)(*inputs).sum(), inputs) for b in ("flash", "reference")]
    for actual, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, exact)


def test_compiled_packs_of_other_lengths_share_one_graph(dense):
    packs = [
        [[(3, "causal"), (4, "noise")]],
        [[(5, "causal"), (8, "noise")], [(4, "full"), (2, "causal")]],
        [[(2, "full")] * 3],
        [[(9, "noise")], [(3, "causal")], [(6, "full"), (2, "causal"), (2, "noise")]],
    ]
    layouts_ = [Layout.from_splits(samples) for samples in packs]

    def call(q, k, v, layout):
        return symbiotic_attention(q, k, v, layout, out_order="stream", backend="flash")

    check_compiles_once(call, [[*arguments(layout), layout] for layout in layouts_])


def test_no_gradient_through_lse(dense):
    layout = layout_of("training")
    with pytest.raises(ValueError, match=r"gradient through lse: FlashAttention does not have it; .*'torch' do"):
        outputs_and_gradients(op(layout, return_lse=True), arguments(layout))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_the_scale_must_be_positive(dense, scale):
    layout = layout_of("training")
    with pytest.raises(ValueError, match=f"scale is {scale}; backend='flash' needs a positive one"):
        op(layout, scale=scale)(*arguments(layout))


@pytest.mark.parametrize(
    ("q", "message"),
    [
        (("cpu", torch.bfloat16, 64), "its tensors are on cpu; they must be on a CUDA device"),
        (("cuda", torch.float32, 64), r"the dtype is torch.float32; it must be one of torch.bfloat16, torch.float16"),
        (("cuda", torch.bfloat16, 36), "head_dim is 36; it must be a multiple of 8, at most 256"),
        (("cuda", torch.bfloat16, 264), "head_dim is 264"),
    ],
)
def test_what_it_cannot_run_it_says(q, message):
    device, dtype, head_dim = q
    tensor = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(3, 4, head_dim))
    with pytest.raises(ValueError, match="backend='flash' cannot run symbiotic_attention: " + message):
        backends.resolve("symbiotic_attention", "flash", tensor)


@pytest.mark.parametrize("head_dim", [8, 72, 128, 256])
def test_what_it_can_run(head_dim):
    tensor = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(3, 4, head_dim))
    assert backends.resolve("symbiotic_attention", "flash", tensor) == "flash"


def test_planning_a_large_pack_takes_linear_memory():
    """Rows, not pairs: what a pack of 64k tokens gathers is a small multiple of its tokens."""
    samples = [[(2500, "full"), (2300, "full"), (60, "causal"), (150, "causal")] for _ in range(13)]
    layout = Layout.from_splits(samples)
    calls = flash.plan(layout.splits, CPU)
    gathered = sum(len(as_rows(call.key_rows)) for call in calls)
    assert gathered <= 3 * layout.num_keys
