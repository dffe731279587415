"""Cases of benchmarks: candidates take turns, are judged, and every one becomes a row, whatever happens."""

import dataclasses
import json
import weakref

import pytest
import torch

from benchmarks import (
    alignment_loss,
    attention,
    candidate,
    contest,
    environment,
    flow_matching,
    harness,
    qk_norm_rope,
    rms_norm,
    stream_linear,
    swiglu,
    traces,
)
from benchmarks.judge import Truth, allowances
from benchmarks.progress import Progress
from benchmarks.record import Record, table

CPU = torch.device("cpu")
COMPILED = "it compiles for long"
LIMITS = {"copy_gbs": 10.0, "matmul_tflops": 0.1}


def measured(case, path=None, **options):
    """The rows of a case, by backend and direction."""
    record = Record(path, "test", {})
    options = {"without": {"torch.compile": COMPILED, "flex": COMPILED, "flex_mask_per_pack": COMPILED}} | options
    run = contest.Run(record, CPU, LIMITS, Progress(1, quiet=True), seconds=0.01, sets=2, **options)
    case.run(run)
    rows = {(row["backend"], row["direction"]): row for row in record.rows}
    assert len(rows) == len(record.rows)
    return rows


OPS = (attention, qk_norm_rope, rms_norm, swiglu, stream_linear, flow_matching, alignment_loss)
CASES = [case for module in OPS for case in module.cases(CPU, "tiny")]


@pytest.mark.parametrize("case", CASES, ids=[case.op for case in CASES])
def test_every_op(case):
    names = [name for name in case.candidates if not name.startswith("triton")]  # minutes in the interpreter
    rows = measured(case, backends=names)
    assert rows.keys() == {(name, direction) for name in names for direction in case.work}
    for direction, work in case.work.items():
        own, peer = (rows[name, direction] for name in ("torch", "eager"))
        for row in (own, peer):
            assert (row["status"], row["correct"]) == ("ok", True)
            assert row["p20"] <= row["ms"] <= row["p80"]
            assert row["error"]
            if work.bytes:
                assert row["gbs"] * row["ms"] * 1e6 == pytest.approx(work.bytes)
            if work.flops:
                assert row["tflops"] * row["ms"] * 1e9 == pytest.approx(work.flops)
            floor = max(work.bytes / 1e10, work.flops / 1e11)
            assert row["of_ceiling"] == pytest.approx(1e3 * floor / row["ms"])
        assert (own["ours"], peer["ours"]) == (True, False)
        assert own["speedup_over"]["eager"] == peer["ms"] / own["ms"]
        assert "speedup_over" not in peer
        assert rows["torch.compile", direction]["status"] == f"cannot run: {COMPILED}"
    unable = {row["status"] for row in rows.values() if row["status"] != "ok"}
    assert all(status.startswith("cannot run: ") for status in unable)


def test_useful_work():
    """Of the four directions in which it is easy to say."""
    norm, linear, alignment = (next(m.cases(CPU, "tiny")) for m in (rms_norm, stream_linear, alignment_loss))
    assert norm.work["forward"].bytes == 4 * 4 * 24 * 16
    assert linear.work["backward"].flops == 2 * 2 * 24 * 16 * 16
    assert linear.work["backward"].bytes == 4 * (2 * (24 * 16 + 2 * 16 * 16) + 24 * 16)  # dy, x, W; dx, dW
    assert alignment.work["both"].bytes == 4 * 16 * (2 * 32 + 50)
    (one,) = attention.cases(CPU, "tiny")
    assert one.work["backward"].flops == 2.5 * 4 * 16 * 4 * traces.tiny().layout.visible_pairs()


def changed(case, **candidates):
    """A case with its eager peer and these."""
    return dataclasses.replace(case, candidates={"eager": case.candidates["eager"], **candidates})


def tiny_swiglu():
    return swiglu.case(CPU, torch.float32, 6, 8)


def test_a_wrong_answer_is_shown_as_wrong_and_counts_for_nothing():
    case = tiny_swiglu()
    eager = case.candidates["eager"]()
    rows = measured(changed(case, wrong=lambda: lambda x: 1.001 * eager(x), torch=case.candidates["torch"]))
    assert {key: row["correct"] for key, row in rows.items()} == {
        (name, direction): name != "wrong" for name in ("eager", "wrong", "torch") for direction in case.work
    }
    assert "speedup_over" not in rows["wrong", "forward"]
    peer_wrong = dataclasses.replace(
        changed(case, bad=lambda: lambda x: 1.001 * eager(x), torch=case.candidates["torch"]),
        peers=frozenset({"eager", "bad"}),
    )
    assert measured(peer_wrong)["torch", "forward"]["speedup_over"].keys() == {"eager"}


