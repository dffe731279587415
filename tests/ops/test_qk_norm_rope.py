"""Per-head norm, RoPE and the change of order, against the decoder's own steps in plain PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_accurate, outputs_and_gradients
from op_checks import BACKENDS as PORTABLE
from op_checks import (
    assert_same,
    check_checkpoints,
    check_compiles_once,
    check_writes_everything,
    randn,
)

from unigendet.layout import Layout
from unigendet.ops import qk_norm_rope, rope_table
from unigendet.ops.backends import available

CPP = [name for name in available()["qk_norm_rope"] if name == "cpp"]  # where it is built; it knows no float64
BACKENDS = (*PORTABLE, "triton", *CPP)
STREAMS = ["mixed", "understanding", "generation", "one token"]
HEADS = [(4, 2), (7, 1), (3, 3)]


def layout_of(streams):
    if streams == "one token":
        return Layout.from_splits([[(1, "causal")]], positions=[3])
    splits = [[(3, "causal"), (4, "noise")], [(2, "full"), (2, "causal")]]
    of = {"mixed": [0, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0], "understanding": [0] * 11, "generation": [1] * 11}[streams]
    return Layout.from_splits(splits, streams=of)


def arguments(layout, *, heads=(4, 2), head_dim=8, dtype=torch.float32, weight_dtype=None):
    """qkv, q_norms und and gen, k_norms und and gen."""
    weights = [randn(head_dim, dtype=weight_dtype or dtype, seed=i) for i in range(4)]
    return [randn(layout.num_queries, (heads[0] + 2 * heads[1]) * head_dim, dtype=dtype), *weights]


def op(layout, backend="auto", *, heads=(4, 2), head_dim=8, eps=1e-6, cache=None, theta=1e4):
    cos, sin = rope_table(layout.max_position + 1, head_dim, theta)

    def call(qkv, q_und, q_gen, k_und, k_gen):
        options = {"num_heads": heads[0], "num_kv_heads": heads[1], "eps": eps, "cache": cache, "backend": backend}
        return qk_norm_rope(qkv, (q_und, q_gen), (k_und, k_gen), cos, sin, layout, **options)

    return call


def plain(layout, heads=(4, 2), head_dim=8, eps=1e-6, theta=1e4):
    """Token by token in sequence order, rounding after each step as the Qwen2 decoder does."""
    generation = layout.stream_to_sequence[layout.stream_lengths[0] :]
    is_generation = torch.zeros(layout.num_queries, 1, 1, dtype=torch.bool)
    is_generation[generation] = True
    cos, sin = (t[layout.positions][:, None] for t in rope_table(layout.max_position + 1, head_dim, theta))

    def norm_rope(x, und, gen):
        wide = x if x.dtype == torch.float64 else x.float()
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
        normed = torch.where(is_generation, gen.to(x.dtype) * normed, und.to(x.dtype) * normed)
        c, s = (torch.cat((t, t), -1).to(x.dtype) for t in (cos, sin))
        first, second = normed.chunk(2, -1)
        return normed * c + torch.cat((-second, first), -1) * s

    def call(qkv, q_und, q_gen, k_und, k_gen):
        q, k, v = qkv[layout.sequence_to_stream].unflatten(1, (-1, head_dim)).split((heads[0], heads[1], heads[1]), 1)
        return norm_rope(q, q_und, q_gen), norm_rope(k, k_und, k_gen), v

    return call


def op_arguments(layout, inputs, backend, heads=(4, 2), head_dim=8):
    cos, sin = rope_table(layout.max_position + 1, head_dim, 1e4)
    maps = (layout.stream_to_sequence, layout.sequence_to_stream, layout.positions, layout.stream_lengths)
    return (*inputs, cos, sin, *maps), (list(heads), 1e-6), backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_contract(backend):
    layout = layout_of("mixed")
    inputs = arguments(layout)
    tensors, numbers, _ = op_arguments(layout, inputs, backend)
    torch.library.opcheck(torch.ops.unigendet.qk_norm_rope.default, (*tensors, *numbers, backend))
    detached = [t.detach() for t in tensors]
    gradients = [randn(layout.num_queries, h, 8, grad=False) for h in (4, 2, 2)]
    for mask in ([True] * 5, [True, False, True, False, True], [False, True, False, True, False]):
        torch.library.opcheck(
            torch.ops.unigendet.qk_norm_rope_backward.default, (*gradients, *detached, *numbers, mask, backend)
        )
    cache = [randn(layout.num_keys + 2, 2, 8, grad=False) for _ in range(2)]
    torch.library.opcheck(
        torch.ops.unigendet.qk_norm_rope_into.default,
        (*detached, layout.key_rows, *cache, *numbers, backend),
    )


@pytest.mark.parametrize("backend", PORTABLE)
@pytest.mark.parametrize("streams", STREAMS)
def test_gradients(backend, streams):
    layout = layout_of(streams)
    inputs = arguments(layout, heads=(2, 1), head_dim=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(op(layout, backend, heads=(2, 1), head_dim=4), inputs)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (backend, dtype)
        for backend in (*PORTABLE, *CPP)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        if backend in PORTABLE or dtype != torch.float64
    ],
)
@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", [16, 72])
def test_accuracy(backend, streams, dtype, heads, head_dim):
    layout = layout_of(streams)
    expected = plain(layout, heads, head_dim)
    inputs = arguments(layout, heads=heads, head_dim=head_dim, dtype=dtype)
    assert_accurate(op(layout, backend, heads=heads, head_dim=head_dim), expected, expected, inputs, seeds=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_weights_with_bfloat16_rows(backend):
    layout = layout_of("mixed")
    inputs = arguments(layout, dtype=torch.bfloat16, weight_dtype=torch.float32)
    assert_accurate(op(layout, backend), plain(layout), plain(layout), inputs)


@settings(max_examples=20)
@given(st.data())
def test_torch_agrees_with_the_reference(data):
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    streams = data.draw(st.lists(st.integers(0, 1), min_size=sum(lengths), max_size=sum(lengths)))
    positions = data.draw(st.lists(st.integers(0, 40), min_size=sum(lengths), max_size=sum(lengths)))
    layout = Layout.from_splits([[(n, "causal") for n in lengths]], streams=streams, positions=positions)
    inputs = arguments(layout, dtype=torch.float64)
    actual = outputs_and_gradients(op(layout, "torch"), inputs)
    for name, value in outputs_and_gradients(op(layout, "reference"), inputs).items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("backend", "trained"), [(b, t) for b in BACKENDS for t in range(1, 32) if b in PORTABLE or t in (1, 4, 22, 30)]
)
def test_frozen_tensors_get_no_gradient(backend, trained):
    layout = layout_of("mixed")
    inputs = [x.requires_grad_(bool(trained >> i & 1)) for i, x in enumerate(arguments(layout))]
    assert_accurate(op(layout, backend), plain(layout), plain(layout), inputs, seeds=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", [0, 1, 2])
def test_one_output_alone(backend, used):
    """Gradients of outputs that nobody uses count as zero."""
    layout = layout_of("mixed")
    inputs = arguments(layout)
    actual = outputs_and_gradients(lambda *args: op(layout, backend)(*args)[used], inputs)
    expected = outputs_and_gradients(lambda *args: plain(layout)(*args)[used], inputs)
    for name, value in expected.items():
        have = actual[name]
        torch.testing.assert_close(have, torch.zeros_like(have) if value is None else value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_zeros(backend):
    """A head of zeros has the finite scale 1/sqrt(eps)."""
    layout = layout_of("mixed")
    inputs = arguments(layout)
    inputs[0] = torch.zeros_like(inputs[0]).requires_grad_()
    results = outputs_and_gradients(op(layout, backend), inputs)
    assert all(x.isfinite().all() for x in results.values())
    assert_accurate(op(layout, backend), plain(layout), plain(layout), inputs)


@pytest.mark.parametrize(
    ("backend", "streams"),
    [(b, s) for b in ("torch", *CPP) for s in STREAMS] + [("triton", "mixed"), ("triton", "one token")],
)
def test_strided_input_and_unwritten_memory(backend, streams, monkeypatch):
    layout = layout_of(streams)
    qkv, *weights = arguments(layout)
    spread = torch.stack((qkv, qkv), -1).detach()
    for x in (spread[..., 0], qkv.detach().T.contiguous().T, torch.cat((qkv, qkv), 1).detach()[:, : qkv.shape[1]]):
        inputs = [x.requires_grad_(), *weights]
        assert_accurate(op(layout, backend), plain(layout), plain(layout), inputs, seeds=1)
        check_writes_everything(monkeypatch, op(layout, backend), inputs)


def test_tables_may_be_longer_and_of_another_dtype():
    layout = layout_of("mixed")
    inputs = arguments(layout)
    cos, sin = rope_table(500, 8, 1e4)

    def call(cos, sin):
        norms = ((inputs[1], inputs[2]), (inputs[3], inputs[4]))
        return qk_norm_rope(inputs[0], *norms, cos, sin, layout, num_heads=4, num_kv_heads=2)

    for x, y in zip(call(cos, sin), op(layout)(*inputs), strict=True):
        assert torch.equal(x, y)
    for x, y in zip(call(cos.double(), sin.double()), op(layout)(*inputs), strict=True):
        torch.testing.assert_close(x, y)


def test_rope_table():
    """cos and sin of p · theta^(−2i/d), to the rounding of the float32 angle."""
    cos, sin = rope_table(1000, 6, 1e6)
    assert cos.dtype == sin.dtype == torch.float32
    angle = torch.arange(1000).double()[:, None] * 1e6 ** (-torch.arange(3).double() / 3)
    tolerance = {"rtol": 0, "atol": 1000 * 2 * torch.finfo(torch.float32).eps}
    torch.testing.assert_close(cos.double(), angle.cos(), **tolerance)
    torch.testing.assert_close(sin.double(), angle.sin(), **tolerance)
    with pytest.raises(ValueError, match="head_dim is 5; it must be even"):
        rope_table(4, 5, 1e4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_gets_the_new_rows_and_nothing_else(backend, dtype):
    layout = Layout.from_splits(
        [[(3, "causal"), (4, "noise")], [(5, "causal")], [(2, "full"), (2, "causal")]],
        streams=[0, 1, 0, 1, 1, 0, 0, 1],
        cached=[3, 4, 1],
        capacity=[9, 5, 7],
    )
    inputs = arguments(layout, dtype=dtype)
    cache = [torch.full((21, 2, 8), float("nan"), dtype=dtype) for _ in range(2)]
    with torch.no_grad():
        q, k, v = op(layout, backend, cache=tuple(cache))(*inputs)
        assert k is cache[0]
        assert v is cache[1]
        alone = Layout.from_splits(
            [[(layout.num_queries, "causal")]],
            positions=layout.positions,
            streams=[0, 1, 0, 1, 1, 0, 0, 1],
        )
        expected = op(alone, backend)(*inputs)
    new = [3, 4, 5, 6, 13, 15, 16, 17]
    assert layout.key_rows.tolist() == new
    others = [row for row in range(21) if row not in new]
    assert torch.equal(q, expected[0])
    for have, want in ((k, expected[1]), (v, expected[2])):
        assert torch.equal(have[new], want)
        assert have[others].isnan().all()


def test_cache_is_for_inference_only():
    layout = layout_of("mixed")
    inputs = arguments(layout)
    cache = tuple(torch.zeros(11, 2, 8) for _ in range(2))
    with pytest.raises(ValueError, match="cache is given; it must be None when gradients are recorded"):
        op(layout, cache=cache)(*inputs)
    assert not any(x.any() for x in cache)
    op(layout, cache=cache)(*[x.detach() for x in inputs])
    with torch.inference_mode():
        op(layout, cache=cache)(*inputs)


def test_autocast_keeps_the_dtype():
    layout = layout_of("mixed")
    for dtype in (torch.float32, torch.bfloat16):
        inputs = arguments(layout, dtype=dtype)
        expected = outputs_and_gradients(op(layout), inputs)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(outputs_and_gradients(op(layout), inputs), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_determinism_and_checkpointing(backend):
    layout = layout_of("mixed")
    inputs = arguments(layout, dtype=torch.bfloat16)
    call = op(layout, backend)
    assert_same(outputs_and_gradients(call, inputs), outputs_and_gradients(call, inputs))
    check_checkpoints(call, inputs)


def test_compiled_packs_of_other_lengths_share_one_graph():
    layouts = [
        Layout.from_splits([[(n, "causal") for n in lengths]], streams=torch.arange(sum(lengths)) % 2)
        for lengths in ((3, 4), (9,), (2, 5, 6), (4, 4, 4, 4))
    ]
    cos, sin = rope_table(40, 8, 1e4)

    def call(qkv, q_und, q_gen, k_und, k_gen, layout):
        return qk_norm_rope(qkv, (q_und, q_gen), (k_und, k_gen), cos, sin, layout, num_heads=4, num_kv_heads=2)

    check_compiles_once(call, [[*arguments(layout), layout] for layout in layouts])


def test_compiled_cache_writes():
    """A compiled decoding step writes the same rows, and other lengths do not compile again."""
    packs = [
        ([[(5, "causal")]], [3], [8]),
        ([[(7, "causal")], [(6, "causal")]], [4, 4], [9, 9]),
        ([[(9, "causal")]], [2], [12]),
    ]
    cos, sin = rope_table(40, 8, 1e4)

    def call(layout, k, v, qkv, q_und, q_gen, k_und, k_gen):
        options = {"num_heads": 4, "num_kv_heads": 2, "cache": (k, v)}
        return qk_norm_rope(qkv, (q_und, q_gen), (k_und, k_gen), cos, sin, layout, **options)[0]

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for i, (samples, cached, capacity) in enumerate(packs):
        layout = Layout.from_splits(samples, cached=cached, capacity=capacity, streams=None)
        inputs = [x.detach() for x in arguments(layout)]
        results = []
        for function in (call, compiled):
            cache = [torch.full((sum(capacity), 2, 8), 7.0) for _ in range(2)]
            with torch._dynamo.config.patch(error_on_recompile=i >= 2):
                results.append((function(layout, *cache, *inputs), *cache))
        for eager, fast in zip(*results, strict=True):
            assert torch.equal(eager, fast)
    torch._dynamo.reset()


QKV = torch.zeros(11, 64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(11)}, r"qkv is .*of shape \[11\].*; it must be a floating-point tensor"),
        ({"qkv": QKV.long()}, "qkv is a torch.int64"),
        ({"qkv": torch.zeros(10, 64)}, "qkv is .*; it must be 11 rows long, one per query of the layout"),
        ({"qkv": torch.zeros(11, 60)}, "qkv is .*; it must be as wide as 8 heads"),
        ({"qkv": torch.zeros(11, 8)}, "qkv is .*; it must be as wide as 8 heads .* of an even head_dim"),
        ({"q_norms": (torch.ones(8), torch.ones(4))}, r"q_norms\[1\] is .*\[8\]"),
        ({"k_norms": (torch.ones(8, 1), torch.ones(8))}, r"k_norms\[0\] is .*\[8\]"),
        ({"cos": torch.ones(9, 8)}, r"cos is .*\[positions, 4\]"),
        ({"cos": torch.ones(2, 4), "sin": torch.ones(2, 4)}, "cos is .* the layout's positions reach"),
        ({"sin": torch.ones(9)}, r"sin is .*\[9, 4\]"),
        ({"sin": torch.ones(8, 4)}, r"sin is .*\[8, 4\].*; it must be .*\[9, 4\]"),
        ({"cos": torch.ones(9, 4, device="meta")}, "qk_norm_rope: its tensors are on"),
        ({"cache": (torch.zeros(11, 2, 8), torch.zeros(10, 2, 8))}, r"cache\[1\] is .*\[11, 2, 8\]"),
        ({"cache": (torch.zeros(11, 2, 8).half(), torch.zeros(11, 2, 8))}, r"cache\[0\] is .*torch.float32 tensor"),
        (
            {"cache": (torch.zeros(11, 2, 8, device="meta"), torch.zeros(11, 2, 8))},
            "qk_norm_rope: its tensors are on",
        ),
    ],
)
def test_bad_arguments(backend, change, message):
    ones = torch.ones(8)
    values = {"qkv": QKV, "q_norms": (ones, ones), "k_norms": (ones, ones)}
    values |= dict(zip(("cos", "sin"), rope_table(9, 8, 1e4), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**values, layout=layout_of("mixed"), num_heads=4, num_kv_heads=2, backend=backend)


def test_keys_without_queries_need_a_cache():
    layout = Layout.from_splits([[(5, "causal")]], cached=[2])
    with pytest.raises(
        ValueError, match=r"cache is None; it must be \(k, v\), since the layout has 5 keys for 3 queries"
    ):
        op(layout)(*arguments(layout))
