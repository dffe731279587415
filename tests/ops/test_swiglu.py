"""SwiGLU against plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_accurate
from op_checks import BACKENDS, check_checkpoints, check_compiles_once, check_writes_everything, randn

from unigendet.ops import swiglu
from unigendet.ops.backends import available

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CPP = [name for name in available()["swiglu"] if name == "cpp"]  # where it is built; it knows no float64
TESTED = [*BACKENDS, "triton", *CPP]
COMBINATIONS = [(b, d) for b in TESTED for d in DTYPES if b in BACKENDS or d != torch.float64]


def plain(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("backend", TESTED)
def test_operator_contract(backend):
    x = randn(3, 8)
    torch.library.opcheck(torch.ops.unigendet.swiglu.default, (x, backend))
    torch.library.opcheck(torch.ops.unigendet.swiglu_backward.default, (randn(3, 4, grad=False), x.detach(), backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    assert torch.autograd.gradcheck(lambda x: swiglu(x, backend=backend), randn(3, 8, dtype=torch.float64))


@pytest.mark.parametrize(("backend", "dtype"), COMBINATIONS)
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_accuracy(backend, dtype, rows):
    assert_accurate(lambda x: swiglu(x, backend=backend), plain, plain, [randn(rows, 64, dtype=dtype)])


@pytest.mark.parametrize("backend", TESTED)
def test_strided_input_and_unwritten_memory(backend, monkeypatch):
    for x in (randn(16, 5).detach().T.requires_grad_(), randn(5, 32).detach()[:, ::2].requires_grad_()):
        assert_accurate(lambda x: swiglu(x, backend=backend), plain, plain, [x])
        check_writes_everything(monkeypatch, lambda x: swiglu(x, backend=backend), [x])


def test_autocast_keeps_the_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        assert swiglu(randn(3, 8)).dtype == torch.float32
        assert swiglu(randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_checkpointing_and_compilation():
    check_checkpoints(swiglu, [randn(3, 8)])
    check_compiles_once(swiglu, [[randn(rows, 8)] for rows in (3, 5, 9, 4)])


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(3, 7), torch.zeros(3, 8, dtype=torch.int64), None])
def test_bad_inputs(bad):
    with pytest.raises(ValueError, match=r"gate_up is .*; it must be"):
        swiglu(bad)
