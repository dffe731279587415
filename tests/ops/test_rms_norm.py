"""Residual add and RMSNorm against the Qwen2 decoder's own steps in plain PyTorch."""

import pytest
import torch
from numerics import assert_accurate, outputs_and_gradients
from op_checks import (
    BACKENDS,
    assert_same,
    check_checkpoints,
    check_compiles_once,
    check_writes_everything,
    randn,
    streams,
)

from unigendet.layout import Layout
from unigendet.ops import rms_norm
from unigendet.ops.backends import available

CPP = [name for name in available()["rms_norm"] if name == "cpp"]  # where it is built; it knows no float64
TESTED = [*BACKENDS, "triton", *CPP]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COMBINATIONS = [(b, d) for b in TESTED for d in DTYPES if b in BACKENDS or d != torch.float64]
SPLITS = [(3, 4), (0, 5), (5, 0), (1, 0), (0, 0)]


def arguments(rows, *, residual=True, dtype=torch.float32, weight_dtype=None, columns=6):
    """x, the two weights, and the residual or nothing."""
    weights = [randn(columns, dtype=weight_dtype or dtype, seed=i) for i in range(2)]
    return [
        randn(rows, columns, dtype=dtype),
        *weights,
        *([randn(rows, columns, dtype=dtype, seed=9)] if residual else []),
    ]


def op(layout, backend="auto", eps=1e-6):
    def call(x, weight_und, weight_gen, residual=None):
        return rms_norm(x, (weight_und, weight_gen), layout, residual=residual, eps=eps, backend=backend)

    return call


def plain(n, eps=1e-6):
    def call(x, weight_und, weight_gen, residual=None):
        summed = x if residual is None else x + residual
        wide = summed if x.dtype == torch.float64 else summed.float()
        h = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
        normed = torch.cat((weight_und.to(x.dtype) * h[:n], weight_gen.to(x.dtype) * h[n:]))
        return normed if residual is None else (normed, summed)

    return call


@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize("residual", [True, False])
def test_operator_contract(backend, residual):
    lengths = torch.tensor([3, 4])
    x, weight_und, weight_gen, *rest = arguments(7, residual=residual)
    other = rest[0] if residual else None
    torch.library.opcheck(
        torch.ops.unigendet.rms_norm.default, (x, other, weight_und, weight_gen, lengths, 1e-6, backend)
    )
    x, weight_und, weight_gen = (t.detach() for t in (x, weight_und, weight_gen))
    dy, rstd = randn(7, 6, grad=False, seed=1), torch.rsqrt(x.square().mean(1))
    for mask in ([True, True, True], [True, False, True], [False, True, False]):
        torch.library.opcheck(
            torch.ops.unigendet.rms_norm_backward.default,
            (dy, dy.clone() if residual else None, x, rstd, weight_und, weight_gen, lengths, mask, backend),
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(2, 3), (0, 2), (3, 0)])
@pytest.mark.parametrize("residual", [True, False])
def test_gradients(backend, lengths, residual):
    inputs = arguments(sum(lengths), residual=residual, dtype=torch.float64, columns=4)
    assert torch.autograd.gradcheck(op(streams(*lengths), backend), inputs)


@pytest.mark.parametrize(("backend", "dtype"), COMBINATIONS)
@pytest.mark.parametrize("lengths", SPLITS)
def test_accuracy(backend, dtype, lengths):
    for residual in (True, False):
        inputs = arguments(sum(lengths), residual=residual, dtype=dtype, columns=65)
        assert_accurate(op(streams(*lengths), backend), plain(lengths[0]), plain(lengths[0]), inputs)


@pytest.mark.parametrize("backend", TESTED)
def test_bfloat16_casts_are_those_of_the_decoder(backend):
    """Statistics in float32, h rounded, then the weight: the plain steps to the last bit, but for rstd's last bit."""
    x, weight_und, weight_gen, residual = (t.detach() for t in arguments(7, dtype=torch.bfloat16, columns=64))
    for left, right in zip(
        op(streams(3, 4), backend)(x, weight_und, weight_gen, residual),
        plain(3)(x, weight_und, weight_gen, residual),
        strict=True,
    ):
        assert (left != right).float().mean() < 0.01


@pytest.mark.parametrize("backend", TESTED)
def test_float32_weights_with_bfloat16_rows(backend):
    inputs = arguments(7, dtype=torch.bfloat16, weight_dtype=torch.float32)
    assert_accurate(op(streams(3, 4), backend), plain(3), plain(3), inputs)


