"""The Triton kernels of qk_norm_rope: accuracy over shapes, the derived distance from the torch backend, launches."""

import pytest
import torch
from numerics import assert_accurate, in_float64, outputs_and_gradients
from op_checks import assert_same, randn
from test_qk_norm_rope import arguments, op, plain

from unigendet.layout import Layout
from unigendet.ops import qk_norm_rope, rope_table

# More understanding rows than a backward program takes, and fewer generation rows.
STREAMS = {"one token": [1], "mixed": [0] * 11 + [1, 0] * 4 + [0] * 3, "understanding": [0] * 3, "generation": [1] * 3}
# Half heads of 1, 3, 36 and 64 columns; more heads than a tile has (20 + 20 and 40 + 1 heads of 128).
SHAPES = [(2, 1, 2), (3, 3, 6), (7, 1, 72), (28, 4, 128), (20, 20, 128), (40, 1, 128)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def layout_of(name, device="cpu"):
    streams = STREAMS[name]
    half = (len(streams) + 1) // 2
    splits = [[(half, "causal"), (len(streams) - half, "noise")]] if half < len(streams) else [[(half, "causal")]]
    return Layout.from_splits(splits, streams=streams).to(device)


def check_accuracy(layout, shape, dtype, **options):
    heads, head_dim = shape[:2], shape[2]
    inputs = arguments(layout, heads=heads, head_dim=head_dim, dtype=dtype)
    expected = plain(layout, heads, head_dim)
    assert_accurate(op(layout, "triton", heads=heads, head_dim=head_dim), expected, expected, inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy_over_shapes(shape, dtype):
    check_accuracy(layout_of("understanding"), shape, dtype, seeds=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("streams", STREAMS)
def test_accuracy_over_streams(streams, dtype):
    check_accuracy(layout_of(streams), (2, 1, 16), dtype, seeds=1)


def bounds(layout, inputs, incoming, heads, head_dim, eps=1e-6):
    """How far float32 arithmetic may be off, for every output and gradient: the lines of kernels/qk_norm_rope.py."""
    u, d, n = 2.0**-24, head_dim, int(layout.stream_lengths[0])
    qkv, *norms = (in_float64(x).detach() for x in inputs)
    x = qkv.unflatten(1, (-1, d))[:, : heads[0] + heads[1]]
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    weight = x.new_empty(x.shape)
    halves = (slice(0, n), slice(n, None))
    blocks = [(rows, part) for part in (slice(0, heads[0]), slice(heads[0], None)) for rows in halves]
    for block, w in zip(blocks, norms, strict=True):
        weight[block] = w
    tables = rope_table(layout.max_position + 1, d, 1e4)
    c, s = (torch.cat((t, t), -1)[layout.positions][layout.stream_to_sequence][:, None].double().abs() for t in tables)
    h = (x * rstd).abs()
    rotated = (weight * h).abs() * c + (weight * h).abs().roll(d // 2, -1) * s
    y = (d / 2 + 8) * u * rotated[layout.sequence_to_stream]
    dy = torch.cat(incoming[:2], 1).double().abs()[layout.stream_to_sequence]
    dn = dy * c + dy.roll(d // 2, -1) * s
    g = weight.abs() * dn
    mean = (g * h).mean(-1, keepdim=True)
    dx = rstd * ((d / 2 + 9) * g + (2.5 * d + 22) * h * mean) * u
    dqkv = torch.cat((dx, torch.zeros_like(x[:, : heads[1]])), 1).flatten(1)
    sums = [(dn * h)[block] for block in blocks]
    dws = [(d / 2 + 8 + t[..., 0].numel()) * u * t.sum((0, 1)) for t in sums]
    return [y[:, : heads[0]], y[:, heads[0] :], torch.zeros_like(y[:, heads[0] :]), dqkv, *dws]


def check_distance(ours, theirs, layout, inputs, heads, head_dim):
    """At most twice the bound of float32 arithmetic, and one spacing of the dtype."""
    generator = torch.Generator().manual_seed(0)
    outputs = [ours[f"output {i}"] for i in range(3)]
    incoming = [torch.randn(x.shape, generator=generator).bfloat16() for x in outputs]
    limits = bounds(layout, inputs, incoming, heads, head_dim)
    info = torch.finfo(outputs[0].dtype)
    for name, limit in zip(ours, limits, strict=True):
        have, want = (results[name].cpu().double() for results in (ours, theirs))
        spacing = info.eps * torch.maximum(have.abs(), want.abs()).clamp(min=info.smallest_normal)
        difference = (have - want).abs()
        assert (difference <= torch.where(limit > 0, 2 * limit + spacing, 0)).all(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 1, 16), (7, 1, 72)])
def test_distance_from_the_torch_backend(shape, dtype):
    layout, heads, head_dim = layout_of("mixed"), shape[:2], shape[2]
    inputs = arguments(layout, heads=heads, head_dim=head_dim, dtype=dtype)
    ours, theirs = (
        outputs_and_gradients(op(layout, backend, heads=heads, head_dim=head_dim), inputs)
        for backend in ("triton", "torch")
    )
    check_distance(ours, theirs, layout, inputs, heads, head_dim)


def test_gradients_of_any_strides():
    """Incoming gradients that are expanded or transposed."""
    layout = layout_of("generation")
    inputs = arguments(layout)

    def loss(backend, weigh):
        outputs = op(layout, backend)(*inputs)
        return torch.autograd.grad(sum(weigh(x) for x in outputs), inputs)

    weights = {h: randn(8, h, 3, grad=False) for h in (4, 2)}
    for weigh in (torch.sum, lambda x: (x.permute(2, 1, 0) * weights[x.shape[1]]).sum()):
        for have, want in zip(loss("triton", weigh), loss("reference", weigh), strict=True):
            torch.testing.assert_close(have, want)


def test_weights_and_tables_of_any_dtype_and_strides():
    layout = layout_of("generation")
    qkv, *weights = (x.detach() for x in arguments(layout))
    cos, sin = rope_table(3, 8, 1e4)
    wide = [torch.stack((w, w), 1)[:, 0].to(d) for w, d in zip(weights, (torch.float64, *DTYPES), strict=True)]
    tables = [t.double().T.contiguous().T for t in (cos, sin)]

    def call(backend):
        norms = (tuple(wide[:2]), tuple(wide[2:]))
        return qk_norm_rope(qkv, *norms, *tables, layout, num_heads=4, num_kv_heads=2, backend=backend)

    for have, want in zip(call("triton"), call("reference"), strict=True):
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("spread", ["rows", "numbers"])
def test_a_cache_may_have_any_strides(spread):
    layout = Layout.from_splits([[(3, "causal")]], cached=[2], capacity=[7])
    inputs = [x.detach() for x in arguments(layout)]
    contiguous, strided = ([torch.full((7, 2, 8), 5.0) for _ in range(2)] for _ in range(2))
    axis = 1 if spread == "rows" else 3
    strided = [torch.stack((x, x), axis).select(axis, 1) for x in strided]
    assert strided[0].stride(-1) == (1 if spread == "rows" else 2)
    q = op(layout, "triton", cache=tuple(contiguous))(*inputs)[0]
    assert torch.equal(q, op(layout, "triton", cache=tuple(strided))(*inputs)[0])
    for x, y in zip(contiguous, strided, strict=True):
        assert torch.equal(x, y)


def test_float64_and_devices_without_kernels_are_refused():
    layout = layout_of("one token")
    with pytest.raises(ValueError, match="backend='triton' cannot run qk_norm_rope: the dtype is"):
        op(layout, "triton")(*arguments(layout, dtype=torch.float64))


def test_launch_options():
    """The options depend on the shape and the capability alone; sums do not depend on the capability."""
    from unigendet.kernels.qk_norm_rope import Config, configure

    assert configure((9, 0), (28, 4), 128, "forward") == Config(tile_heads=32, rows=1, num_warps=4, num_stages=1)
    assert configure((9, 0), (28, 4), 128, "backward") == Config(tile_heads=32, rows=16, num_warps=8, num_stages=3)
    for heads, head_dim in (((28, 4), 128), ((2, 1), 16), ((7, 1), 72), ((64, 64), 256)):
        ampere, hopper = (configure(c, heads, head_dim, "backward") for c in ((8, 0), (9, 0)))
        assert (ampere.tile_heads, ampere.rows) == (hopper.tile_heads, hopper.rows)
        assert ampere.tile_heads * head_dim <= 4096
        assert 1 <= ampere.num_warps <= 8


def test_no_launch_argument_that_is_specialised_depends_on_the_pack():
    """Packs of other lengths share their compiled kernels: Triton compiles again for 1 and for multiples of 16."""
    from unigendet.kernels.qk_norm_rope import configure
    from unigendet.kernels.qk_norm_rope_backward import backward, backward_programs
    from unigendet.kernels.qk_norm_rope_forward import forward

    def integers(rows, understanding):
        qkv, norm, table = torch.empty(rows, 8 * 16), torch.empty(16), torch.empty(rows, 8)
        index = torch.empty(rows, dtype=torch.int64)
        q, k = torch.empty(rows, 4, 16), torch.empty(rows, 2, 16)
        shared = (qkv, [norm] * 4, table, table, index, index)
        options = {d: configure((9, 0), (4, 2), 16, d) for d in ("forward", "backward")}
        programs = backward_programs(options["backward"], rows, understanding, (4, 2))[1]
        partials = torch.empty(programs, 2, 16)
        launches = (
            *forward(options["forward"], *shared, index, (q, k, k), understanding, (4, 2), 1e-6),
            *backward(options["backward"], (q, k, k), *shared, qkv, [norm] * 4, partials, understanding, (4, 2), 1e-6),
        )
        varying = {"understanding", "total"}
        return [
            {k: v for k, v in launch.arguments.items() if isinstance(v, int) and k not in varying}
            for launch in launches
        ]

    assert integers(64, 16) == integers(7, 1) == integers(33, 0)


def on_device(layout, inputs, heads, head_dim, backend, cache=None):
    cos, sin = (t.cuda() for t in rope_table(layout.max_position + 1, head_dim, 1e4))

    def call(qkv, q_und, q_gen, k_und, k_gen):
        options = {"num_heads": heads[0], "num_kv_heads": heads[1], "cache": cache, "backend": backend}
        return qk_norm_rope(qkv, (q_und, q_gen), (k_und, k_gen), cos, sin, layout, **options)

    return call, [x.detach().cuda().requires_grad_() for x in inputs]


def large_layout(rows):
    splits = [[(rows // 2, "causal"), (rows - rows // 2, "noise")]]
    return Layout.from_splits(splits, streams=torch.arange(rows) % 3 // 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(28, 4, 128), (7, 1, 72), (20, 20, 128)])
def test_large_packs_on_a_device(shape, dtype):
    """Close to the torch backend by the derived bound, and the same to the last bit in a second run."""
    layout, heads, head_dim = large_layout(4099), shape[:2], shape[2]
    inputs = arguments(layout, heads=heads, head_dim=head_dim, dtype=dtype)
    results = []
    for backend in ("triton", "triton", "torch"):
        call, leaves = on_device(layout.to("cuda"), inputs, heads, head_dim, backend)
        results.append(outputs_and_gradients(call, leaves))
    ours, again, theirs = results
    assert_same(ours, again)
    check_distance(ours, theirs, layout, inputs, heads, head_dim)


@pytest.mark.gpu
def test_cached_rows_on_a_device():
    """The kernel writes the same numbers into a cache's rows as into new tensors, and touches no other row."""
    splits = [[(3000, "causal"), (1024, "noise")], [(47, "causal")]]
    layout = Layout.from_splits(splits, cached=[3000, 40], capacity=[4500, 100]).to("cuda")
    inputs = arguments(layout, heads=(28, 4), head_dim=128, dtype=torch.bfloat16)
    cache = tuple(
        torch.full((layout.num_keys, 4, 128), float("nan"), dtype=torch.bfloat16, device="cuda") for _ in range(2)
    )
    rows = layout.num_queries
    alone = Layout.from_splits([[(rows, "causal")]], positions=layout.positions.cpu(), streams=None).to("cuda")
    with torch.no_grad():
        call, leaves = on_device(layout, inputs, (28, 4), 128, "triton", cache)
        q = call(*leaves)[0]
        call, leaves = on_device(alone, inputs, (28, 4), 128, "triton")
        expected = call(*leaves)
    assert torch.equal(q, expected[0])
    for have, want in zip(cache, expected[1:], strict=True):
        assert torch.equal(have[layout.key_rows], want)
        assert have.isnan().all(-1).sum() == (layout.num_keys - rows) * 4


@pytest.mark.gpu
def test_packs_of_other_lengths_share_their_kernels_on_a_device(monkeypatch):
    import triton

    compiled = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **details: compiled.append(details["fn"].name)
    )
    counts = []
    for rows in (64, 17, 4096, 333):
        layout = large_layout(rows)
        call, leaves = on_device(layout.to("cuda"), arguments(layout, head_dim=48), (4, 2), 48, "triton")
        outputs_and_gradients(call, leaves)
        counts.append(len(compiled))
    assert counts == [3] * 4
