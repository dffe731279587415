"""``unigendet bench``: what it runs, what it keeps, and what became slower."""

import os
import signal
import time

import pytest
import torch
from unigendet.benchmarks import compare, contest, environment, harness, suite
from unigendet.benchmarks.record import KEYS, SCHEMA, read_json, write_json

from unigendet.cli import main

CPU = torch.device("cpu")


def tiny(**changes):
    return suite.Settings(CPU, **{"size": "tiny", "ops": ["swiglu", "flow_matching"], "quiet": True} | changes)


def test_a_run_keeps_a_file_for_each_benchmark(tmp_path):
    outcome = suite.run(tiny(out=tmp_path))
    folder = tmp_path / environment.device_slug(environment.device_name(CPU))
    assert {file.name for file in folder.iterdir()} == {"swiglu.json", "flow_matching.json"}
    content = read_json(folder / "swiglu.json")
    assert content["schema"] == SCHEMA
    assert content["complete"]
    assert content["environment"]["versions"]["torch"] == torch.__version__
    assert content["environment"]["kernels_sha256"] == environment.kernels_hash()
    assert content["ceilings"].keys() == {"matmul_tflops", "copy_gbs"}
    assert content["settings"]["selection"] == {"ops": ["flow_matching", "swiglu"]}
    assert [{"benchmark": "swiglu", **row} for row in content["rows"]] == [
        row for row in outcome.rows if row["benchmark"] == "swiglu"
    ]
    assert len({(row["benchmark"], *(row.get(key) for key in KEYS)) for row in outcome.rows}) == len(outcome.rows)
    assert not outcome.failures


def test_names_of_ops_and_benchmarks_select():
    titles = lambda **changes: [c.op for own in suite.find_cases(tiny(**changes)).values() for c in own]  # noqa: E731
    assert titles(ops=["flow_matching_loss"]) == ["flow_matching_loss"]
    assert titles(ops=["flow_matching"]) == ["flow_matching", "flow_matching_loss"]
    assert titles(ops=None, traces=["tiny"], directions=["step"]) == ["gduf_step"]
    layers = {"decoder_layer", "gduf_step", "diga_step"}  # they name what attention takes by default on this machine
    kernels = {"symbiotic_attention", "qk_norm_rope", "rms_norm", "swiglu", "alignment_loss"}
    assert set(titles(ops=None, backends=["cpp"])) - layers == kernels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ops": ["swigloo"]}, "--op is 'swigloo'; here it must be one of .*swiglu"),
        ({"traces": ["gduf_99k"]}, "--trace is 'gduf_99k'"),
        ({"backends": ["cuba"]}, "--backend is 'cuba'"),
        ({"directions": ["sideways"]}, "--direction is 'sideways'"),
        ({"backends": ["flash"]}, "fits all of --op, --trace, --backend and --direction"),
    ],
)
def test_a_selection_of_nothing(changes, message):
    with pytest.raises(ValueError, match=message):
        suite.run(tiny(**changes))


def test_compilers_are_left_out_of_short_runs_unless_asked_for():
    assert "torch.compile" in suite._left_out(tiny())
    assert "torch.compile" not in suite._left_out(tiny(backends=["torch.compile"]))
    assert suite._left_out(tiny(size="full")) == {}


def test_ctrl_c_keeps_what_is_done(tmp_path, monkeypatch):
    real = contest.Case.run

    def run(self, run):
        if self.op == "flow_matching_loss":
            raise KeyboardInterrupt
        real(self, run)

    monkeypatch.setattr(contest.Case, "run", run)
    outcome = suite.run(tiny(out=tmp_path))
    assert outcome.interrupted
    assert {row["op"] for row in outcome.rows} == {"swiglu", "flow_matching"}
    files = {file.stem: read_json(file) for file in tmp_path.rglob("*.json")}
    assert {name: content["complete"] for name, content in files.items()} == {"swiglu": True, "flow_matching": False}
    assert len(files["flow_matching"]["rows"]) > 0
    assert suite.bench(tiny(out=tmp_path)) == 130


def test_sigterm_keeps_what_is_done_too(tmp_path, monkeypatch):
    def run(self, run):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(contest.Case, "run", run)
    outcome = suite.run(tiny(out=tmp_path))
    assert outcome.interrupted
    assert outcome.rows == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_places_that_cannot_be_written_to_are_found_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "run", lambda settings: pytest.fail("minutes are spent"))
    (tmp_path / "file").write_text("")
    for settings, options, name in (
        (tiny(out=tmp_path / "file" / "below"), {}, "--out"),
        (tiny(), {"json": tmp_path / "file" / "all.json"}, "--json"),
    ):
        with pytest.raises(ValueError, match=f"{name} is .*file.* must be a folder that can be written to"):
            suite.bench(settings, **options)


