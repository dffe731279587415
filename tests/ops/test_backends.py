"""The names of implementations and the errors about them."""

import sys

import pytest
import torch
from op_checks import BACKENDS, randn

from unigendet.ops import backends, swiglu
from unigendet.ops.backends import BACKENDS as NAMES
from unigendet.ops.backends import resolve


def test_auto_is_torch_and_names_are_kept():
    assert resolve("stream_linear", "auto", randn(2, 4)) == "torch"
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
    monkeypatch.setattr(backends, "extension_backends", lambda: ())  # these tensors are on the CPU
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


def test_an_extension_that_does_not_load_is_reported(monkeypatch):
    """One warning, then plain PyTorch; a backend that is named says why it cannot run."""
    monkeypatch.setitem(sys.modules, "unigendet._C", None)  # importing it raises
    monkeypatch.delattr("unigendet._C", raising=False)
    monkeypatch.setattr(backends, "find_spec", lambda _: object())
    backends.extension_facts.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"unigendet\._C is built, but cannot be loaded: import of"):
            assert resolve("alignment_loss", "auto", randn(1, 8), randn(1, 8)) == "torch"
        with pytest.raises(
            ValueError, match=r"backend='cpp' cannot run alignment_loss: unigendet\._C is built, but cannot"
        ):
            resolve("alignment_loss", "cpp", randn(1, 8), randn(1, 8))
        assert "cpp" not in backends.available()["alignment_loss"]
    finally:
        backends.extension_facts.cache_clear()


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["sm_80", "sm_90a"], (8, 0), True),
        (["sm_80", "sm_90a"], (8, 6), True),
        (["sm_80", "sm_90a"], (9, 0), True),
        (["sm_80", "sm_90a"], (7, 5), False),
        (["sm_80", "sm_90a"], (10, 0), False),
        (["sm_80"], (9, 0), False),
        (["sm_86"], (8, 0), False),
        (["sm_100a"], (10, 0), True),
        (["sm_100a"], (10, 3), False),
    ],
)
def test_devices_that_compiled_kernels_run_on(archs, capability, runs, monkeypatch):
    monkeypatch.setattr(backends, "extension_facts", lambda: {"cuda_archs": archs})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert backends._has_kernels_for(torch.device("cuda")) is runs
