"""Attention's peers describe the mask that the op defines, in each one's own words."""

import dataclasses
import sys
import types

import pytest
import torch

from benchmarks import attention, attention_peers, contest, harness, stream_case, traces
from benchmarks.attention_peers import Setting
from benchmarks.progress import Progress
from benchmarks.record import Record
from unigendet.layout import Layout
from unigendet.ops import symbiotic_attention
from unigendet.ops import symbiotic_attention_flash as flash

CPU = torch.device("cpu")
SPLITS = [
    [(5, "full"), (4, "causal"), (3, "noise"), (6, "causal"), (2, "full")],
    [(4, "noise"), (3, "noise"), (5, "causal")],
    [(7, "causal")],
]
TRACE = traces.Trace("test", tuple(tuple(traces.Segment(*split) for split in sample) for sample in SPLITS))
SETTING = Setting(TRACE, CPU, heads=4, kv_heads=2, head_dim=16)


def qkv():
    generator = torch.Generator().manual_seed(0)
    make = lambda heads: torch.randn(TRACE.layout.num_queries, heads, 16, generator=generator).double()  # noqa: E731
    return [make(heads).requires_grad_() for heads in (4, 2, 2)]


def assert_is_attention(function):
    """Output and gradients are those of the definition."""
    results = []
    for one in (function, lambda q, k, v: symbiotic_attention(q, k, v, TRACE.layout, backend="reference")):
        q, k, v = qkv()
        out = one(q, k, v)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        results.append((out, *torch.autograd.grad((out * weights).sum(), (q, k, v))))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["eager", "sdpa_dense_mask"])
def test_dense_peers(name):
    assert_is_attention(attention_peers.PEERS[name](SETTING).function)


def test_magi_slices_are_the_mask():
    layout = Layout.from_splits(SPLITS)
    queries, keys, types_ = attention_peers.magi_ranges(layout)
    covered = torch.zeros(layout.num_queries, layout.num_keys, dtype=torch.int64)
    for (q0, q1), (k0, k1), causal in zip(queries.tolist(), keys.tolist(), types_.tolist(), strict=True):
        block = torch.ones(q1 - q0, k1 - k0, dtype=torch.int64)
        covered[q0:q1, k0:k1] += block.tril((k1 - k0) - (q1 - q0)) if causal else block
    assert torch.equal(covered, layout.dense_mask().long())  # nothing twice


def installed(monkeypatch, module, **attributes):
    """A library that stands in for a peer's, on a CPU that counts as a CUDA device."""
    fake = types.ModuleType(module)
    vars(fake).update(attributes)
    monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr(stream_case, "raise_if_not_cuda", lambda device: None)


def problems(q, k, v, cu_q, cu_k, causal, scale):
    """Varlen attention with lower-right causal masks."""
    outs = []
    for i in range(len(cu_q) - 1):
        a, b = (slice(int(cu[i]), int(cu[i + 1])) for cu in (cu_q, cu_k))
        own_k, own_v = (x[b].repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1) for x in (k, v))
        scores = q[a].transpose(0, 1) @ own_k.transpose(1, 2) * scale
        if causal:
            visible = torch.ones(scores.shape[1:], dtype=torch.bool).tril(scores.shape[2] - scores.shape[1])
            scores = scores.masked_fill(~visible, float("-inf"))
        outs.append((scores.softmax(-1) @ own_v).transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("returns_more", [False, True])
def test_varlen_flash_attention(monkeypatch, returns_more):
    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale, causal):
        assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
        out = problems(q, k, v, cu_q, cu_k, causal, softmax_scale)
        return (out, None) if returns_more else out

    installed(monkeypatch, "flash_attn_interface", flash_attn_varlen_func=flash_attn_varlen_func)
    assert_is_attention(attention_peers.PEERS["flash_attn3"](SETTING).function)


def test_torch_varlen(monkeypatch):
    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert enable_gqa
        return problems(q, k, v, cu_q, cu_k, window_size == (-1, 0), scale)

    installed(monkeypatch, "torch.nn.attention.varlen", varlen_attn=varlen_attn)
    assert_is_attention(attention_peers.PEERS["torch_varlen"](SETTING).function)


