"""Recorded results become tables, documents and pictures that hide nothing; the committed ones are up to date."""

import importlib.util
import json
import shutil

import benchmark_results as invented
import pytest
from benchmark_results import CPU, GPU, KERNELS, row, write, write_all

from benchmarks import plots, recorded, report, tables, targets

needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="drawing needs matplotlib")


def table_line(text, *parts):
    """The only line of a text that holds all parts."""
    (line,) = [line for line in text.splitlines() if all(part in line for part in parts)]
    return line


@pytest.fixture(autouse=True)
def present_kernels(monkeypatch):
    """The invented hash is the present kernels', except in the test of what is committed."""
    monkeypatch.setattr(recorded, "kernels_hash", lambda: KERNELS)


@pytest.fixture
def results(tmp_path):
    """An empty folder of results."""
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


@pytest.fixture
def documents(tmp_path, monkeypatch):
    """The documents of the repository, as copies that a test may change."""
    for name in ("README", "DOCUMENT"):
        copy = tmp_path / getattr(report, name).relative_to(report.ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(getattr(report, name), copy)
        monkeypatch.setattr(report, name, copy)
    monkeypatch.setattr(report, "PICTURES", tmp_path / "docs" / "images" / "performance")
    return report


def text_of(results, tmp_path):
    return report.write_report(results, tmp_path / "out").read_text(encoding="utf-8")


def one_op(results, *rows, slug=CPU, benchmark="rms_norm", **header):
    return write(results, slug, benchmark, rows, **header)


def pair(slug=CPU, **more):
    """A peer's row and ours."""
    peer = row(slug, "rms_norm", "eager")
    return peer, row(slug, "rms_norm", "torch", peers={"eager": peer["ms"]}, **more)


def test_committed_documents_match_committed_results(monkeypatch):
    monkeypatch.undo()
    assert report.main(["--check"]) == 0, "run python -m benchmarks.report"


def test_without_results_everything_is_not_measured(results, tmp_path):
    text = text_of(results / "absent", tmp_path)
    for name in ("H100/H200-class GPU", "CPU"):
        assert text.count(f"**{name}:** not measured") == 1 + len(report.SECTIONS)
    assert all(target.name in text and target.bound in text for target in (*targets.HOPPER, *targets.CPU))
    assert text.count("| not measured |") == len(targets.HOPPER) + len(targets.CPU)
    assert "images/" not in text


def test_a_cpu_alone_leaves_gpus_not_measured(results, tmp_path):
    write_all(results, CPU)
    text = text_of(results, tmp_path)
    assert "**H100/H200-class GPU:** not measured" in text
    assert "**CPU:** not measured" not in text
    assert text.count("| not measured |") == len(targets.HOPPER)
    one_op(results, *pair())
    other = json.loads((results / CPU / "rms_norm.json").read_text())
    other["environment"]["device"] = {"name": "NVIDIA A100", "capability": "8.0"}
    (results / "nvidia-a100").mkdir()
    (results / "nvidia-a100" / "rms_norm.json").write_text(json.dumps(other))
    loaded = recorded.load(results)
    assert [device.slug for device in loaded.devices] == ["nvidia-a100", CPU]
    assert not loaded.of_class(hopper=True)


def test_a_row_in_full(results, tmp_path):
    peer, ours = pair()
    one_op(results, peer, ours | {"ms": 2.0, "p20": 1.9, "p80": 2.25, "peak_mib": -0.3, "speedup_over": {"eager": 1.5}})
    assert "| **torch** | 2 (1.9–2.25) | 10.5 GB/s | 35 % of copy | 1.50× eager | 0 | 1.5 | yes |" in text_of(
        results, tmp_path
    )


@pytest.mark.parametrize("slug", [CPU, GPU])
def test_results_of_other_kernels_are_stale_in_every_table(slug, results, tmp_path):
    write_all(results, slug)
    assert "stale" not in text_of(results, tmp_path).lower()
    for file in sorted((results / slug).glob("*.json")):
        data = json.loads(file.read_text())
        data["environment"]["kernels_sha256"] = "b" * 64
        file.write_text(json.dumps(data))
    lines = text_of(results, tmp_path).splitlines()
    captions = [line for line in lines if line.startswith("**") and " · commit " in line]
    assert len(captions) == len(recorded.BENCHMARKS) + 2  # two tables of the training step, and the summary
    assert all(tables.STALE in line for line in captions)
    assert sum("| **stale** |" in line for line in lines) == len(recorded.BENCHMARKS)  # among the machines
    verdicts = ("| reached |", "| not reached |")
    reached = [line for line in lines if line.endswith(verdicts) and "must reach" not in line]
    assert reached
    assert all("(**stale**)" in line for line in reached)
    assert all(data["stale"] for data in plots.plots(recorded.load(results).devices[0]).values())


def test_an_interrupted_run_says_so(results, tmp_path):
    one_op(results, *pair())
    one_op(results, *pair(), benchmark="swiglu", complete=False)
    text = text_of(results, tmp_path)
    assert tables.INCOMPLETE in table_line(text, " · swiglu · ", "commit")
    assert "incomplete" not in table_line(text, " · rms_norm · ", "commit")
    assert f"{tables.INCOMPLETE} (swiglu)" in text


def test_a_wrong_answer_has_no_speedup(results, tmp_path):
    errors = {"output 0": {"error": 0.3, "allowed": 0.01}, "output 1": {"error": 0.001, "allowed": 0.01}}
    one_op(results, *pair(correct=False, error=errors))
    text = text_of(results, tmp_path)
    assert "**wrong**" in table_line(text, "| **torch** |")
    assert "× eager" not in text.split("## Operations")[1].split("## Decoder")[0]
    assert table_line(text, "Wrong:").endswith(
        "rms_norm, 4096 x 512, forward, torch: errors of output 0 0.3 where 0.01 is allowed"
    )
    device = recorded.load(results).devices[0]
    assert plots.plots(device) == {}
    assert "| **wrong** |" in table_line(text, "| rms_norm |", "| **wrong** |")


def test_an_answer_that_is_not_a_number_is_wrong_and_named(results, tmp_path):
    one_op(results, *pair(correct=False, error={"out": {"error": float("nan"), "allowed": 0.01}}))
    assert "out nan where 0.01 is allowed" in text_of(results, tmp_path)


def test_nothing_is_gained_over_a_peer_that_is_wrong(results, tmp_path):
    peer, ours = pair()
    fast = row(CPU, "rms_norm", "torch.compile", correct=False)
    ours["speedup_over"]["torch.compile"] = 1.3
    one_op(results, peer, fast, ours)
    assert "1.30× torch.compile" not in (text := text_of(results, tmp_path))
    assert table_line(text, "| **torch** |", "| yes |").count("×") == 1
    data = plots.plots(recorded.load(results).devices[0])["peers"]
    assert list(data["groups"][0]["speedups"]) == ["eager"]
    assert data["left_out"] == ["torch.compile in rms_norm forward (wrong)"]


def test_the_fastest_right_row_stands_for_an_op(results):
    peer, ours = pair()
    wrong = row(CPU, "rms_norm", "cpp", correct=False)
    one_op(results, peer, wrong, ours, row(CPU, "rms_norm", "triton", status="cannot run: needs a CUDA device"))
    ((_, case),) = recorded.load(results).devices[0].headlines()
    assert wrong["ms"] < ours["ms"] < peer["ms"]
    assert case.best()["backend"] == "torch"


def test_the_named_trace_and_both_directions_stand_for_an_op(results):
    place = {"shape": "28/4 heads, 128"}
    rows = [
        row(GPU, "symbiotic_attention", "triton", direction=direction, trace=trace, **place)
        for trace in ("diga_23k", "gduf_32k")
        for direction in ("forward", "backward", "both")
    ]
    write(results, GPU, "attention", rows)
    ((_, case),) = recorded.load(results).devices[0].headlines()
    assert (case.label, case.direction) == ("gduf_32k", "both")


def test_one_trace_in_several_shapes_shows_both(results):
    rows = [row(CPU, "rms_norm", "torch", trace="t", shape=shape) for shape in ("8 x 8", "9 x 9")]
    one_op(results, *rows, row(CPU, "rms_norm", "torch", trace="u"))
    (device,) = recorded.load(results).devices
    assert [case.label for case in device.results["rms_norm"].cases()] == ["t, 8 x 8", "t, 9 x 9", "u"]


def test_what_cannot_run_is_listed(results, tmp_path):
    why = {
        "liger": "cannot run: liger-kernel is not installed",
        "triton": "cannot run: backend='triton' cannot run rms_norm: its tensors must be on a CUDA device",
        "cpp": "failed: RuntimeError: CUDA device lost",
    }
    rows = [
        row(CPU, "rms_norm", name, direction=d, status=s) for d in ("forward", "backward") for name, s in why.items()
    ]
    one_op(results, *pair(), *rows)
    text = text_of(results, tmp_path)
    assert "- liger cannot run: liger-kernel is not installed: rms_norm 4096 x 512 (forward, backward)" in text
    assert "- triton cannot run: needs a CUDA device: rms_norm 4096 x 512 (forward, backward)" in text
    assert "- cpp failed: RuntimeError: CUDA device lost: rms_norm" in text
    one_op(results, *rows)
    text = text_of(results, tmp_path)
    assert "No row ran." in text
    assert "| did not run |" in text


def test_targets_judge_the_worst_case(results):
    (target,) = [t for t in targets.HOPPER if t.benchmark == "qk_norm_rope"]
    (device,) = _with_rows(
        results, *(row(GPU, "qk_norm_rope", "triton", direction=d, of=0.9) for d in ("forward", "backward"))
    )
    assert target.outcome(device) == ("0.9 of copy bandwidth", "reached")
    rows = [row(GPU, "qk_norm_rope", "triton", of=of, shape=str(of)) for of in (0.9, 0.8)]
    (device,) = _with_rows(results, *rows)
    assert target.outcome(device) == ("0.8–0.9 of copy bandwidth", "not reached")
    (device,) = _with_rows(results, *rows, row(GPU, "qk_norm_rope", "triton", shape="s", correct=False))
    assert target.outcome(device) == ("**wrong**", "not reached")
    (device,) = _with_rows(results, row(GPU, "qk_norm_rope", "triton", status="failed: out of memory"))
    assert target.outcome(device) == ("did not run", "")
    (device,) = _with_rows(results, row(GPU, "qk_norm_rope", "eager"))
    assert target.outcome(device) == ("not measured", "")


def _with_rows(results, *rows):
    write(results, GPU, "qk_norm_rope", rows)
    return recorded.load(results).devices


def test_every_target_can_be_met(results):
    write_all(results, GPU)
    write_all(results, CPU)
    place = {"trace": "gduf_32k", "ours": True, "of": 0.9, "speedup_over": {"flex": 9.0}}
    named = [
        row(GPU, "symbiotic_attention", name, direction=direction, **place)
        for name in ("triton", "triton_atomic", "cuda", "cuda_atomic")
        for direction in ("forward", "backward", "both")
    ]
    write(results, GPU, "attention", named)
    gpu, cpu = recorded.load(results).devices
    for target, device in [*((t, gpu) for t in targets.HOPPER), *((t, cpu) for t in targets.CPU)]:
        reached, verdict = target.outcome(device)
        assert verdict in ("reached", "not reached"), target
        assert reached[0].isdigit(), target


def test_training_steps(results, tmp_path):
    write_all(results, CPU)
    text = text_of(results, tmp_path)
    own = "| **torch** | 1,000 (990–1,020) | 32,000 | 55 % | 48 % | 2.10× published | 16,000 | 1.5 | yes |"
    assert text.count(own) == 2  # both stages at the quickstart's width
    shares = text.split("## Where the time goes")[1]
    assert "| attention | linear layers | norms | optimizer | other |" in shares
    assert "| 41 % | 35 % | 6.0 % | 5.0 % | 13 % |" in shares
    summary = text.split("## Targets")[0]
    assert "hidden 512, 4 layers" in summary
    assert "quickstart width" not in summary


def test_scaling(results, tmp_path):
    rows = [row(CPU, "symbiotic_attention", "torch", sweep="tokens", x=x) for x in (1024, 2048, 4096)]
    for made, ms in zip(rows, (1.0, 2.0, 3.0), strict=True):
        made |= {"ms": ms, "flops": 1e9}
    rows[2]["correct"] = False
    write(results, CPU, "scaling", rows)
    text = text_of(results, tmp_path)
    assert "| tokens 1,024 | tokens 2,048 | tokens 4,096 | max/min |" in text
    assert "| **torch** | 1 | 2 | **wrong** | 2.00 |" in text
    data = plots.plots(recorded.load(results).devices[0])["scaling"]
    assert data["panels"][0]["lines"][0]["points"] == [[1024, 1.0], [2048, 2.0]]
    assert data["left_out"] == ["symbiotic_attention forward, torch at 1 of 3 points of tokens (wrong)"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 1}, "its schema is 1; it must be 2"),
        ({"rows": [{"op": "rms_norm"}]}, "its row 0 lacks trace, shape, dtype"),
        ({"benchmark": "swiglu"}, "its benchmark is 'swiglu'; the file's name says 'rms_norm'"),
        ({"ceilings": None}, "its 'ceilings' must be a dict"),
        ({"environment": {}}, "its environment names no device"),
    ],
)
def test_files_that_cannot_be_read_are_named(change, message, results, tmp_path):
    path = one_op(results, *pair())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    one_op(results, *pair(), benchmark="swiglu")
    text = text_of(results, tmp_path)
    assert f"**Unreadable:** `{CPU}/rms_norm.json`: {message}" in text
    assert " · swiglu · commit" in text
    path.write_text("{")
    assert "rms_norm.json`: it is no JSON" in text_of(results, tmp_path)