def test_nan_is_wrong():
    case = tiny_swiglu()
    rows = measured(changed(case, nan=lambda: lambda x: candidate_of(case)(x) * float("nan")))
    assert rows["nan", "forward"]["correct"] is False
    assert json.dumps(rows["nan", "forward"]["error"], allow_nan=False)


def candidate_of(case):
    return case.candidates["eager"]()


def test_a_result_that_is_missing_is_wrong():
    exact = {"output 0": torch.ones(3), "output 1": torch.ones(3), "gradient 0": torch.ones(3)}
    found = Truth(exact, allowances(exact, exact, 2.0)).errors({"output 0": torch.ones(3)})
    right = {name: value["error"] <= value["allowed"] for name, value in found.items()}
    assert right == {"output 0": True, "output 0, rms": True, "output 1": False, "output 1, rms": False}


def test_a_wrong_gradient_is_wrong_in_the_directions_that_have_it():
    """Of a peer; of ours in all, since the mistake may be in all."""
    case = tiny_swiglu()
    eager = case.candidates["eager"]()

    def other_gradient(x):
        y = eager(x)
        return y + 1e-3 * (y - y.detach())

    other = changed(case, torch=lambda: other_gradient, peer=lambda: other_gradient)
    rows = measured(dataclasses.replace(other, peers=frozenset({"eager", "peer"})))
    assert (rows["peer", "forward"]["correct"], rows["peer", "backward"]["correct"]) == (True, False)
    assert rows["torch", "forward"]["correct"] is rows["torch", "backward"]["correct"] is False


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

    rows = measured(changed(case, torch=fails, once=lambda: Once.apply))
    assert rows["torch", "forward"]["status"] == rows["torch", "backward"]["status"]
    assert rows["torch", "forward"]["status"] == "failed: RuntimeError: no such thing"
    assert rows["once", "forward"]["status"] == "ok"
    assert rows["once", "backward"]["status"] == "failed: RuntimeError: once is enough"
    assert rows["eager", "backward"]["status"] == "ok"


def test_a_candidate_without_a_backward_pass():
    case = tiny_swiglu()
    eager = case.candidates["eager"]()
    half = candidate.Candidate(eager, forward_only="it has none")
    rows = measured(changed(case, half=lambda: half))
    assert (rows["half", "forward"]["status"], rows["half", "forward"]["correct"]) == ("ok", True)
    assert rows["half", "backward"]["status"] == "cannot run: it has none"


def test_layouts_of_their_own_are_not_timed_and_judged_in_the_common_one():
    case = tiny_swiglu()
    eager = case.candidates["eager"]()
    shapes = []

    def transposed(x):
        shapes.append(tuple(x.shape))
        return eager(x.T).T

    own = candidate.Candidate(transposed, arrange=lambda x: x.T.contiguous(), restore=lambda x: x.T)
    rows = measured(changed(case, own=lambda: own))
    assert {row["correct"] for row in rows.values()} == {True}
    assert set(shapes) == {(16, 6)}


def test_parameters_get_gradients_too():
    case = tiny_swiglu()
    eager = case.candidates["eager"]()
    weight = torch.ones(16, requires_grad=True)
    seen = []
    weight.register_hook(lambda grad: seen.append(grad))
    own = candidate.Candidate(lambda x: eager(x * weight), parameters=(weight,))
    rows = measured(changed(case, own=lambda: own))
    assert rows["own", "backward"]["correct"] is True
    assert seen


def test_without_a_judge_nothing_is_called_right():
    def truth(case, inputs):
        raise torch.OutOfMemoryError("too large")

    rows = measured(dataclasses.replace(tiny_swiglu(), truth=truth))
    row = rows["torch", "forward"]
    assert (row["status"], row["correct"], row["not_judged"]) == ("ok", None, "failed: OutOfMemoryError: too large")
    assert "speedup_over" not in row
    assert "not_judged" not in measured(dataclasses.replace(tiny_swiglu(), truth=None))["torch", "forward"]


def test_a_selection():
    rows = measured(tiny_swiglu(), backends=["torch"], directions=["backward"])
    assert rows.keys() == {("torch", "backward")}
    assert rows["torch", "backward"]["speedup_over"] == {}


def test_past_the_time_limit_rows_say_so():
    rows = measured(tiny_swiglu(), deadline=0.0)
    assert {row["status"] for row in rows.values()} == {"cannot run: the time limit of the run was reached"}


def test_rows_are_on_disk_as_soon_as_they_are_there(tmp_path):
    path = tmp_path / "rows.json"
    rows = measured(tiny_swiglu(), path)
    content = json.loads((tmp_path / "rows.json.partial").read_text())
    assert len(content["rows"]) == len(rows)
    assert not content["complete"]
    assert len(list(tmp_path.iterdir())) == 1


