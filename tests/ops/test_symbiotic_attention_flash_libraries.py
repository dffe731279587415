"""The flash backend's calls to the libraries: the choice among them, and their signatures."""

from types import SimpleNamespace

import dense_varlen
import pytest
import torch
from attention_cases import arguments, layout_of
from torch._subclasses.fake_tensor import FakeTensorMode

from unigendet.ops import symbiotic_attention_flash as flash

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capability", "installed", "chosen"),
    [
        ((9, 0), {"flash_attn_interface", "flash_attn"}, "3"),
        ((8, 0), {"flash_attn_interface", "flash_attn"}, "2"),
        ((9, 0), {"flash_attn"}, "2"),
        ((9, 0), set(), "torch"),
        ((8, 0), {"flash_attn_interface"}, "torch"),
    ],
)
def test_which_library_runs(monkeypatch, capability, installed, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(flash, "_installed", lambda module: module in installed)
    monkeypatch.setattr(flash, "_flash_attention_3", lambda: SimpleNamespace(name="3"))
    monkeypatch.setattr(flash, "_flash_attention_2", lambda: SimpleNamespace(name="2"))
    flash.library.cache_clear()
    assert flash.library(torch.device("cuda", 0)).name.split()[0] == chosen
    flash.library.cache_clear()


def test_an_old_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    flash.library.cache_clear()
    with pytest.raises(ValueError, match=r"needs compute capability 8.0 or later; cuda:0 has \(7, 5\)"):
        flash.library(torch.device("cuda", 0))


def check_adapter(library):
    """A library's adapter against the dense function that stands behind it."""
    layout = layout_of("training")
    q, k, v = (x.detach() for x in arguments(layout))
    for call in flash.plan(layout.splits, CPU):
        inputs = [flash._take(x, r) for x, r in ((q, call.query_rows), (k, call.key_rows), (v, call.key_rows))]
        out, lse = library.forward(*inputs, call, 0.4)
        expected = dense_varlen.forward(*inputs, call, 0.4)
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])
        grads = library.backward(2 * out, *inputs, out, lse, call, 0.4)
        for actual, exact in zip(grads, dense_varlen.backward(2 * out, *inputs, out, lse, call, 0.4), strict=True):
            assert torch.equal(actual, exact)


def made_call(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
    return flash.Call(causal, slice(0), slice(0), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def test_the_call_of_flash_attention_2(monkeypatch):
    """Behind the signatures that the package has had since 2.7."""

    def forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
        block_table=None,
        leftpad_k=None,
        seqused_k=None,
    ):
        assert dropout_p == 0
        call = made_call(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
        return *dense_varlen.forward(q, k, v, call, softmax_scale), torch.empty(0), torch.empty(2)

    def backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state=None,
    ):
        assert (dropout_p, window_size_left, window_size_right, softcap, deterministic) == (0, -1, -1, 0, False)
        call = made_call(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
        for target, value in zip(
            (dq, dk, dv), dense_varlen.backward(dout, q, k, v, out, softmax_lse, call, softmax_scale), strict=True
        ):
            target.copy_(value)
        return torch.empty(0)

    modules = {
        "flash_attn": SimpleNamespace(__version__="2.8.3"),
        "flash_attn.flash_attn_interface": SimpleNamespace(
            _flash_attn_varlen_forward=forward, _flash_attn_varlen_backward=backward
        ),
    }
    monkeypatch.setattr(flash.importlib, "import_module", modules.__getitem__)
    library = flash._flash_attention_2()
    assert library.name == "flash_attn 2.8.3"
    check_adapter(library)


def test_the_call_of_flash_attention_3(monkeypatch):
    """Behind its operators' schema, as far as it is used."""
    lengths = "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    options = "float? softmax_scale=None, bool is_causal=False, "
    definition = torch.library.Library("flash_attn_3", "FRAGMENT")
    definition.define(
        f"fwd(Tensor q, Tensor k, Tensor v, {lengths}{options}int num_splits=0) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    definition.define(
        "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
        f"Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, {lengths}{options}bool deterministic=False) -> Tensor"
    )

    # The dispatcher leaves out trailing arguments that have the schema's default.
    def forward(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale, is_causal=False, num_splits=0):
        assert num_splits == 1
        call = made_call(cu_q, cu_k, max_q, max_k, is_causal)
        return *dense_varlen.forward(q, k, v, call, softmax_scale), torch.empty(0), torch.empty(0)

    def backward(dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, max_q, max_k, scale, is_causal=False):
        grads = dense_varlen.backward(dout, q, k, v, out, lse, made_call(cu_q, cu_k, max_q, max_k, is_causal), scale)
        for target, value in zip((dq, dk, dv), grads, strict=True):
            target.copy_(value)
        return torch.empty(0)

    definition.impl("fwd", forward, "CPU")
    definition.impl("bwd", backward, "CPU")
    monkeypatch.setattr(flash.importlib, "import_module", lambda name: None)
    check_adapter(flash._flash_attention_3())


@pytest.mark.parametrize("head_dim", [72, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_the_call_of_pytorchs_own(head_dim, causal):
    """Its operators take these arguments and return these shapes, on a device that is only pretended."""
    with FakeTensorMode():
        q = torch.empty(10, 4, head_dim, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.empty(13, 2, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        cu_seqlens = torch.empty(3, device="cuda", dtype=torch.int32)
        call = made_call(cu_seqlens, cu_seqlens, 6, 7, causal)
        out, lse = flash._pytorch_forward(q, k, v, call, 0.3)
        assert (out.shape, out.dtype) == (q.shape, q.dtype)
        assert (lse.shape, lse.dtype) == ((4, 10), torch.float32)
        grads = flash._pytorch_backward(out, q, k, v, out, lse, call, 0.3)
        assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
