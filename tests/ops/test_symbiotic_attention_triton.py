"""The Triton kernels of attention in Triton's interpreter: accuracy over packs, shapes, tiles and strides.

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
from op_checks import assert_same, check_writes_everything, randn
from test_symbiotic_attention import layouts, op
from unigendet.kernels import config as configs
from unigendet.kernels import launch

from unigendet.layout import Layout

F32, F16, BF16 = DTYPES
# (block_m, block_n, descriptors), order of the output, deterministic
VARIANTS = {
    "16x16": ((16, 16, False), "sequence", True),
    "16x32": ((16, 32, False), "stream", False),
    "32x16": ((32, 16, False), "stream", True),
    "descriptors": ((32, 32, True), "sequence", False),
}
TRIED = [
    *(("16x16", F32), ("16x32", F16), ("16x32", BF16), ("32x16", F32), ("32x16", BF16)),
    *(("descriptors", F32), ("descriptors", F16), ("descriptors", BF16)),
]
every_pack = pytest.mark.parametrize("pack", [*PACKS, *TILE_PACKS])


def use_tiles(patch, block_m, block_n, tma):
    def config(*_, describable):
        return configs.AttentionConfig(block_m, block_n, 4, 1, tma and describable)

    patch.setattr(configs, "attention_config", config)


def triton(layout, **options):
    return op(layout, "triton", **{"return_lse": True, **options})


def check(layout, *, scale=None, out_order="sequence", deterministic=True, **shape):
    """That the kernels are as accurate as kernels can be."""
    inputs = arguments(layout, **{"heads": (2, 1), "head_dim": 16, **shape})
    candidate = triton(layout, scale=scale, out_order=out_order, deterministic=deterministic)
    assert_accurate_kernel(candidate, plain(layout, scale, out_order), inputs, "triton")


@every_pack
@pytest.mark.parametrize(("variant", "dtype"), TRIED)
def test_accuracy_over_packs(variant, dtype, pack, monkeypatch):
    tiles, out_order, deterministic = VARIANTS[variant]
    use_tiles(monkeypatch, *tiles)
    check(layout_of(pack), dtype=dtype, out_order=out_order, deterministic=deterministic)


@settings(max_examples=12)
@given(layouts(), st.sampled_from(sorted(VARIANTS)))
def test_accuracy_over_random_packs(layout, variant):
    tiles, out_order, deterministic = VARIANTS[variant]
    with pytest.MonkeyPatch.context() as patch:
        use_tiles(patch, *tiles)
        check(layout, out_order=out_order, deterministic=deterministic)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("head_dim", [1, 3, 8, 16, 32, 64, 72, 80, 96, 128])
def test_accuracy_over_head_dims(head_dim, tma, monkeypatch):
    """In one column block or in two; with more than one kv head, whose columns lie beside each other."""
    use_tiles(monkeypatch, 16, 16, tma)
    check(layout_of("training"), dtype=torch.float16, heads=(2, 2), head_dim=head_dim, deterministic=not tma)


@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (4, 4), (7, 1), (14, 2)])
def test_accuracy_over_heads(heads):
    check(layout_of("training"), heads=heads, out_order="stream", deterministic=heads[1] == 1)


@pytest.mark.parametrize("stream", [0, 1])
def test_an_empty_stream(stream):
    samples = [[(5, "causal"), (14, "noise")]]
    check(Layout.from_splits(samples, streams=[stream] * 19), out_order="stream")


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.5])
def test_accuracy_over_scales(scale, deterministic):
    """The maximum is taken before scaling, which must hold for a negative factor too."""
    check(layout_of("training"), scale=scale, deterministic=deterministic)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits(sign, dtype):
    layout = layout_of("training")
    check_large_logits(triton(layout, scale=0.125), layout, sign, dtype, "triton")


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("strided", ["q", "k", "v", "all"])
def test_strided_inputs(strided, tma, monkeypatch):
    use_tiles(monkeypatch, 16, 16, tma)
    layout = layout_of("training")
    dense = [x.detach() for x in arguments(layout, heads=(1, 1))]
    expected = outputs_and_gradients(triton(layout), [x.clone().requires_grad_() for x in dense])
    for kinds in zip(*map(strided_views, dense), strict=True):
        views = [s if strided in (n, "all") else x for n, x, s in zip("qkv", dense, kinds, strict=True)]
        assert_same(outputs_and_gradients(triton(layout), [x.requires_grad_() for x in views]), expected)


@pytest.mark.parametrize("tma", [False, True])
def test_views_of_one_projection(tma, monkeypatch):
    """q, k and v as columns of one matrix, and one kv head expanded to two."""
    use_tiles(monkeypatch, 16, 16, tma)
    layout = layout_of("training")
    fused = randn(layout.num_queries, 4 * 8)

    def call(attend, columns):
        q, k, v = columns.unflatten(1, (4, 8)).split((2, 1, 1), 1)
        return (*attend(q, k, v), *attend(q, k.expand(-1, 2, -1), v.expand(-1, 2, -1)))

    expected = lambda x: call(plain(layout), x)  # noqa: E731
    assert_accurate(lambda x: call(triton(layout), x), expected, expected, [fused], factor=4, seeds=1)


@pytest.mark.parametrize("out_order", ["sequence", "stream"])
def test_strided_gradients(out_order):
    """Incoming gradients as autograd hands them on: expanded by a sum, transposed by a reshape; also that of lse."""
    layout = layout_of("training")
    inputs = arguments(layout, heads=(2, 1))
    weight = randn(8, 2 * layout.num_queries, grad=False)
    for reduce in (
        lambda out, lse: out.sum() + lse.sum(),
        lambda out, lse: (out.permute(2, 1, 0).reshape(8, -1) * weight).sum() + (lse.T.flatten() * weight[0]).sum(),
    ):
        actual, expected = (
            torch.autograd.grad(reduce(*op(layout, backend, return_lse=True, out_order=out_order)(*inputs)), inputs)
            for backend in ("triton", "reference")
        )
        for have, want in zip(actual, expected, strict=True):
            torch.testing.assert_close(have, want)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(("pack", "out_order"), [("cached", "stream"), ("text over tiles", "sequence")])
def test_unwritten_memory(pack, out_order, deterministic, monkeypatch):
    layout = layout_of(pack)
    options = {"out_order": out_order, "deterministic": deterministic}
    check_writes_everything(monkeypatch, triton(layout, **options), arguments(layout, heads=(1, 1), head_dim=24))


def test_runs_are_equal_to_the_last_bit():
    layout = layout_of("noised images")
    inputs = arguments(layout, heads=(2, 1), dtype=torch.bfloat16)
    assert_same(*(outputs_and_gradients(triton(layout), inputs) for _ in range(2)))


def test_what_is_in_holes_does_not_matter():
    """Key rows that nobody sees: their content has no effect, and their gradient is zero."""
    layout = layout_of("cached tiles")
    found = []
    for holes in (0.0, float("nan"), float("inf")):
        found.append(outputs_and_gradients(triton(layout), arguments(layout, heads=(1, 1), holes=holes)))
    for other in found[1:]:
        assert_same(other, found[0])
    unseen = ~layout.dense_mask().any(0)
    for name in ("gradient of input 1", "gradient of input 2"):
        assert not found[0][name][unseen].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_results_over_disjoint_keys_merge(dtype):
    check_merging(triton, dtype, "triton", 18, 21)


def test_descriptors_are_used_where_they_can_be(monkeypatch):
    made, descriptor = [], launch._descriptor

    def counted(*args):
        made.append(args)
        return descriptor(*args)

    monkeypatch.setattr(launch, "_descriptor", counted)
    layout = layout_of("single tokens")
    for tma, head_dim in itertools.product((False, True), (8, 9, 24)):
        use_tiles(monkeypatch, 16, 16, tma)
        made.clear()
        outputs_and_gradients(triton(layout), arguments(layout, heads=(1, 1), head_dim=head_dim))
        blocks = 2 if head_dim > 16 else 1  # column blocks; three kernels load two tensors in tiles
        assert len(made) == (6 * blocks if tma and head_dim != 9 else 0)


@pytest.mark.parametrize(
    ("tensor", "possible"),
    [
        (torch.empty(5, 2, 8, dtype=torch.float16), True),
        (torch.empty(5, 4, 8, dtype=torch.float16)[:, 1:3], True),
        (torch.empty(5, 2, 4, dtype=torch.float16), False),  # rows of a head are 8 bytes
        (torch.empty(5, 2, 4), True),
        (torch.empty(5, 1, 8).expand(5, 2, 8), False),
        (torch.empty(1, 2, 8).expand(5, 2, 8), False),  # as a sum over rows hands its gradient on
        (torch.empty(100).as_strided((5, 2, 8), (8, 8, 1)), False),  # rows overlap
        (torch.empty(2, 5, 8).transpose(0, 1), False),
        (torch.empty(5 * 16 + 1)[1:].view(5, 2, 8), False),  # starts at 4 bytes
        (torch.empty(5, 18)[:, :16].unflatten(1, (2, 8)), False),  # rows lie 72 bytes apart
    ],
)
def test_what_descriptors_can_describe(tensor, possible):
    assert launch.describable(tensor) == possible
    assert launch.describable(torch.empty(1, 1, 16), tensor) == possible
    assert launch.tile_sources(False, {"x": (tensor, 16)}, 16, 0) == {"x0_source": tensor, "x1_source": None}