@pytest.mark.parametrize("old", [False, True])
def test_magi(monkeypatch, old):
    def attend(q, k, v, q_ranges, k_ranges, attn_type_map, softmax_scale):
        mask = torch.zeros(len(q), len(k), dtype=torch.bool)
        slices = zip(q_ranges.tolist(), k_ranges.tolist(), attn_type_map.tolist(), strict=True)
        for (q0, q1), (k0, k1), causal in slices:
            block = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
            mask[q0:q1, k0:k1] |= block.tril((k1 - k0) - (q1 - q0)) if causal else block
        k, v = (x.repeat_interleave(2, 1).transpose(0, 1) for x in (k, v))
        scores = (q.transpose(0, 1) @ k.transpose(1, 2) * softmax_scale).masked_fill(~mask, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(0, 1), None

    def new(q, k, v, q_ranges, k_ranges, attn_type_map=None, *, softmax_scale=None):
        return attend(q, k, v, q_ranges, k_ranges, attn_type_map, softmax_scale)

    def before(q, k, v, q_ranges, k_ranges, max_seqlen_q, max_seqlen_k, attn_type_map=None, softmax_scale=None):
        assert (max_seqlen_q, max_seqlen_k) == (7, 9)
        return attend(q, k, v, q_ranges, k_ranges, attn_type_map, softmax_scale)

    monkeypatch.setitem(sys.modules, "magi_attention", types.ModuleType("magi_attention"))
    installed(monkeypatch, "magi_attention.api", flex_flash_attn_func=before if old else new)
    assert_is_attention(attention_peers.magi(SETTING).function)


def test_peers_that_are_not_there_say_so():
    for name, what in (
        ("flash_attn2", "flash-attn is not installed"),
        ("magi", "MagiAttention is not installed"),
        ("torch_varlen", "needs a CUDA device"),
        ("flex_flash4", "needs a CUDA device"),
        ("flex_cudnn", "no backend CUDNN"),
    ):
        with pytest.raises(harness.CannotRun, match=what):
            attention_peers.PEERS[name](SETTING)
    many = traces.trace("many_small_16k")
    with pytest.raises(harness.CannotRun, match="228 samples of different lengths"):
        attention_peers.compiled_eager(Setting(many, CPU, 4, 2, 16))


@pytest.mark.slow
def test_flex_attention_on_a_cpu():
    """Compiled, forward only."""
    one = attention_peers.PEERS["flex"](SETTING)
    assert one.forward_only == "FlexAttention has no backward pass on CPUs"
    q, k, v = (x.detach().float() for x in qkv())
    out = one.restore(one.function(*(one.arrange(x) for x in (q, k, v))))
    torch.testing.assert_close(out, symbiotic_attention(q, k, v, TRACE.layout, backend="reference"))


def test_a_backend_of_ours():
    assert_is_attention(attention.backend("torch", deterministic=True)(SETTING).function)


def test_the_vit_pack_has_one_full_split_per_image():
    trace = attention.vit_trace(traces.tiny())
    assert trace.splits == [[(6, "full")]]
    assert flash.plan(trace.layout.splits, CPU)[0].key_rows == slice(0, 6)


def test_gpu_cases_are_made_without_one():
    """They are lazy: nothing is on the device before a case runs."""
    cases = list(attention.cases(torch.device("cuda"), "full"))
    assert {case.trace for case in cases} >= {*attention.GPU_TRACES, "gduf_32k_vit", "dense_causal_8192"}
    assert all({"torch", "cpp"}.isdisjoint(case.candidates) for case in cases)


def test_a_wrong_mask_is_wrong_in_every_direction(monkeypatch):
    """In bfloat16 a key too many is lost in the output's rounding, but not in the gradients."""
    case = attention.case(CPU, torch.bfloat16, TRACE, (4, 2), 32)
    right = attention.OURS["torch"]
    splits = [[(n, "full" if mode == "noise" else mode) for n, mode in sample] for sample in SPLITS]
    wrong = traces.Trace("wrong", tuple(tuple(traces.Segment(*split) for split in sample) for sample in splits))
    monkeypatch.setitem(attention.OURS, "torch", lambda setting: right(dataclasses.replace(setting, trace=wrong)))
    record = Record(None, "test", {})
    options = {"seconds": 0.01, "sets": 2, "backends": ["torch"]}
    case.run(contest.Run(record, CPU, {"copy_gbs": 10.0, "matmul_tflops": 0.1}, Progress(1, quiet=True), **options))
    assert {row["direction"]: row["correct"] for row in record.rows} == dict.fromkeys(case.work, False)
