"""The attention benchmark and its harness, on the CPU."""

import dataclasses
import json

import pytest
import torch

from benchmarks import attention, attention_candidates, harness, traces

CPU = torch.device("cpu")


def run(tmp_path, *options):
    path = tmp_path / "attention.json"
    code = attention.main(["--tiny", "--seconds", "0.01", "--json", str(path), *options])
    return code, json.loads(path.read_text())


def test_a_tiny_run(tmp_path, capsys):
    code, result = run(tmp_path)
    assert code == 0
    assert result["complete"]
    assert result["schema"] == harness.SCHEMA
    assert result["environment"]["versions"]["torch"] == torch.__version__
    assert result["environment"]["kernels_sha256"] == harness.kernels_hash()
    assert result["ceilings"]["matmul_tflops"] > 0
    rows = {(row["trace"], row["backend"], row["direction"]): row for row in result["rows"]}
    expected = {("tiny", name, d) for name in attention_candidates.CANDIDATES for d in attention.DIRECTIONS}
    assert expected <= rows.keys()
    assert len(result["rows"]) == len(rows)
    assert {key[0] for key in rows.keys() - expected} == {"dense_full_64", "dense_causal_64"}
    for direction, work in attention.DIRECTIONS.items():
        row = rows["tiny", "torch", direction]
        assert row["status"] == "ok"
        assert row["correct"] is True
        flops = 4 * 16 * 4 * traces.tiny().layout.visible_pairs() * work
        assert row["tflops"] * row["ms"] * 1e9 == pytest.approx(flops)
        assert row["of_matmul"] == pytest.approx(row["tflops"] / result["ceilings"]["matmul_tflops"])
        assert row["p20"] <= row["ms"] <= row["p80"]
        peer = rows["tiny", "sdpa_dense_mask", direction]
        assert peer["status"] == "ok"
        assert peer["correct"] is True
        assert row["speedup_over"] == {"sdpa_dense_mask": peer["ms"] / row["ms"]}
    assert set(rows["tiny", "torch", "both"]["error"]) == {"out", "dq", "dk", "dv"}
    for name in ("flash", "flex", "flex_mask_per_pack"):
        assert rows["tiny", name, "forward"]["status"].startswith("cannot run: ")
    assert "sdpa_dense_mask" in capsys.readouterr().out


def test_a_selection(tmp_path):
    code, result = run(tmp_path, "--backends", "torch", "--directions", "forward")
    assert code == 0
    assert {(r["backend"], r["direction"]) for r in result["rows"]} == {("torch", "forward"), ("cudnn", "forward")}


def broken(change):
    """The torch backend with something done to its output."""

    def setup(case):
        prepare = attention_candidates.CANDIDATES["torch"](case)
        return lambda inputs: change(prepare(inputs))

    return setup


def test_a_wrong_answer_is_shown_as_wrong(tmp_path, monkeypatch):
    wrong = broken(lambda p: dataclasses.replace(p, forward=lambda: p.forward() * 1.001))
    monkeypatch.setitem(attention_candidates.CANDIDATES, "triton", wrong)
    code, result = run(tmp_path, "--backends", "triton", "torch")
    assert code == 1
    found = {(r["backend"], r["direction"]): r["correct"] for r in result["rows"] if r["trace"] == "tiny"}
    assert found == {(b, d): b == "torch" for b in ("triton", "torch") for d in attention.DIRECTIONS}


def test_a_failure_is_a_row(tmp_path, monkeypatch):
    """A forward pass that works keeps its row when the backward pass fails."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no kernel image\nsecond line")

    failing = broken(lambda p: dataclasses.replace(p, forward=lambda: Fails.apply(p.forward())))
    monkeypatch.setitem(attention_candidates.CANDIDATES, "triton", failing)
    code, result = run(tmp_path, "--backends", "triton", "torch")
    assert code == 0
    status = {r["direction"]: r["status"] for r in result["rows"] if r["backend"] == "triton"}
    failed = "failed: RuntimeError: no kernel image"
    assert status == {"forward": "ok", "backward": failed, "both": failed}
    assert [r["status"] for r in result["rows"] if r["backend"] == "torch"] == ["ok"] * 3


def test_an_interrupted_run_keeps_its_rows(tmp_path, monkeypatch):
    def interrupt(case):
        raise KeyboardInterrupt

    monkeypatch.setitem(attention_candidates.CANDIDATES, "flex", interrupt)
    code, result = run(tmp_path, "--backends", "torch", "flex")
    assert code == 130
    assert not result["complete"]
    assert [r["status"] for r in result["rows"] if r["trace"] == "tiny"] == ["ok"] * 3


def test_past_the_time_limit_rows_say_so(tmp_path):
    code, result = run(tmp_path, "--limit", "-1", "--backends", "torch")
    assert code == 0
    assert {r["status"] for r in result["rows"]} == {"cannot run: the time limit of the run was reached"}


def test_without_a_device_the_full_run_refuses(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device; --tiny runs on the CPU"):
        attention.main([])


def test_candidates_get_keywords_only_where_the_op_has_them():
    case = attention_candidates.Case(traces.tiny(), CPU, torch.float32, 4, 2, 16)
    with pytest.raises(harness.CannotRun, match="symbiotic_attention has no argument unheard_of"):
        attention_candidates._ours("torch", unheard_of=1)(case)
    attention_candidates._ours("torch", out_order="stream")(case)


def test_percentiles():
    timing = harness.Timing.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (timing.p20, timing.ms, timing.p80, timing.runs) == (2.0, 3.0, 5.0, 5)


def test_buffers_take_turns():
    used = []
    timing = harness.measure([lambda i=i: used.append(i) for i in range(3)], CPU, seconds=0.0)
    assert timing.runs == 5
    assert used[-5:] == [0, 1, 2, 0, 1]


def test_the_hash_is_of_names_and_contents(tmp_path):
    hashes = []
    for name, content in (("a.py", "1"), ("a.py", "2"), ("b.py", "2")):
        folder = tmp_path / str(len(hashes))
        folder.mkdir()
        (folder / name).write_text(content)
        (folder / "notes.txt").write_text("not a kernel")
        hashes.append(harness.kernels_hash(folder))
    assert len(set(hashes)) == 3


def test_the_file_is_named_after_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 (SXM)")
    path = harness.default_path("attention", torch.device("cuda"))
    assert path == harness.ROOT / "benchmarks" / "results" / "nvidia-h200-sxm" / "attention.json"
