"""The two-stream linear layer against plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
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
from torch.utils._python_dispatch import TorchDispatchMode

from unigendet.layout import Layout
from unigendet.ops import stream_linear

SPLITS = [(3, 4), (0, 5), (5, 0), (1, 1), (0, 0)]


def arguments(rows, *, bias=True, dtype=torch.float32, inputs=6, outputs=5):
    """x, the two weights, and the two biases or nothing."""
    weights = [randn(outputs, inputs, dtype=dtype, seed=i) for i in range(2)]
    biases = [randn(outputs, dtype=dtype, seed=i) for i in range(2)] if bias else []
    return [randn(rows, inputs, dtype=dtype), *weights, *biases]


def op(layout, backend="auto"):
    def call(x, weight_und, weight_gen, *biases):
        return stream_linear(x, (weight_und, weight_gen), layout, biases=biases or None, backend=backend)

    return call


def plain(n):
    def call(x, weight_und, weight_gen, bias_und=None, bias_gen=None):
        return torch.cat((F.linear(x[:n], weight_und, bias_und), F.linear(x[n:], weight_gen, bias_gen)))

    return call


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
def test_operator_contract(backend, bias):
    lengths = torch.tensor([3, 4])
    x, weight_und, weight_gen, *biases = arguments(7, bias=bias)
    biases = biases or [None, None]
    torch.library.opcheck(
        torch.ops.unigendet.stream_linear.default, (x, weight_und, weight_gen, *biases, lengths, backend)
    )
    saved = [t.detach() for t in (x, weight_und, weight_gen)]
    for mask in ([True] * 5, [False, True, False, False, True], [True, False, False, False, False]):
        sources = [saved[0] if any(mask[1:3]) else None, *(saved[1:] if mask[0] else [None, None])]
        torch.library.opcheck(
            torch.ops.unigendet.stream_linear_backward.default,
            (randn(7, 5, grad=False), *sources, lengths, mask, backend),
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(2, 3), (0, 2), (3, 0)])
def test_gradients(backend, lengths):
    inputs = arguments(sum(lengths), dtype=torch.float64, inputs=3, outputs=2)
    assert torch.autograd.gradcheck(op(streams(*lengths), backend), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", SPLITS)
def test_accuracy(backend, dtype, lengths):
    n, rows = lengths[0], sum(lengths)
    for bias in (True, False):
        inputs = arguments(rows, bias=bias, dtype=dtype, inputs=33)
        assert_accurate(op(streams(*lengths), backend), plain(n), plain(n), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_bias(backend):
    layout = streams(3, 4)
    x, weight_und, weight_gen, bias, _ = arguments(7)
    assert_accurate(
        lambda x, u, g, b: stream_linear(x, (u, g), layout, biases=(b, None), backend=backend),
        plain(3),
        plain(3),
        [x, weight_und, weight_gen, bias],
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", SPLITS)
def test_strided_input_and_unwritten_memory(backend, lengths, monkeypatch):
    rows = sum(lengths)
    _, *rest = arguments(rows)
    strided = [randn(6, rows).detach().T, randn(rows, 12).detach()[:, ::2], randn(1, 6).detach().expand(rows, 6)]
    for x in strided:
        inputs = [x.requires_grad_(), *rest]
        assert_accurate(op(streams(*lengths), backend), plain(lengths[0]), plain(lengths[0]), inputs)
        check_writes_everything(monkeypatch, op(streams(*lengths), backend), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", range(1, 8))
def test_frozen_tensors_cost_nothing(backend, trained):
    """For every choice of trained tensors: gradients for exactly them, and nothing saved for the others."""
    inputs = [x.requires_grad_(bool(trained >> i & 1)) for i, x in enumerate(arguments(7, bias=False))]
    needs = [x.requires_grad for x in inputs]
    assert_accurate(op(streams(3, 4), backend), plain(3), plain(3), inputs)

    saved, results = [], []
    backward = torch.ops.unigendet.stream_linear_backward.default
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = op(streams(3, 4), backend)(*inputs)
    pointers = {t.data_ptr() for t in saved}
    assert (inputs[0].data_ptr() in pointers) == any(needs[1:])
    assert (inputs[1].data_ptr() in pointers) == (inputs[2].data_ptr() in pointers) == needs[0]

    with Recorder(backward, results):
        y.sum().backward()
    assert [r.numel() > 0 for r in results[0]] == [*needs, False, False]


class Recorder(TorchDispatchMode):
    """Keep what an operator returns."""

    def __init__(self, operator, results):
        super().__init__()
        self.operator, self.results = operator, results

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is self.operator:
            self.results.append(result)
        return result


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_to_bfloat16_and_gradients_stay_float32(backend):
    inputs = arguments(7)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = outputs_and_gradients(op(streams(3, 4), backend), inputs)
    low = [x.detach().bfloat16().requires_grad_() for x in inputs]
    explicit = outputs_and_gradients(op(streams(3, 4), backend), low)
    assert autocast["output 0"].dtype == torch.bfloat16
    assert autocast["gradient of input 1"].dtype == torch.float32
    assert_same({name: value.bfloat16() for name, value in autocast.items()}, explicit)
    with torch.autocast("cpu", torch.bfloat16):
        assert op(streams(3, 4), backend)(*arguments(7, dtype=torch.float64)).dtype == torch.float64


def test_shapes_are_known_without_data():
    inputs = [x.detach().to("meta") for x in arguments(7)]
    assert op(streams(3, 4))(*inputs).shape == (7, 5)


def test_operators_ignore_autocast():
    """Inside the operator a matmul must keep the precision of the contract."""
    inputs = arguments(7)
    call = torch.ops.unigendet.stream_linear.default
    expected = call(*inputs, torch.tensor([3, 4]), "reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(*inputs, torch.tensor([3, 4]), "reference"), expected)


def test_checkpointing_and_compilation():
    check_checkpoints(op(streams(3, 4)), arguments(7))
    layouts = [Layout.from_splits([[(a, "causal"), (b, "noise")]]) for a, b in ((3, 4), (5, 8), (2, 9), (6, 2))]

    def call(x, weight_und, weight_gen, layout):
        with torch.autocast("cpu", torch.bfloat16):
            return stream_linear(x, (weight_und, weight_gen), layout)

    packs = [[*arguments(layout.num_queries, bias=False), layout] for layout in layouts]
    check_compiles_once(call, packs)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(7), r"x is a torch.float32 tensor of shape \[7\] on cpu; it must be .*\[T, in\]"),
        (0, torch.zeros(7, 6, dtype=torch.int32), "x is a torch.int32"),
        (0, None, "x is None"),
        (1, torch.zeros(5, 7), r"weights\[0\] is .*\[out, 6\]"),
        (1, torch.zeros(5, 6, dtype=torch.float64), r"weights\[0\] is .*a torch.float32 tensor"),
        (2, torch.zeros(4, 6), r"weights\[1\] is .*\[5, 6\]"),
        (3, torch.zeros(6), r"biases\[0\] is .*\[5\]"),
        (4, torch.zeros(5, dtype=torch.bfloat16), r"biases\[1\] is .*bfloat16"),
        (1, torch.zeros(5, 6, device="meta"), "stream_linear: its tensors are on cpu, meta"),
        (0, torch.zeros(8, 6), r"x has 8 rows; .*3 \(understanding\) \+ 4 \(generation\)"),
    ],
)
def test_bad_inputs(index, value, message):
    inputs = arguments(7)
    inputs[index] = value
    with pytest.raises(ValueError, match=message):
        op(streams(3, 4))(*inputs)


@pytest.mark.parametrize(
    "lengths", [torch.tensor([3, 4, 0]), torch.tensor([3.0, 4.0]), torch.zeros(2, device="meta").long(), [3, 4]]
)
def test_bad_stream_lengths(lengths):
    layout = streams(3, 4)
    layout.stream_lengths = lengths
    with pytest.raises(
        ValueError, match=r"layout.stream_lengths is .*; it must be an int64 tensor of shape \[2\] on the CPU"
    ):
        op(layout)(*arguments(7))
