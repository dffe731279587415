"""The Triton kernels of swiglu: accuracy over widths, strides, launches."""

import pytest
import torch
from numerics import assert_accurate, outputs_and_gradients
from op_checks import assert_same, check_writes_everything, randn
from test_swiglu import plain

from unigendet.ops import swiglu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def op(gate_up, backend="triton"):
    return swiglu(gate_up, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 8, 72, 100, 1032])
def test_accuracy_over_widths(width, dtype):
    """9 rows: several programs from 300 columns on."""
    assert_accurate(op, plain, plain, [randn(9, 2 * width, dtype=dtype)], seeds=1)


def test_accuracy_of_wide_rows_and_of_many_rows():
    assert_accurate(op, plain, plain, [randn(2, 2 * 8200)], seeds=1)
    assert_accurate(op, plain, plain, [randn(3000, 2)], seeds=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_gates(dtype):
    """Where exp(−g) is infinite or 0 in the dtype."""
    gate = torch.tensor([[-200.0, -95.0, -30.0, 0.0, 30.0, 95.0, 200.0]])
    inputs = [torch.cat((gate, torch.full_like(gate, 2.0)), 1).to(dtype).requires_grad_()]
    assert_accurate(op, plain, plain, inputs)


@pytest.mark.parametrize("rows", [0, 1, 33])
def test_nothing_is_left_unwritten(rows, monkeypatch):
    check_writes_everything(monkeypatch, op, [randn(rows, 200)])


def test_inputs_and_gradients_of_any_strides():
    """Rows of a wider matrix, transposed and expanded ones; incoming gradients that are expanded or transposed."""
    x, weight = randn(7, 24, grad=False), randn(12, 7, grad=False)
    for rows in (torch.cat((x, x), 1)[:, 24:], x.T.contiguous().T, x[:1].expand(7, 24)):
        for weigh in (torch.sum, lambda y: y[:, 0].sum(), lambda y: (y.T * weight).sum()):
            gradients = []
            for backend in ("triton", "reference"):
                leaf = rows.detach().requires_grad_()
                gradients += torch.autograd.grad(weigh(op(leaf, backend)), leaf)
            torch.testing.assert_close(*gradients)


def test_float64_is_refused():
    with pytest.raises(ValueError, match=r"backend='triton' cannot run swiglu: the dtype is torch\.float64"):
        op(randn(2, 4, dtype=torch.float64))


def test_no_launch_argument_that_is_specialised_depends_on_the_pack():
    """Packs of other lengths share their compiled kernels: Triton compiles again for 1 and for multiples of 16."""
    from unigendet.kernels.swiglu import backward, forward

    def integers(rows):
        gate_up, y = torch.empty(rows, 48), torch.empty(rows, 24)
        launches = (*forward(gate_up, y), *backward(y, gate_up, gate_up))
        return [
            {k: v for k, v in launch.arguments.items() if isinstance(v, int) and k != "total"} for launch in launches
        ]

    assert integers(64) == integers(7) == integers(1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(2051, 18944), (4099, 4304), (70001, 3)])
def test_large_packs_on_a_device(rows, width, dtype):
    """As accurate as the torch backend, and the same to the last bit in a second run."""
    leaf = randn(rows, 2 * width, dtype=dtype).detach().cuda().requires_grad_()
    assert_same(outputs_and_gradients(op, [leaf]), outputs_and_gradients(op, [leaf]))
    assert_accurate(op, lambda x: op(x, "torch"), plain, [leaf], seeds=1)
