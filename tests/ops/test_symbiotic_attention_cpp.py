"""Attention in C++ on the CPU: accuracy over packs and shapes, threads, instruction sets, strides.

What holds for every backend is in test_symbiotic_attention.
"""

import itertools

import pytest
import torch
from attention_cases import (
    DTYPES,
    PACKS,
    TILE_PACKS,
    arguments,
    assert_accurate_kernel,
    check_large_logits,
    check_merging,
    layout_of,
    plain,
    strided_views,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_accurate, outputs_and_gradients
from op_checks import assert_same, at_level, check_writes_everything, misaligned, randn
from test_symbiotic_attention import layouts, op

from unigendet.layout import Layout
from unigendet.ops import symbiotic_attention_extension as extension_backend
from unigendet.ops.backends import available, extension_backends, extension_facts, resolve

pytestmark = pytest.mark.skipif("cpp" not in extension_backends(), reason="unigendet._C is not built")

OP = "symbiotic_attention"
# Splits longer than a tile of queries or a block of keys; a cache so long that dq has parts, some of it never written.
LONG_PACKS = {
    "long splits": {"samples": [[(70, "causal"), (200, "noise"), (90, "full"), (65, "causal")], [(130, "full")]]},
    "long cache": {
        "samples": [[(33, "causal"), (20, "full")], [(2090, "full"), (90, "causal")]],
        "cached": [0, 2150],
        "capacity": [60, 2200],
    },
}
# One token's gradient of q and k is a difference of equal numbers: test_one_token knows its rounding.
ACCURATE_PACKS = (*PACKS, *(name for name in TILE_PACKS if name != "one token"), *LONG_PACKS)


def pack_of(name):
    return Layout.from_splits(**LONG_PACKS[name]) if name in LONG_PACKS else layout_of(name)


def cpp(layout, **options):
    return op(layout, "cpp", **{"return_lse": True, **options})


def check(layout, *, scale=None, out_order="sequence", **shape):
    """That the kernels are as accurate as kernels can be."""
    inputs = arguments(layout, **{"heads": (4, 2), "head_dim": 16, **shape})
    candidate = cpp(layout, scale=scale, out_order=out_order)
    assert_accurate_kernel(candidate, plain(layout, scale, out_order), inputs, "cpp")


def test_auto_takes_it_for_the_dtypes_it_knows():
    for dtype in DTYPES:
        assert resolve(OP, "auto", torch.zeros(1, dtype=dtype)) == "cpp"
    assert resolve(OP, "auto", torch.zeros(1, dtype=torch.float64)) == "torch"
    assert "cpp" in available()[OP]
    layout = layout_of("training")
    inputs = arguments(layout)
    assert_same(outputs_and_gradients(op(layout), inputs), outputs_and_gradients(op(layout, "cpp"), inputs))


@pytest.mark.parametrize(
    ("backend", "tensor", "message"),
    [
        ("cuda", torch.zeros(1), "no such kernel is built"),
        ("cpp", torch.zeros(1, device="meta"), "its tensors are on meta; they must be on the CPU"),
        ("cpp", torch.zeros(1, dtype=torch.float64), "the dtype is torch.float64; it must be one of"),
    ],
)
def test_errors_of_a_backend_that_is_named(backend, tensor, message):
    with pytest.raises(ValueError, match=f"backend='{backend}' cannot run {OP}: {message}"):
        resolve(OP, backend, tensor)


@pytest.mark.parametrize("out_order", ["sequence", "stream"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pack", ACCURATE_PACKS)
def test_accuracy_over_packs(pack, dtype, out_order):
    """Also without a gradient of lse, which is then not a gradient of zeros."""
    layout = pack_of(pack)
    check(layout, dtype=dtype, out_order=out_order)
    expected = lambda *args: plain(layout, out_order=out_order)(*args)[0]  # noqa: E731
    inputs = arguments(layout, dtype=dtype, head_dim=16)
    assert_accurate_kernel(op(layout, "cpp", out_order=out_order), expected, inputs, "cpp")


@settings(max_examples=25)
@given(
    st.one_of(layouts(), layouts(longest=90)),
    st.sampled_from(DTYPES),
    st.sampled_from([(1, 1), (4, 2), (7, 1)]),
    st.integers(1, 40),
    st.sampled_from(["sequence", "stream"]),
)
def test_accuracy_over_random_packs(layout, dtype, heads, head_dim, out_order):
    check(layout, dtype=dtype, heads=heads, head_dim=head_dim, out_order=out_order)


@pytest.mark.parametrize("heads", [(3, 3), (4, 1), (7, 1), (14, 2), (1, 1), (130, 1)])
@pytest.mark.parametrize("head_dim", [1, 8, 16, 30, 64, 72, 128])
def test_accuracy_over_heads_and_head_dims(heads, head_dim):
    """Of 130 heads no tile holds a group."""
    check(layout_of("training"), heads=heads, head_dim=head_dim)


@pytest.mark.parametrize("stream", [0, 1])
def test_an_empty_stream(stream):
    samples = [[(5, "causal"), (14, "noise")]]
    check(Layout.from_splits(samples, streams=[stream] * 19), out_order="stream")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.5, 40.0])
def test_accuracy_over_scales(scale, dtype):
    """40 makes scores of several hundred."""
    check(layout_of("training"), scale=scale, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits(sign, dtype):
    layout = layout_of("training")
    check_large_logits(cpp(layout, scale=0.125), layout, sign, dtype, "cpp")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", [-10.0, 0.0])
@pytest.mark.parametrize("winner", [0, 63, 64, 99])
def test_keys_of_far_smaller_scores_do_not_count(winner, other, dtype):
    """Scores of 800 and of 0 or less: the output is the winner's value, and only the winner has a gradient."""
    layout = Layout.from_splits([[(100, "full")]])
    q, k, v = arguments(layout, heads=(2, 1), dtype=dtype)
    with torch.no_grad():
        q.fill_(10.0)
        k.fill_(other)
        k[winner] = 10.0
    results = outputs_and_gradients(cpp(layout, scale=1.0), [q, k, v])
    assert torch.equal(results["output 0"], v[winner].expand(100, 2, 8))
    assert (results["output 1"] == 800).all()
    losers = torch.arange(100) != winner
    for name in ("gradient of input 1", "gradient of input 2"):
        assert not results[name][losers].any()
        assert results[name][winner].all()


@pytest.mark.parametrize("pack", ["training", "cached tiles", *LONG_PACKS])
def test_the_same_bits_for_any_number_of_threads(pack, monkeypatch):
    layout = pack_of(pack)
    for dtype in DTYPES:
        results = []
        for threads in (1, 1, 2, 3, 5):
            monkeypatch.setattr(extension_backend, "threads", lambda n=threads: n)
            results.append(outputs_and_gradients(cpp(layout), arguments(layout, dtype=dtype)))
        for other in results[1:]:
            assert_same(other, results[0])


@pytest.mark.parametrize("pack", ["cached", "noised images", "long splits"])
def test_every_instruction_set(pack, monkeypatch):
    for level, dtype in itertools.product(extension_facts().get("usable_isa_levels", ()), DTYPES):
        with monkeypatch.context() as patch:
            patch.setattr("unigendet._C", at_level(level))
            check(pack_of(pack), dtype=dtype, head_dim=24)


@pytest.mark.parametrize("strided", ["q", "k", "v", "all"])
def test_strided_inputs(strided):
    layout = layout_of("training")
    dense = [x.detach() for x in arguments(layout)]
    expected = outputs_and_gradients(cpp(layout), [x.clone().requires_grad_() for x in dense])
    for kinds in zip(*map(strided_views, dense), strict=True):
        views = [s if strided in (n, "all") else x for n, x, s in zip("qkv", dense, kinds, strict=True)]
        assert_same(outputs_and_gradients(cpp(layout), [x.requires_grad_() for x in views]), expected)


def test_views_of_one_projection():
    """q, k and v as columns of one matrix, and one kv head expanded to two."""
    layout = layout_of("training")
    fused = randn(layout.num_queries, 4 * 8)

    def call(attend, columns):
        q, k, v = columns.unflatten(1, (4, 8)).split((2, 1, 1), 1)
        return (*attend(q, k, v), *attend(q, k.expand(-1, 2, -1), v.expand(-1, 2, -1)))

    expected = lambda x: call(plain(layout), x)  # noqa: E731
    assert_accurate(lambda x: call(cpp(layout), x), expected, expected, [fused], factor=4, seeds=1)


@pytest.mark.parametrize("out_order", ["sequence", "stream"])
def test_strided_gradients(out_order):
    """Incoming gradients as autograd hands them on: expanded by a sum, transposed by a reshape; also that of lse."""
    layout = layout_of("training")
    inputs = arguments(layout)
    weight = randn(8, 4 * layout.num_queries, grad=False)
    out, lse = cpp(layout, out_order=out_order)(*inputs)
    transposed = weight.view(8, 4, -1).permute(2, 1, 0)
    gradients = [
        (torch.ones(()).expand(out.shape), torch.ones(()).expand(lse.shape)),
        (transposed, weight[0].view(-1, 4).T),
        (transposed, weight.flatten()[: 2 * lse.numel()].view(*lse.shape, 2)[..., 0]),
    ]
    for strided in gradients:
        assert not any(g.is_contiguous() for g in strided)
        have = torch.autograd.grad((out, lse), inputs, strided, retain_graph=True)
        want = torch.autograd.grad((out, lse), inputs, [g.contiguous() for g in strided], retain_graph=True)
        for left, right in zip(have, want, strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_at_any_address(dtype):
    """What torch.frombuffer makes: numbers at addresses that are no multiple of their size."""
    layout = layout_of("cached")
    call = torch.ops.unigendet.symbiotic_attention
    differentiate = torch.ops.unigendet.symbiotic_attention_backward
    inputs = [x.detach() for x in arguments(layout, dtype=dtype)]
    mask = [layout.query_begin, layout.query_end, layout.splits, layout.sequence_to_stream]
    forward = (*inputs, *mask)
    results = call(*forward, 0.3, "cpp")
    backward = (results[0] * 2, results[1] * 3, *inputs, *results, *mask)
    expected = (*results, *differentiate(*backward, 0.3, "cpp"))
    have = (*call(*map(misaligned, forward), 0.3, "cpp"), *differentiate(*map(misaligned, backward), 0.3, "cpp"))
    for left, right in zip(have, expected, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("pack", ["cached", "cached tiles", "long cache"])
def test_what_is_in_holes_does_not_matter(pack):
    """Key rows that nobody sees: their content has no effect, and their gradient is zero."""
    layout = pack_of(pack)
    unseen = ~layout.dense_mask().any(0)
    found = []
    for holes in (0.0, float("nan"), float("inf")):
        inputs = arguments(layout)
        with torch.no_grad():
            inputs[1][unseen], inputs[2][unseen] = holes, holes
        found.append(outputs_and_gradients(cpp(layout), inputs))
    for other in found[1:]:
        assert_same(other, found[0])
    for name in ("gradient of input 1", "gradient of input 2"):
        assert unseen.any()
        assert not found[0][name][unseen].any()


@pytest.mark.parametrize(("pack", "out_order"), [("cached", "stream"), ("long splits", "sequence")])
@pytest.mark.parametrize("head_dim", [16, 24])
def test_unwritten_memory(pack, out_order, head_dim, monkeypatch):
    layout = pack_of(pack)
    for return_lse in (True, False):
        call = cpp(layout, out_order=out_order, return_lse=return_lse)
        check_writes_everything(monkeypatch, call, arguments(layout, head_dim=head_dim))


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_over_disjoint_keys_merge(dtype):
    check_merging(cpp, dtype, "cpp", 90, 75)