def test_a_case_that_cannot_be_set_up_is_a_failure(monkeypatch):
    def run(self, run):
        raise RuntimeError("no memory for inputs")

    monkeypatch.setattr(contest.Case, "run", run)
    outcome = suite.run(tiny(ops=["swiglu"]))
    assert [row["status"] for row in outcome.failures] == ["failed: RuntimeError: no memory for inputs"]


def test_the_command(tmp_path, monkeypatch, capsys):
    """It prints tables, writes everything it says, and compares with what it wrote."""
    monkeypatch.setattr(suite, "QUICK_SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)
    selection = ["bench", "--quick", "--op", "flow_matching_loss", "--device", "cpu"]
    assert main([*selection, "--json", "all.json"]) == 0
    out = capsys.readouterr().out
    assert "measured ceilings: " in out
    assert "flow_matching_loss · 4096 x 64 · float32" in out
    assert "torch.compile: cannot run: left out of a quick run" in out
    page = tmp_path / "unigendet-bench" / "report.md"
    assert f"The report: {page.relative_to(tmp_path)}" in out
    assert "flow_matching_loss" in page.read_text(encoding="utf-8")
    assert list((tmp_path / "unigendet-bench").rglob("*.png"))

    slow = read_json(tmp_path / "all.json")
    for row in slow["rows"]:
        if row["ours"] and row["status"] == "ok":
            row |= {name: row[name] / 1e3 for name in ("ms", "p20", "p80")}
    for file in (tmp_path / "unigendet-bench").rglob("*.json"):  # the run compares with what was there before it
        write_json(file, {**slow, "benchmark": file.stem})
    assert main([*selection, "--compare", "unigendet-bench"]) == 1
    out = capsys.readouterr().out
    assert "rows of ours in both runs" in out
    assert "slower  flow_matching_loss · 4096 x 64 · float32 · forward · torch" in out


def test_the_list(capsys):
    assert main(["bench", "--list", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "symbiotic_attention gduf_4k 8/2 heads of 64 float32: forward, backward, both" in out
    assert "sdpa_dense_mask" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seconds", "0"], "--seconds is 0.0; it must be a positive number of seconds"),
        (["--device", "cuda:99"], "device is 'cuda:99'"),
        (["--op", "nothing"], "--op is 'nothing'"),
        (["--json", "."], "--json is ., a folder; it must be a file"),
        (["--compare", "absent.json"], "no results to compare with at absent.json"),
        (["--record", "--quick"], "--record keeps whole benchmarks"),
        (["--record", "--op", "flow_matching_loss"], "--op must name benchmarks"),
    ],
)
def test_mistakes_are_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not list(tmp_path.iterdir())


def test_recording(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(environment, "RESULTS", tmp_path)
    full = tiny(ops=["flow_matching"], out=tmp_path / "elsewhere", size="full", seconds=0.01)
    monkeypatch.setattr(suite, "_left_out", lambda settings: dict.fromkeys(suite.COMPILES, "tests do not compile"))
    assert suite.bench(full, record=True) == 0
    assert "python -m benchmarks.report" in capsys.readouterr().out
    assert [file.name for file in tmp_path.rglob("*.json")] == ["flow_matching.json"]
    monkeypatch.setattr(environment, "is_checkout", lambda: False)
    with pytest.raises(ValueError, match="--record needs a checkout"):
        suite.bench(full, record=True)


def test_recorded_files_hold_whole_benchmarks():
    """A layer is also an op of the sweeps, of which a file must not hold the layers alone."""
    assert suite.find_cases(tiny(ops=["decoder_layer"])).keys() == {"decoder_layer", "scaling"}
    assert suite.find_cases(tiny(ops=["decoder_layer"], whole=True)).keys() == {"decoder_layer"}
    everything, whole = (suite.find_cases(tiny(ops=ops, whole=True)) for ops in (None, ["scaling"]))
    assert [case.title for case in whole["scaling"]] == [case.title for case in everything["scaling"]]


def row(backend, ms, *, ours=True, spread=0.02, **changes):
    common = {"benchmark": "swiglu", "op": "swiglu", "trace": None, "shape": "4 x 4", "dtype": "float32"}
    timing = {"ms": ms, "p20": ms * (1 - spread), "p80": ms * (1 + spread), "status": "ok", "correct": True}
    return common | {"direction": "forward", "backend": backend, "ours": ours} | timing | changes


def kinds(old, new):
    return [str(d).split()[0] for d in compare.differences(compare.keyed(old), compare.keyed(new))]


def test_only_differences_beyond_the_noise_count():
    assert kinds([row("torch", 1.0)], [row("torch", 1.2)]) == ["slower"]
    assert kinds([row("torch", 1.2)], [row("torch", 1.0)]) == ["faster"]
    assert kinds([row("torch", 1.0)], [row("torch", 1.04, spread=0.001)]) == []  # too little
    assert kinds([row("torch", 1.0, spread=0.3)], [row("torch", 1.2)]) == []  # the old run was as noisy
    assert kinds([row("torch", 1.0)], [row("torch", 1.2, direction="backward")]) == []  # another row
    assert kinds([row("eager", 1.0, ours=False)], [row("eager", 2.0, ours=False)]) == []  # not ours


def test_peers_tell_how_the_machine_drifted():
    old = [row("torch", 1.0), row("eager", 4.0, ours=False)]
    assert kinds(old, [row("torch", 1.5), row("eager", 6.0, ours=False)]) == []
    assert kinds(old, [row("torch", 1.0), row("eager", 2.0, ours=False)]) == ["slower"]
    found = compare.differences(compare.keyed(old), compare.keyed([row("torch", 3.0), row("eager", 6.0, ours=False)]))
    assert (found[0].factor, found[0].drift) == (pytest.approx(2.0), pytest.approx(1.5))
    assert "2.00 x the old time (1.00 -> 3.00 ms, peers 1.50 x)" in str(found[0])


def test_what_broke_comes_first():
    old = [row("torch", 1.0), row("cpp", 1.0), row("triton", 1.0), row("flash", 1.2)]
    new = [
        row("torch", 2.0),
        row("cpp", 1.0, correct=False),
        {**row("triton", 1.0), "status": "failed: RuntimeError: x"},
        row("flash", 1.0),
    ]
    found = compare.differences(compare.keyed(old), compare.keyed(new))
    assert {d.kind for d in found[:2]} == {"wrong", "broken"}
    assert [d.kind for d in found[2:]] == ["slower", "faster"]
    assert [d.is_regression for d in found] == [True, True, True, False]


def test_results_to_compare_with(tmp_path):
    header = {"schema": SCHEMA, "benchmark": "swiglu", "environment": {"device": {"name": "one"}}, "rows": []}
    write_json(tmp_path / "a" / "swiglu.json", header | {"rows": [row("torch", 1.0)]})
    device, rows = compare.read_results(tmp_path)
    assert (device, len(rows)) == ("one", 1)
    write_json(tmp_path / "b" / "swiglu.json", header | {"environment": {"device": {"name": "two"}}})
    with pytest.raises(ValueError, match="holds one; two: it must hold results of one machine"):
        compare.read_results(tmp_path)
    (tmp_path / "c.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"c\.json is no file of benchmark results"):
        compare.read_results(tmp_path / "c.json")
    write_json(tmp_path / "d.json", header | {"schema": 1})
    with pytest.raises(ValueError, match="has schema 1; it must be 2"):
        compare.read_results(tmp_path / "d.json")
    with pytest.raises(ValueError, match=r"--compare .* was measured on one; it must be this machine: .*CPU threads"):
        suite.read_comparable(tmp_path / "a", tiny())
    here = suite.run(tiny(limit=1e-9)).content
    write_json(tmp_path / "e.json", here)
    assert suite.read_comparable(tmp_path / "e.json", tiny()).keys() == compare.keyed(here["rows"]).keys()
    fewer = here | {"settings": here["settings"] | {"threads": here["settings"]["threads"] + 1}}
    write_json(tmp_path / "e.json", fewer)
    with pytest.raises(ValueError, match="it must be this machine"):
        suite.read_comparable(tmp_path / "e.json", tiny())


def test_past_the_limit_a_run_is_incomplete_and_says_so(tmp_path):
    outcome = suite.run(tiny(out=tmp_path, limit=1e-9))
    assert {row["status"] for row in outcome.rows} == {"cannot run: the time limit of the run was reached"}
    assert not outcome.content["complete"]
    assert not any(read_json(file)["complete"] for file in tmp_path.rglob("*.json"))
    missing = [{**row("torch", 1.0), "status": "cannot run: the time limit of the run was reached"}]
    assert kinds([row("torch", 1.0)], missing) == []


def test_a_lost_device_is_a_failure(monkeypatch):
    def run(self, run):
        raise contest.LostDevice("the device works no more")

    monkeypatch.setattr(contest.Case, "run", run)
    outcome = suite.run(tiny())
    assert [row["status"] for row in outcome.failures] == ["failed: LostDevice: the device works no more"]
    assert not outcome.content["complete"]


@pytest.mark.gpu
def test_everything_runs_on_a_gpu():
    outcome = suite.run(suite.Settings(torch.device("cuda"), size="tiny", quiet=True))
    ran = [row for row in outcome.rows if row["ours"] and row["status"] == "ok"]
    assert {"attention", "alignment_loss", "decoder_layer", "training_step", "scaling"} <= {r["benchmark"] for r in ran}
    assert not outcome.failures
    assert harness.ceilings(torch.device("cuda"), tiny=True)["copy_gbs"] > 0
