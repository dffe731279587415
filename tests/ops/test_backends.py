"""The names of implementations and the errors about them."""

import pytest
import torch
from op_checks import BACKENDS, randn

from unigendet.ops import backends, swiglu
from unigendet.ops.backends import BACKENDS as NAMES
from unigendet.ops.backends import resolve


def test_auto_is_torch_and_names_are_kept():
    assert resolve("swiglu", "auto", randn(2, 4)) == "torch"
    assert [resolve("swiglu", name) for name in BACKENDS] == list(BACKENDS)


def test_an_unknown_backend_lists_the_names():
    with pytest.raises(ValueError, match="backend is 'cudnn'") as error:
        swiglu(randn(2, 4), backend="cudnn")
    assert all(repr(name) in str(error.value) for name in ("auto", *NAMES))


@pytest.mark.parametrize("backend", ["triton", "cuda", "flash"])
def test_a_backend_that_is_not_built_says_so(backend):
    with pytest.raises(ValueError, match=f"backend='{backend}' cannot run stream_linear: no such kernel is built"):
        resolve("stream_linear", backend, randn(2, 4))


@pytest.mark.parametrize(
    ("op", "tensors", "fits"),
    [
        ("rms_norm", (randn(1, 16384), None, randn(16384, dtype=torch.float64)), True),
        ("rms_norm", (randn(1, 16385),), False),
        ("rms_norm", (randn(1, 8, dtype=torch.float64),), False),
        ("swiglu", (randn(1, 32772),), True),
        ("flow_matching", (randn(16384), randn(1, 16384), randn(1)), True),
        ("flow_matching", (randn(16385), randn(1, 16385), randn(1)), False),
        ("flow_matching", (randn(8), randn(1, 8), randn(1, dtype=torch.float64)), False),
        ("flow_matching_loss", (randn(1, 16384, dtype=torch.bfloat16), randn(1, 16384)), True),
        ("flow_matching_loss", (randn(1, 8), randn(1, 8, dtype=torch.float64)), False),
        ("flow_matching_loss", (randn(1, 16385), randn(1, 16385)), False),
    ],
)
def test_auto_takes_torch_where_triton_would_raise(op, tensors, fits, monkeypatch):
    monkeypatch.setattr(backends, "_compiles_triton", lambda _: True)
    assert resolve(op, "auto", *tensors) == ("triton" if fits else "torch")
    if not fits:
        with pytest.raises(ValueError, match=f"backend='triton' cannot run {op}: "):
            resolve(op, "triton", *tensors)


def test_tensors_must_share_a_device():
    with pytest.raises(ValueError, match="rms_norm: its tensors are on cpu, meta; they must be on one device"):
        resolve("rms_norm", "auto", randn(2, 4), None, torch.empty(4, device="meta"))


@pytest.mark.parametrize(
    ("device", "capability", "installed", "expected"),
    [
        ("cuda:0", (9, 0), True, True),
        ("cuda:0", (8, 0), True, True),
        ("cuda:0", (7, 5), True, False),
        ("cuda:0", (9, 0), False, False),
        ("cpu", None, True, False),
    ],
)
def test_where_auto_takes_triton(device, capability, installed, expected, monkeypatch):
    """On devices that Triton compiles for; a graph holds the answer, not the question."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(backends, "_HAS_TRITON", installed)
    assert backends._compiles_triton(torch.device(device)) == expected

    def call(x):
        return x + 1 if backends._compiles_triton(torch.device(device)) else x - 1

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())).item() == (1 if expected else -1)
    torch._dynamo.reset()
