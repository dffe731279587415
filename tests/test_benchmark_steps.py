"""Benchmarks of a layer, of whole training steps, of what packs cost, and of scaling, on tiny packs."""

import importlib
import re

import pytest
import torch

from benchmarks import (
    contest,
    decoder_layer,
    packing_cost,
    packs,
    profile,
    scaling,
    traces,
    training_step,
    work,
)
from benchmarks.progress import Progress
from benchmarks.record import Record, table
from unigendet import device
from unigendet.model import flops

CPU = torch.device("cpu")
OWN = decoder_layer.default_backend(CPU)  # as ours is called: after what attention takes
LIMITS = {"copy_gbs": 10.0, "matmul_tflops": 0.1}


def measured(case, **options):
    record = Record(None, "test", {})
    case.run(contest.Run(record, CPU, LIMITS, Progress(1, quiet=True), seconds=0.01, sets=2, **options))
    return record.rows


def of(rows, backend):
    return {row["direction"]: row for row in rows if row["backend"] == backend}


def test_a_decoder_layer():
    (case,) = decoder_layer.cases(CPU, "tiny")
    rows = measured(case)
    own, peer = of(rows, OWN), of(rows, "published")
    assert own.keys() == peer.keys() == {"forward", "backward", "both"}
    for direction in own:
        assert own[direction]["correct"] is peer[direction]["correct"] is True
        assert own[direction]["speedup_over"] == {"published": peer[direction]["ms"] / own[direction]["ms"]}
    config = packs.small_config(32, 1, heads=4, kv_heads=2, intermediate=48)
    assert own["both"]["flops"] == flops.decoder_layer(config, traces.tiny().layout).total


def test_a_layer_that_mixes_up_streams_is_wrong(monkeypatch):
    real = decoder_layer.own_layer

    def swapped(layer, layout, config, backend="auto"):
        if backend == "auto":
            with torch.no_grad():
                layer.out.gen.weight.copy_(layer.out.und.weight)
        return real(layer, layout, config, backend)

    monkeypatch.setattr(decoder_layer, "own_layer", swapped)
    (case,) = decoder_layer.cases(CPU, "tiny")
    assert {row["correct"] for row in measured(case, backends=[OWN])} == {False}


STEPS = list(training_step.cases(CPU, "tiny"))


@pytest.mark.parametrize("case", STEPS, ids=[case.op for case in STEPS])
def test_a_training_step(case, monkeypatch):
    monkeypatch.setattr(training_step, "data_sheet_tflops", lambda device: 0.2)
    own, peer = measured(case)
    assert (own["backend"], own["ours"], peer["backend"], peer["ours"]) == (OWN, True, "published", False)
    assert own["correct"] is peer["correct"] is True
    assert {re.split("[ ,]", name)[0] for name in own["error"]} == {"hidden", "gradient"}
    assert own["speedup_over"] == {"published": peer["ms"] / own["ms"]}
    assert own["tokens"] == case.packed.layout.num_queries
    assert own["tokens_per_second"] == pytest.approx(1e3 * own["tokens"] / own["ms"])
    assert own["mfu"] == pytest.approx(own["tflops"] / 0.1)
    assert own["of_ceiling"] == pytest.approx(own["mfu"])
    assert sum(own["shares"].values()) == pytest.approx(1.0)
    assert own["shares"]["attention, backward"] > 0
    assert ("alignment_loss" in own["shares"]) == (case.stage == "diga")
    assert "shares" not in peer
    if case.stage == "gduf":
        lengths = case.packed.layout.cu_seqlens_q.diff().tolist()
        expected = work.published_convention(case.config, own["tokens"], lengths)
        assert own["mfu_published"] == pytest.approx(expected / own["ms"] / 1e9 / 0.2)
    else:
        assert "mfu_published" not in own


def test_data_sheets(monkeypatch):
    assert device.data_sheet_tflops(CPU) is None
    for name, rate in (
        ("NVIDIA H200", 989.5),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("X", None),
    ):
        monkeypatch.setattr(device, "device_name", lambda _, name=name: name)
        assert device.data_sheet_tflops(torch.device("cuda")) == rate


def test_a_step_updates_only_what_its_stage_trains():
    (diga,) = (case for case in STEPS if case.stage == "diga")
    for name in diga.candidates:
        step = diga._step(name, torch.float32)
        before = {key: p.detach().clone() for key, p in step.model.named_parameters()}
        step.stepper()()
        moved = {key for key, p in step.model.named_parameters() if not torch.equal(p, before[key])}
        assert moved
        assert all(".gen" in key or key.split(".")[0] in TRAINED for key in moved)
        assert {key.split(".")[0] for key in moved} == {*TRAINED, "decoder"}


