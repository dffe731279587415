"""The benchmarks of the alignment loss and of the ops between the products, on the CPU with small shapes."""

import dataclasses
import json

import pytest
import torch

from benchmarks import alignment_loss, bandwidth, harness, stream_ops

CPU = torch.device("cpu")


def run(tmp_path, name, module, *options):
    path = tmp_path / f"{name}.json"
    code = bandwidth.main(name, "", module.cases, ["--tiny", "--seconds", "0.01", "--json", str(path), *options])
    return code, json.loads(path.read_text())


@pytest.fixture
def without_compilers(monkeypatch):
    """Compiled peers take long to build and are tried elsewhere."""
    real = stream_ops._candidates

    def candidates(*arguments):
        found = real(*arguments)
        return found | {"candidates": {k: v for k, v in found["candidates"].items() if k != "torch.compile"}}

    monkeypatch.setattr(stream_ops, "_candidates", candidates)


@pytest.mark.usefixtures("without_compilers")
def test_the_ops_between_the_products(tmp_path, capsys):
    code, result = run(tmp_path, "stream_ops", stream_ops)
    assert code == 0
    assert result["complete"]
    rows = {(row["op"], row["backend"], row["direction"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"])
    assert {key[0] for key in rows} == stream_ops.BACKENDS.keys()
    for op in stream_ops.BACKENDS:
        for direction in ("forward",) if op == "flow_matching" else ("forward", "backward"):
            own, peer = (rows[op, name, direction] for name in ("torch", "eager"))
            assert own["status"] == peer["status"] == "ok"
            assert own["correct"] is peer["correct"] is True
            assert own["ours"]
            assert not peer["ours"]
            assert own["speedup_over"]["eager"] == peer["ms"] / own["ms"]
            assert own["of_copy"] == pytest.approx(own["gbs"] / result["ceilings"]["copy_gbs"])
            assert own["p20"] <= own["ms"] <= own["p80"]
    norm = rows["rms_norm", "torch", "forward"]
    assert norm["gbs"] * norm["ms"] * 1e6 == pytest.approx(4 * 4 * 24 * 16)
    linear = rows["stream_linear", "torch", "backward"]
    assert linear["tflops"] * linear["ms"] * 1e9 == pytest.approx(2 * 2 * 24 * 16 * 16)
    assert rows["rms_norm", "liger (one weight)", "forward"]["status"].startswith("cannot run: ")
    assert rows["stream_linear", "grouped product", "forward"]["status"] == "cannot run: needs a CUDA device"
    assert "flow_matching_loss" in capsys.readouterr().out


@pytest.mark.slow
def test_the_alignment_loss(tmp_path):
    """With torch.compile among the peers."""
    code, result = run(tmp_path, "alignment_loss", alignment_loss)
    assert code == 0
    rows = {row["backend"]: row for row in result["rows"]}
    assert rows.keys() == {"eager", "torch.compile", *alignment_loss.BACKENDS}
    for name in ("eager", "torch.compile", "torch"):
        assert (rows[name]["status"], rows[name]["correct"]) == ("ok", True)
    assert rows["torch"]["speedup_over"].keys() == {"eager", "torch.compile"}
    assert rows["torch"]["gbs"] * rows["torch"]["ms"] * 1e6 == pytest.approx(4 * 16 * (2 * 32 + 50))
    assert rows["cuda"]["status"].startswith("cannot run: backend='cuda' cannot run alignment_loss")


def changed(case, **candidates):
    peers = {"eager": case.candidates["eager"]}
    return dataclasses.replace(case, candidates=peers | candidates)


def recorded(case):
    record = bandwidth.Record(None, {}, bandwidth.COLUMNS)
    bandwidth.run_case(record, case, CPU, 0.01, {"copy_gbs": 1.0, "matmul_tflops": 1.0})
    return {(row["backend"], row["direction"]): row for row in record.rows}


def tiny_swiglu():
    return stream_ops.swiglu_case(CPU, torch.float32, 6, 8)


def test_a_wrong_answer_is_shown_as_wrong():
    case = tiny_swiglu()
    eager = case.candidates["eager"]()
    rows = recorded(changed(case, torch=lambda: lambda x: 1.001 * eager(x)))
    assert {key: row["correct"] for key, row in rows.items()} == {
        (name, direction): name == "eager" for name in ("eager", "torch") for direction in case.work
    }


def test_a_failure_is_a_row():
    """In the first call, or only when the backward pass is timed alone."""
    case = tiny_swiglu()
    eager = case.candidates["eager"]()

    def fails():
        raise RuntimeError("no such thing\nand more")

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.calls = 0
            return eager(x)

        @staticmethod
        def backward(ctx, dy):
            ctx.calls += 1
            if ctx.calls > 1:
                raise RuntimeError("once is enough")
            return torch.ones(6, 16)

    rows = recorded(changed(case, torch=fails, once=lambda: Once.apply))
    assert rows["torch", "forward"]["status"] == rows["torch", "backward"]["status"]
    assert rows["torch", "forward"]["status"] == "failed: RuntimeError: no such thing"
    assert rows["once", "forward"]["status"] == "ok"
    assert rows["once", "backward"]["status"] == "failed: RuntimeError: once is enough"
    assert rows["eager", "backward"]["status"] == "ok"


@pytest.mark.usefixtures("without_compilers")
def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch):
    real, path = bandwidth.run_case, tmp_path / "rows.json"

    def run_case(record, case, *rest):
        if case.op == "flow_matching":
            raise KeyboardInterrupt
        real(record, case, *rest)

    monkeypatch.setattr(bandwidth, "run_case", run_case)
    code, result = run(tmp_path, "rows", stream_ops)
    assert code == 130
    assert not result["complete"]
    assert {row["op"] for row in result["rows"]} == {"rms_norm", "swiglu"}
    assert path.exists()


def test_paired_timing_takes_turns():
    order = []
    calls = {name: [lambda name=name, i=i: order.append((name, i)) for i in range(2)] for name in "ab"}
    timings = harness.measure_paired(calls, CPU, seconds=0.0)
    assert timings.keys() == {"a", "b"}
    assert {t.runs for t in timings.values()} == {6}
    assert order[-12:] == [(name, i % 2) for turn in range(2) for name in "ab" for i in range(3 * turn, 3 * turn + 3)]


def test_peak_memory_of_a_call_on_the_cpu():
    peak = harness.peak_mib(lambda: torch.ones(96 * 2**18), CPU)  # more than the C library keeps for later
    if peak is None:
        pytest.skip("this system does not reset the high-water mark of resident memory")
    assert 95 <= peak <= 110
