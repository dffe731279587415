"""What a step achieved: the numbers of a row, of several processes together, of an interval, and what is shown."""

import dataclasses
import json
from types import SimpleNamespace

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


def test_encoding_is_told_apart_from_the_wait():
    measured = Meter(stage_of("gduf"), CPU).measure([gduf_batch()], 2.0, 0.5, 0.25)
    assert (measured["seconds"], measured["data_seconds"], measured["encode_seconds"]) == (2.0, 0.5, 0.25)


def test_memory_is_the_step_s(monkeypatch):
    calls = []
    peaks = {"allocated_bytes.all.peak": 3 * 2**30, "reserved_bytes.all.peak": 2**32, "allocated_bytes.all.current": 5}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: calls.append(("read", device)) or peaks)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(("reset", device)))
    device = torch.device("cuda:1")
    meter = Meter(stage_of("gduf"), device, peak_tflops=2.0)
    meter.begin()
    measured = meter.measure([gduf_batch()], 1.0, 0.0)
    assert (measured["memory_gib"], measured["memory_reserved_gib"], measured["peak_tflops"]) == (3.0, 4.0, 2.0)
    assert calls == [("reset", device), ("read", device)]


def test_looks_and_checkpoints_lie_between_two_measurements(monkeypatch, tmp_path):
    """So a row's memory is its step's, batches and all."""
    calls = []

    def tell(name):
        return lambda *_: calls.append(name)

    class Watched(Batches):
        def __iter__(self):
            for batch in super().__iter__():
                calls.append("batch")
                yield batch

    config = TrainConfig(total_steps=2, accumulate=2, save_every=1, output=str(tmp_path))
    made = Trainer(make_stage(tiny_model(), config), Watched(), config, watch=tell("look"), quiet=True)
    measure = made._meter.measure
    monkeypatch.setattr(made._meter, "begin", tell("begin"))
    monkeypatch.setattr(made._meter, "measure", lambda *values: calls.append("measure") or measure(*values))
    monkeypatch.setattr(made, "save", tell("save"))
    made.run()
    assert calls == ["look", *["begin", "batch", "batch", "measure", "save", "look"] * 2]


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
    slower = [ONE | {"encode_seconds": 0.25}, OTHER | {"encode_seconds": 0.5}]
    assert combine(slower) == combine([ONE, OTHER]) | {"encode_seconds": 0.5}
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


class Encoded(Batches):
    """Batches that take 1 s to come on the clock of the test, of which a quarter is encoding."""

    def __init__(self, clock, encode):
        super().__init__()
        self.clock, self.encode_seconds = clock, 3.0 if encode else None

    def __iter__(self):
        for batch in super().__iter__():
            self.clock[0] += 1.0
            if self.encode_seconds is not None:
                self.encode_seconds += 0.25
            yield batch


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("encode", [False, True])
def test_seconds_of_a_step(accumulate, encode, monkeypatch):
    """The wait and the encoding add up, with the step's own time, to its seconds."""
    clock = [100.0]
    config = TrainConfig(total_steps=3, accumulate=accumulate)
    made = Trainer(make_stage(tiny_model(), config), Encoded(clock, encode), config, quiet=True)
    monkeypatch.setattr("unigendet.training.trainer.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    made.state.optimizer.register_step_post_hook(lambda *_: clock.__setitem__(0, clock[0] + 2.0))
    for row in made.run().history:
        if encode:
            assert (row["data_seconds"], row["encode_seconds"]) == (0.75 * accumulate, 0.25 * accumulate)
        else:
            assert row["data_seconds"] == accumulate
            assert "encode_seconds" not in row
        assert row["seconds"] == 2.0 + accumulate
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / (2.0 + accumulate))


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
