"""What a step achieved: the numbers of a row, of several processes together, of an interval, and what is shown."""

import dataclasses
import json

import pytest
import torch
from training_fixtures import Batches, diga_batch, gduf_batch, tiny_config, tiny_model

from unigendet.model.flops import diga_step, gduf_step
from unigendet.training.config import LossWeights, TrainConfig
from unigendet.training.metrics import describe, mean_row
from unigendet.training.stages import make_stage
from unigendet.training.throughput import Meter, combine
from unigendet.training.trainer import Trainer

CPU = torch.device("cpu")


def stage_of(stage, **settings):
    return make_stage(tiny_model(), TrainConfig(stage=stage, align_layer=2, teacher_layer=3, **settings))


def test_what_a_process_did():
    """Operations and sizes are those of all packs of the step; nothing is said of a peak that is not known."""
    batches = [gduf_batch(1), gduf_batch(2, detections=3)]
    measured = Meter(stage_of("gduf"), CPU).measure(batches, 2.0, 0.5)
    assert measured == {
        "tokens": sum(batch.layout.num_queries for batch in batches),
        "samples": 9,
        "flops": sum(gduf_step(tiny_config(), batch).total for batch in batches),
        "seconds": 2.0,
        "data_seconds": 0.5,
    }
    assert json.loads(json.dumps(measured)) == measured


def test_operations_of_diga():
    """The teacher counts while the alignment has a weight; tokens and samples are the student's."""
    pack, teacher_pack = batch = diga_batch(3)
    weights = LossWeights(diga_schedule="linear", diga_until=0.5)
    stage = stage_of("diga", losses=weights)
    whole = diga_step(tiny_config(), pack, teacher_pack, align_layer=2, teacher_layer=3).total
    alone = diga_step(tiny_config(), pack, None, teacher_layer=3).total
    assert whole > alone > 0
    for progress, expected in ((0.0, whole), (0.49, whole), (0.5, alone), (0.9, alone)):
        stage.progress = progress
        measured = Meter(stage, CPU).measure([batch], 1.0, 0.0)
        assert measured["flops"] == expected
        assert (measured["tokens"], measured["samples"]) == (pack.layout.num_queries, 2)


def test_memory_since_the_last_row(monkeypatch):
    calls = []
    peaks = {"allocated_bytes.all.peak": 3 * 2**30, "reserved_bytes.all.peak": 2**32, "allocated_bytes.all.current": 5}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: calls.append(("read", device)) or peaks)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(("reset", device)))
    device = torch.device("cuda:1")
    measured = Meter(stage_of("gduf"), device, peak_tflops=2.0).measure([gduf_batch()], 1.0, 0.0)
    assert (measured["memory_gib"], measured["memory_reserved_gib"], measured["peak_tflops"]) == (3.0, 4.0, 2.0)
    assert calls == [("read", device), ("reset", device)]


ONE = {"tokens": 100, "samples": 3, "flops": 4 * 10**12, "seconds": 2.0, "data_seconds": 0.5, "peak_tflops": 10.0}
OTHER = ONE | {"tokens": 60, "samples": 2, "flops": 6 * 10**12, "seconds": 1.5, "data_seconds": 0.75}
MEMORY = {"memory_gib": 30.0, "memory_reserved_gib": 40.0}


def test_row_of_one_process():
    assert combine([ONE | MEMORY]) == {
        "tokens": 100,
        "samples": 3,
        "seconds": 2.0,
        "data_seconds": 0.5,
        "tokens_per_second": 50.0,
        "samples_per_second": 1.5,
        "model_tflops_per_second": 2.0,
        "mfu": 0.2,
        **MEMORY,
    }


def test_row_of_several_processes():
    """Sums, the slowest one's time, and the mean share, of the time that all of them took."""
    less = {"memory_gib": 31.0, "memory_reserved_gib": 33.0}
    assert combine([ONE | MEMORY, OTHER | less]) == {
        "tokens": 160,
        "samples": 5,
        "seconds": 2.0,
        "data_seconds": 0.75,
        "tokens_per_second": 80.0,
        "samples_per_second": 2.5,
        "model_tflops_per_second": 5.0,
        "mfu": pytest.approx((0.2 + 0.3) / 2),
        "memory_gib": 31.0,
        "memory_reserved_gib": 40.0,
    }
    unknown = {name: value for name, value in OTHER.items() if name != "peak_tflops"}
    row = combine([ONE | MEMORY, unknown])
    assert not row.keys() & {"mfu", *MEMORY}


def test_mean_of_an_interval():
    """Rates are those of the whole time, memory the most; a row of an older run may lack some."""
    rows = [combine([ONE | MEMORY]), combine([OTHER | {"memory_gib": 35.0, "memory_reserved_gib": 36.0}])]
    rows = [{"step": i, "loss": 1.0, **row} for i, row in enumerate(rows, 1)]
    mean = mean_row([{"step": 0, "loss": 4.0, "tokens": 5, "seconds": 0.5, "tokens_per_second": 10.0}, *rows])
    assert mean == {
        "step": 2,
        "loss": 2.0,
        "tokens": 165,
        "samples": 5,
        "seconds": pytest.approx(4 / 3),
        "data_seconds": 0.625,
        "tokens_per_second": pytest.approx(165 / 4),
        "samples_per_second": pytest.approx(5 / 3.5),
        "model_tflops_per_second": pytest.approx(10 / 3.5),
        "mfu": pytest.approx(1 / 3.5),
        "memory_gib": 35.0,
        "memory_reserved_gib": 40.0,
    }


def test_the_progress_line():
    row = {"step": 1, "loss": 1.0, "ce": 0.25, "grad_norm": 3.0, "lr": 1e-3}
    assert describe(row | combine([ONE | MEMORY])) == "loss 1.0000  ce 0.2500  50 tokens/s  20.0% MFU  30.0 GiB"
    alone = {name: value for name, value in ONE.items() if name != "peak_tflops"}
    assert describe(row | combine([alone])) == "loss 1.0000  ce 0.2500  50 tokens/s"


def test_rows_of_a_run():
    """On a CPU, whose peak nobody knows, the share is there when the settings say the peak."""
    config = TrainConfig(total_steps=2)
    for peak in (None, 0.5):
        made = dataclasses.replace(config, peak_tflops=peak)
        history = Trainer(make_stage(tiny_model(), made), Batches(), made, quiet=True).run().history
        for number, row in enumerate(history, 1):
            flops = gduf_step(tiny_config(), gduf_batch(number)).total
            assert row["model_tflops_per_second"] == pytest.approx(flops / row["seconds"] / 1e12)
            assert row["samples_per_second"] == pytest.approx(4 / row["seconds"])
            assert row["samples"] == 4
            assert row.get("mfu") == (peak and pytest.approx(row["model_tflops_per_second"] / peak))
    with pytest.raises(ValueError, match=r"peak_tflops is 0; it must be positive, or null"):
        TrainConfig(peak_tflops=0)