def test_cells_cannot_break_a_table():
    assert tables.text("a|b\n<c> 2*3") == r"a\|b \<c> 2\*3"
    assert tables.table(("a", ">b", "c"), [("1", "2", ""), ("", "3", "")]) == [
        "| a | b |",
        "|---|--:|",
        "| 1 | 2 |",
        "|  | 3 |",
    ]


def test_a_report_without_matplotlib(results, tmp_path, monkeypatch):
    write_all(results, CPU)
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    text = text_of(results, tmp_path)
    assert "Plots need matplotlib" in text
    assert "images/" not in text
    assert "| **cpp** |" in text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.md"]


def test_marks_must_stand_once_and_in_order():
    for broken in ("", "<!-- a:end --><!-- a:begin -->", "<!-- a:begin --><!-- a:end --><!-- a:end -->"):
        with pytest.raises(ValueError, match="must hold <!-- a:begin --> and then"):
            report.with_section(broken, "a", "text", "x.md")


@needs_matplotlib
def test_a_report_holds_its_pictures(results, tmp_path, capsys):
    for slug in (GPU, CPU):
        write_all(results, slug)
    assert report.main(["--results", str(results), "--out", str(tmp_path / "out")]) == 0
    file = tmp_path / "out" / "report.md"
    assert capsys.readouterr().out.strip() == str(file)
    linked = {line.split("](")[1].rstrip(")") for line in file.read_text().splitlines() if line.startswith("![")}
    assert linked == {f"images/{slug}-{plot}.png" for slug in (GPU, CPU) for plot in ("roofline", "peers", "scaling")}
    for link in linked:
        assert 5_000 < (tmp_path / "out" / link).stat().st_size < 150_000