@pytest.mark.parametrize("backend", TESTED)
def test_residual_of_another_dtype_is_added_in_the_wider_one(backend):
    x, weight_und, weight_gen = arguments(7, residual=False, dtype=torch.bfloat16)
    results = outputs_and_gradients(op(streams(3, 4), backend), [x, weight_und, weight_gen, randn(7, 6, seed=9)])
    assert results["output 0"].dtype == results["output 1"].dtype == torch.float32
    assert results["gradient of input 0"].dtype == torch.bfloat16
    assert results["gradient of input 3"].dtype == torch.float32
    torch.testing.assert_close(
        results["gradient of input 0"], results["gradient of input 3"].bfloat16(), rtol=0, atol=0
    )


@pytest.mark.parametrize("backend", TESTED)
def test_rows_of_zeros(backend):
    """A row of zeros has the finite scale 1/sqrt(eps)."""
    inputs = [torch.zeros(2, 4, requires_grad=True), *arguments(2, residual=False, columns=4)[1:]]
    results = outputs_and_gradients(op(streams(1, 1), backend, eps=1e-4), inputs)
    assert torch.equal(results["output 0"], torch.zeros(2, 4))
    incoming = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    weights = torch.stack([w.detach() for w in inputs[1:]])
    torch.testing.assert_close(results["gradient of input 0"], 100 * incoming * weights)


@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone(backend, used):
    """The gradient of an output that nobody uses counts as zero."""
    inputs = arguments(7)
    result = outputs_and_gradients(lambda *args: op(streams(3, 4), backend)(*args)[used], inputs)
    expected = outputs_and_gradients(lambda *args: plain(3)(*args)[used], inputs)
    for name, value in expected.items():
        if value is None:
            assert result[name] is None
        else:
            torch.testing.assert_close(result[name], value)


@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize("trained", range(1, 16))
def test_frozen_tensors_get_no_gradient(backend, trained):
    inputs = [x.requires_grad_(bool(trained >> i & 1)) for i, x in enumerate(arguments(7))]
    assert_accurate(
        lambda *args: op(streams(3, 4), backend)(*args)[0],
        lambda *args: plain(3)(*args)[0],
        lambda *args: plain(3)(*args)[0],
        inputs,
    )


@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize("lengths", SPLITS)
def test_strided_input_and_unwritten_memory(backend, lengths, monkeypatch):
    rows = sum(lengths)
    _, *rest = arguments(rows)
    for x in (randn(6, rows).detach().T, randn(rows, 12).detach()[:, ::2]):
        inputs = [x.requires_grad_(), *rest]
        assert_accurate(op(streams(*lengths), backend), plain(lengths[0]), plain(lengths[0]), inputs)
        check_writes_everything(monkeypatch, op(streams(*lengths), backend), inputs)


def test_autocast_keeps_the_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        inputs = arguments(7, dtype=dtype)
        expected = outputs_and_gradients(op(streams(3, 4)), inputs)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(outputs_and_gradients(op(streams(3, 4)), inputs), expected)


def test_checkpointing_and_compilation():
    check_checkpoints(op(streams(3, 4)), arguments(7))
    layouts = [Layout.from_splits([[(a, "causal"), (b, "noise")]]) for a, b in ((3, 4), (5, 8), (2, 9), (6, 2))]

    def call(x, weight_und, weight_gen, residual, layout):
        normed, summed = op(layout)(x, weight_und, weight_gen, residual)
        return normed, summed, op(layout)(summed, weight_und, weight_gen)

    check_compiles_once(call, [[*arguments(layout.num_queries), layout] for layout in layouts])


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(7), r"x is .*\[T, D\]"),
        (0, torch.zeros(7, 6).long(), "x is a torch.int64"),
        (0, torch.zeros(7, 0), r"x is .*\[7, 0\].* with at least 1 column"),
        (1, torch.zeros(7), r"weights\[0\] is .*\[6\]"),
        (2, torch.zeros(6, 1), r"weights\[1\] is .*\[6\]"),
        (3, torch.zeros(6, 6), r"residual is .*\[7, 6\]"),
        (3, torch.zeros(7, 6, device="meta"), "rms_norm: its tensors are on cpu, meta, cpu, cpu"),
    ],
)
def test_bad_inputs(index, value, message):
    inputs = arguments(7)
    inputs[index] = value
    with pytest.raises(ValueError, match=message):
        op(streams(3, 4))(*inputs)


@pytest.mark.parametrize("lengths", [(3, 3), (8, -1)])
def test_stream_lengths_must_add_up(lengths):
    with pytest.raises(ValueError, match=r"x has 7 rows; it must have as many as layout.stream_lengths says"):
        op(streams(*lengths))(*arguments(7))