TRAINED = {"align_head", "vae2llm", "llm2vae", "time_embedding"}


def test_a_wrong_step_is_wrong(monkeypatch):
    case = STEPS[0]
    backends = importlib.import_module("unigendet.ops.symbiotic_attention")._FORWARD
    real = backends[OWN]

    def forward(*arguments):
        out, lse = real(*arguments)
        return 1.01 * out, lse

    monkeypatch.setitem(backends, OWN, forward)
    own, peer = measured(case)
    assert (own["correct"], peer["correct"]) == (False, True)
    assert "speedup_over" not in own


def test_layers_that_fit():
    assert training_step.layers_that_fit(141) == 5
    assert training_step.layers_that_fit(80) == 2
    assert training_step.layers_that_fit(24) == 0


def test_a_small_gpu_is_told(monkeypatch):
    properties = type("Properties", (), {"total_memory": 40 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(training_step, "default_backend", lambda device: "triton")
    for case in training_step.cases(torch.device("cuda"), "full"):
        assert {row["status"] for row in measured(case)} == {"cannot run: it needs about 47 GiB; the device has 40"}


def test_gpu_steps_have_bagels_width(monkeypatch):
    properties = type("Properties", (), {"total_memory": 141 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gduf, diga = training_step.cases(torch.device("cuda"), "full")
    assert gduf.size == diga.size == "BAGEL-7B width, 5 layers"
    assert (gduf.trace, diga.trace, diga.teacher.name) == ("gduf_32k", "diga_23k", "diga_23k_teacher")
    assert diga.layer == 1  # of five, as 8 of 28


def test_shares_are_by_op():
    shares = profile.step_shares(lambda: torch.randn(64, 64) @ torch.randn(64, 64), CPU)
    assert shares == {profile.REST: pytest.approx(1.0)}


def test_what_a_pack_costs():
    rows = [row for case in packing_cost.cases(CPU, "tiny") for row in measured(case)]
    assert {row["status"] for row in rows} == {"ok"}
    assert {(row["op"], row["backend"]) for row in rows} == {
        *(
            ("attention_metadata", name)
            for name in ("triton", "torch", "flash", "block_mask", "block_mask_compiled", "dense_masks")
        ),
        ("tile_schedule", "triton"),
        ("pack", "pack"),
    }
    by_backend = {row["backend"]: row for row in rows if row["op"] == "attention_metadata"}
    assert by_backend["triton"]["speedup_over"].keys() == {"block_mask", "block_mask_compiled", "dense_masks"}
    (tiles,) = (row for row in rows if row["op"] == "tile_schedule")
    layout = traces.tiny().layout
    launched = packing_cost.fresh_schedule(layout, 16, 16).launched_pairs
    assert tiles["useful_share"] == layout.visible_pairs() / launched


def test_a_schedule_is_made_anew_each_time():
    layout = traces.tiny().layout
    assert packing_cost.fresh_schedule(layout, 16, 16) is not packing_cost.fresh_schedule(layout, 16, 16)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_sweeps_vary_one_thing(on_gpu):
    found = {}
    for sweep, x, trace in scaling.sweeps("full", on_gpu=on_gpu):
        found.setdefault(sweep, []).append((x, trace))
    assert found.keys() == {"tokens", "image_size", "text_share", "samples"}
    total = 32768 if on_gpu else 8192
    for sweep, points in found.items():
        assert len(points) >= 5
        for x, trace in points:
            tokens = trace.layout.num_queries
            if sweep == "tokens":
                assert 0.85 * x <= tokens <= x
            elif sweep == "samples":
                assert (trace.layout.num_samples, tokens) == (x, total)
            elif sweep == "text_share":
                assert tokens == pytest.approx(total, rel=0.01)
                text = sum(s.tokens for sample in trace.samples for s in sample if s.grid is None)
                assert text / tokens == pytest.approx(x, abs=0.01)
            else:
                assert trace.samples[0][0].grid == (x // 16, x // 16)


def test_rows_of_a_sweep_name_it():
    attention, layer = scaling.cases(CPU, "tiny")
    rows = [*measured(attention, backends=[OWN]), *measured(layer, backends=[OWN])]
    assert [(r["op"], r["sweep"], r["x"], r["direction"]) for r in rows] == [
        ("symbiotic_attention", "tokens", 256, "both"),
        ("decoder_layer", "tokens", 256, "both"),
    ]
    assert all(row["correct"] for row in rows)
    assert "symbiotic_attention · tokens 256 · " in "\n".join(table(rows))