@needs_matplotlib
def test_check_finds_what_was_changed(results, documents, capsys):
    write_all(results, CPU)
    options = ["--results", str(results)]
    assert documents.main(options) == 0
    assert documents.main([*options, "--check"]) == 0
    pictures = sorted(documents.PICTURES.iterdir())
    assert len(pictures) == 3
    for file, wanted in (
        (documents.README, "README.md: the section 'performance'"),
        (documents.DOCUMENT, "'performance:ops'"),
    ):
        honest = file.read_text(encoding="utf-8")
        file.write_text(honest.replace("4.67× eager, 1.40×", "4.68× eager, 1.40×", 1), encoding="utf-8")
        _check_says(documents, options, wanted, capsys)
        file.write_text(honest, encoding="utf-8")
    honest = pictures[0].read_bytes()
    pictures[0].write_bytes(pictures[1].read_bytes())
    _check_says(documents, options, f"{pictures[0].name}: the picture was drawn from other data", capsys)
    pictures[0].unlink()
    _check_says(documents, options, f"{pictures[0].name}: the picture is missing", capsys)
    pictures[0].write_bytes(honest)
    stray = documents.PICTURES / "other.png"
    stray.write_bytes(honest)
    _check_says(documents, options, "other.png: the picture belongs to no result", capsys)
    assert documents.main(options) == 0
    assert not stray.exists()
    assert documents.main([*options, "--check"]) == 0


