"""The Triton kernels of rms_norm: accuracy over widths and streams, strides, masks, launches."""

import pytest
import torch
from numerics import assert_accurate, outputs_and_gradients
from op_checks import assert_same, check_writes_everything, randn, streams
from test_rms_norm import arguments, op, plain

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = [1, 3, 8, 72, 100, 1032]


def check_accuracy(lengths, columns, dtype, residual=True, **options):
    inputs = arguments(sum(lengths), residual=residual, dtype=dtype, columns=columns, **options)
    expected = plain(lengths[0])
    assert_accurate(op(streams(*lengths), "triton"), expected, expected, inputs, seeds=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("residual", [True, False])
def test_accuracy_over_widths(columns, dtype, residual):
    check_accuracy((3, 6), columns, dtype, residual)


@pytest.mark.parametrize(("columns", "dtype"), [(8192, torch.float32), (8200, torch.float16)])
def test_accuracy_of_wide_rows(columns, dtype):
    check_accuracy((2, 1), columns, dtype)


@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [((39, 17), torch.bfloat16), ((17, 0), torch.float16), ((0, 33), torch.float32), ((1, 16), torch.float32)],
)
def test_accuracy_over_several_programs_of_a_stream(lengths, dtype):
    check_accuracy(lengths, 264, dtype)


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.bfloat16, torch.float16)])
def test_weights_of_any_dtype(dtypes):
    """Gradients have the dtypes of their weights."""
    x, *weights, residual = arguments(5, dtype=torch.bfloat16, columns=24)
    weights = [w.detach().to(d).requires_grad_() for w, d in zip(weights, dtypes, strict=True)]
    assert_accurate(op(streams(2, 3), "triton"), plain(2), plain(2), [x, *weights, residual])


@pytest.mark.parametrize("trained", range(1, 16))
def test_every_mask_of_gradients(trained):
    """Two chunks of each stream; a frozen stream's rows need not be read where nothing comes of them."""
    inputs = [t.requires_grad_(bool(trained >> i & 1)) for i, t in enumerate(arguments(60, columns=264))]
    ours, theirs = (outputs_and_gradients(op(streams(33, 27), name), inputs) for name in ("triton", "reference"))
    assert ours.keys() == theirs.keys()
    for name, have in ours.items():
        torch.testing.assert_close(have, theirs[name])


@pytest.mark.parametrize("lengths", [(17, 3), (0, 2), (0, 0)])
def test_nothing_is_left_unwritten(lengths, monkeypatch):
    for trained in (15, 5, 2):
        inputs = [t.requires_grad_(bool(trained >> i & 1)) for i, t in enumerate(arguments(sum(lengths), columns=264))]
        check_writes_everything(monkeypatch, op(streams(*lengths), "triton"), inputs)


def test_inputs_and_gradients_of_any_strides():
    """Rows of a wider matrix, transposed and expanded ones; incoming gradients that are expanded or transposed."""
    x, weight_und, weight_gen, residual = (t.detach() for t in arguments(7, columns=24))
    column = torch.stack((weight_und, weight_gen), 1)
    weights = (column[:, 0], column[:, 1])
    weight = randn(24, 7, grad=False)
    for rows in (torch.cat((x, x), 1)[:, 24:], x.T.contiguous().T, x[:1].expand(7, 24)):
        for weigh in (torch.sum, lambda y: y[:, 0].sum(), lambda y: (y.T * weight).sum()):
            results = []
            for backend in ("triton", "reference"):
                leaves = [t.detach().requires_grad_() for t in (rows, *weights, residual.expand(7, 24))]
                outputs = op(streams(3, 4), backend)(*leaves)
                results.append(torch.autograd.grad(sum(weigh(y) for y in outputs), leaves))
            for have, want in zip(*results, strict=True):
                torch.testing.assert_close(have, want)


def test_what_the_kernels_cannot_run_is_refused():
    for inputs, message in (
        (arguments(2, dtype=torch.float64), "the dtype is torch.float64"),
        (arguments(2, columns=16385), "rows are 16385 numbers wide; they must be at most 16384"),
    ):
        with pytest.raises(ValueError, match=f"backend='triton' cannot run rms_norm: {message}"):
            op(streams(1, 1), "triton")(*inputs)


def launches(rows, understanding, columns=24):
    from unigendet.kernels import rms_norm as kernels

    x, weight, rstd = torch.empty(rows, columns), torch.empty(columns), torch.empty(rows)
    partials = torch.empty(kernels.backward_programs(rows, understanding, columns)[-1], columns)
    weights = [weight] * 2
    return (
        *kernels.forward(x, x, weights, x, rstd, x, understanding, 1e-6),
        *kernels.backward(x, x, x, rstd, weights, x, weights, partials, understanding),
    )


def test_no_launch_argument_that_is_specialised_depends_on_the_pack():
    """Packs of other lengths share their compiled kernels: Triton compiles again for 1 and for multiples of 16."""

    def integers(rows, understanding):
        varying = {"understanding", "total", "chunk"}
        return [
            {k: v for k, v in launch.arguments.items() if isinstance(v, int) and k not in varying}
            for launch in launches(rows, understanding)
        ]

    assert integers(64, 16) == integers(7, 1) == integers(33, 0) == integers(60000, 1)


@pytest.mark.parametrize(("rows", "chunk"), [(1, 16), (16384, 16), (32768, 32), (60000, 58), (200000, 64)])
def test_programs_of_the_backward_pass(rows, chunk):
    from unigendet.kernels.rms_norm import backward_programs

    first = -(-(rows // 3) // chunk)
    assert backward_programs(rows, rows // 3, 3584) == (chunk, first, first - (-(rows - rows // 3) // chunk))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "lengths"), [(3584, (2050, 1049)), (16384, (33, 70)), (72, (5000, 1))])
def test_large_packs_on_a_device(columns, lengths, dtype):
    """As accurate as the torch backend, and the same to the last bit in a second run."""
    leaves = [t.detach().cuda().requires_grad_() for t in arguments(sum(lengths), dtype=dtype, columns=columns)]
    ours, theirs = (op(streams(*lengths), backend) for backend in ("triton", "torch"))
    assert_same(outputs_and_gradients(ours, leaves), outputs_and_gradients(ours, leaves))
    assert_accurate(ours, theirs, plain(lengths[0]), leaves, seeds=1)


@pytest.mark.gpu
def test_packs_of_other_lengths_share_their_kernels_on_a_device(monkeypatch):
    import triton

    compiled = []
    hook = lambda **details: compiled.append(details["fn"].name)  # noqa: E731
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", hook)
    counts = []
    for lengths in ((33, 31), (16, 1), (4000, 96), (0, 333)):
        leaves = [t.detach().cuda().requires_grad_() for t in arguments(sum(lengths), columns=40)]
        outputs_and_gradients(op(streams(*lengths), "triton"), leaves)
        counts.append(len(compiled))
    assert counts == [3] * 4