def test_only_a_complete_run_replaces_a_complete_one(tmp_path):
    def kept(*, complete):
        record = Record(path, "test", {})
        record.add([{"number": next(numbers)}])
        file = record.close(complete=complete)
        return file.name, json.loads(path.read_text())["rows"][0]["number"]

    path, numbers = tmp_path / "rows.json", iter(range(10))
    assert kept(complete=False) == ("rows.json", 0)
    assert kept(complete=False) == ("rows.json", 1)
    assert kept(complete=True) == ("rows.json", 2)
    assert kept(complete=False) == ("rows.json.partial", 2)
    assert kept(complete=True) == ("rows.json", 4)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]


def test_what_does_not_fit_together_is_timed_alone(monkeypatch):
    real = contest.measure_paired

    def measure_paired(turns, device, **options):
        if len(turns) > 1:
            raise torch.OutOfMemoryError("too much at once")
        return real(turns, device, **options)

    monkeypatch.setattr(contest, "measure_paired", measure_paired)
    rows = measured(tiny_swiglu())
    assert rows["torch", "forward"]["status"] == rows["eager", "backward"]["status"] == "ok"
    assert rows["torch", "forward"]["paired"] is False


def test_memory_that_peers_fill_does_not_fail_ours(monkeypatch):
    """The calls of one are made again when those of the others are gone."""
    real, alive = contest.calls, []

    def calls(candidate, inputs, direction):
        held = type("Calls", (list,), {})(real(candidate, inputs, direction))
        alive[:] = [other for other in alive if other() is not None]
        if alive:
            raise torch.OutOfMemoryError("others hold it")
        alive.append(weakref.ref(held))
        return held

    monkeypatch.setattr(contest, "calls", calls)
    rows = measured(tiny_swiglu())
    assert {rows[name, "forward"]["status"] for name in ("eager", "torch")} == {"ok"}
    assert rows["torch", "forward"]["paired"] is False


def test_a_lost_device_ends_the_run(monkeypatch):
    """Every later row would be worthless."""

    def synchronize(device):
        raise RuntimeError("an illegal memory access was encountered")

    case = tiny_swiglu()

    def fails():
        monkeypatch.setattr(contest, "synchronize", synchronize)
        raise RuntimeError("launch failed")

    with pytest.raises(contest.LostDevice, match="works no more after this: failed: RuntimeError: launch failed"):
        measured(changed(case, torch=fails))


def test_a_mistake_everywhere_is_seen_though_no_error_is_large():
    """In a precision whose roundings are larger than the mistake at any one place."""
    case = swiglu.case(CPU, torch.bfloat16, 256, 64)
    eager = case.candidates["eager"]()
    rows = measured(changed(case, scaled=lambda: lambda x: 0.98 * eager(x)))
    row = rows["scaled", "forward"]
    assert row["correct"] is False
    assert row["error"]["output 0, rms"]["error"] > row["error"]["output 0, rms"]["allowed"]


def test_the_table_groups_what_did_not_run():
    rows = measured(tiny_swiglu())
    lines = table(list(rows.values()))
    assert lines[1] == "swiglu · 6 x 2*8 · float32"
    assert any(line.split()[:2] == ["forward", "torch"] and "yes" in line for line in lines)
    assert f"  torch.compile: cannot run: {COMPILED}" in lines
    assert sum("liger" in line for line in lines) == 1


def test_percentiles():
    timing = harness.Timing.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (timing.p20, timing.ms, timing.p80, timing.runs) == (2.0, 3.0, 5.0, 5)


def test_competitors_take_turns_and_buffers_rotate():
    order = []
    calls = {name: [lambda name=name, i=i: order.append((name, i)) for i in range(2)] for name in "ab"}
    timings = harness.measure_paired(calls, CPU, seconds=0.0)
    assert timings.keys() == {"a", "b"}
    assert {t.runs for t in timings.values()} == {8}
    assert order[-16:] == [(name, i % 2) for turn in range(4) for name in "ab" for i in range(2)]


def test_peak_memory_of_a_call_on_the_cpu():
    peak = harness.peak_mib(lambda: torch.ones(96 * 2**18), CPU)  # more than the C library keeps for later
    if peak is None:
        pytest.skip("this system does not reset the high-water mark of resident memory")
    assert 95 <= peak <= 110


def test_the_hash_is_of_names_and_contents(tmp_path):
    hashes = []
    for name, content in (("a.py", "1"), ("a.py", "2"), ("b.py", "2")):
        folder = tmp_path / str(len(hashes))
        folder.mkdir()
        (folder / name).write_text(content)
        (folder / "notes.txt").write_text("not a kernel")
        hashes.append(environment.kernels_hash(folder))
    assert len(set(hashes)) == 3