@needs_matplotlib
def test_check_finds_results_that_changed(results, documents, capsys):
    write_all(results, CPU)
    options = ["--results", str(results)]
    assert documents.main(options) == 0
    rows = list(invented.op_rows(CPU, "rms_norm"))
    for made in rows:
        made["speedup_over"] = {"eager": 7.77}
    write(results, CPU, "rms_norm", rows)
    documents.main([*options, "--check"])
    said = capsys.readouterr().err
    assert "README.md" in said
    assert f"{CPU}-peers.png: the picture was drawn from other data" in said
    assert f"{CPU}-scaling.png" not in said


def _check_says(documents, options, wanted, capsys):
    capsys.readouterr()
    assert documents.main([*options, "--check"]) == 1
    said = capsys.readouterr().err
    assert wanted in said
    assert "run python -m benchmarks.report" in said
    assert len(said.splitlines()) == 2


def test_check_takes_no_out(tmp_path):
    with pytest.raises(SystemExit):
        report.main(["--check", "--out", str(tmp_path)])


def test_files_without_a_fingerprint(tmp_path):
    file = tmp_path / "x.png"
    for content in (b"", b"no picture", plots.PNG, plots.PNG + b"\0\0\0\0IEND\0\0\0\0"):
        file.write_bytes(content)
        assert plots.fingerprint_of(file) is None
