"""The names of implementations and the errors about them."""

import pytest
import torch
from op_checks import BACKENDS, randn

from unigendet.ops import swiglu
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
    with pytest.raises(ValueError, match=f"backend='{backend}' cannot run swiglu: no such kernel is built"):
        swiglu(randn(2, 4), backend=backend)


def test_tensors_must_share_a_device():
    with pytest.raises(ValueError, match="rms_norm: its tensors are on cpu, meta; they must be on one device"):
        resolve("rms_norm", "auto", randn(2, 4), None, torch.empty(4, device="meta"))
