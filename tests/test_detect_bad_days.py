"""``unigendet detect`` when a batch fails, memory ends, somebody interrupts, or nobody reads on."""

import json
import subprocess
import sys

import torch
from command_runs import read_rows, run_command, tiny_pipeline

from unigendet.inference import pipeline as pipeline_module


def broken_at(monkeypatch, call, error):
    """The model fails in its ``call``-th batch."""
    inner, calls = pipeline_module.detect_packed, []

    def judge(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise error
        return inner(*arguments, **options)

    monkeypatch.setattr(pipeline_module, "detect_packed", judge)


def test_a_batch_that_fails_is_named(detect, pictures, monkeypatch):
    broken_at(monkeypatch, 2, torch.OutOfMemoryError("CUDA out of memory"))
    result = detect(pictures, "--batch-size", 2, "--format", "jsonl")
    assert result.code == 1
    assert [json.loads(line)["path"] for line in result.lines] == [str(pictures / n) for n in ("a.JPG", "b.png")]
    assert result.err == (
        "unigendet detect: 2 of 3 rows were written\n"
        f"unigendet detect: OutOfMemoryError: CUDA out of memory (while judging {pictures / 'more/c.webp'}; "
        "a smaller batch_size takes less memory)\n"
    )


def test_no_memory_at_all(detect, pictures, monkeypatch):
    broken_at(monkeypatch, 1, MemoryError())
    result = detect(pictures / "b.png")
    assert (result.code, result.out) == (1, "")
    assert result.err == (
        f"unigendet detect: not enough memory (while judging {pictures / 'b.png'}; a smaller batch_size takes less "
        "memory)\n"
    )


def test_an_interrupted_run_keeps_its_rows(detect, pictures, tmp_path, monkeypatch):
    broken_at(monkeypatch, 2, KeyboardInterrupt())
    out = tmp_path / "rows.csv"
    result = detect(pictures, "--batch-size", 2, "--out", out)
    assert result.code == 130
    assert result.err == f"unigendet detect: 2 of 3 rows were written, in {out}\nunigendet detect: interrupted\n"
    assert len(read_rows(out.read_text(), "csv")) == 2


def test_logits_that_are_not_finite(capsys, tmp_path, pictures):
    pipeline = tiny_pipeline()
    torch.nn.init.constant_(pipeline.model.class_head[-1].bias, torch.inf)
    pipeline.save(tmp_path / "m")
    result = run_command(capsys, "detect", "--model", tmp_path / "m", pictures / "b.png", "--max-tokens", 0, "--format",
                         "jsonl")  # fmt: skip
    (row,) = read_rows(result.out, "jsonl")
    assert (result.code, row["verdict"]) == (1, "error")
    assert "b.png: the real/fake head's logits are not finite" in row["error"]


def test_a_reader_that_has_seen_enough(model_folder, pictures):
    command = [sys.executable, "-m", "unigendet", "detect", "--model", model_folder, pictures, "--max-tokens", "0",
               "--batch-size", "1"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
