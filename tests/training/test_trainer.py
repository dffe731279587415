import dataclasses
import io
import json
import math
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from training_fixtures import Batches, Samples, diga_batch, gduf_batch, tiny_config, tiny_model

from unigendet.packing import pack
from unigendet.training.config import LossWeights, OptimizerConfig, TrainConfig
from unigendet.training.metrics import AROUND, TIMING, MetricsWriter, mean_row, read_history
from unigendet.training.stages import make_stage
from unigendet.training.trainer import Trainer, TrainingError, learning_rate

CONFIG = TrainConfig(total_steps=4, align_layer=2, teacher_layer=3, optimizer=OptimizerConfig(lr=1e-3))


def trainer(batches=None, model=None, console=None, **settings):
    config = dataclasses.replace(CONFIG, **settings)
    make = diga_batch if config.stage == "diga" else gduf_batch
    stage = make_stage(model or tiny_model(), config)
    return Trainer(stage, batches or Batches(make), config, console=console, quiet=console is None)


def numbers(history):
    """The history without what the clock says."""
    return [{name: value for name, value in row.items() if name not in TIMING} for row in history]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("stage", "terms"), [("gduf", {"mse", "ce", "label"}), ("diga", {"mse", "diga"})])
def test_losses_reach_the_optimizer_and_the_history(stage, terms):
    """docs/model.md §12.1: every term that the stage returns is in the optimised loss and recorded under its name."""
    made = trainer(stage=stage)
    before = weights(made.stage.model)
    history = made.run().history
    w = LossWeights()
    for row in history:
        assert terms == row.keys() - {"loss", *AROUND}
        assert row["loss"] == pytest.approx(sum(getattr(w, name) * row[name] for name in terms), rel=1e-5)
    after = weights(made.stage.model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == made.stage.trained.keys()


@pytest.mark.parametrize("total", [1, 3])
def test_total_steps_are_exact(total):
    """docs/model.md §12.3: the run ends at total_steps, and takes no batch more than it uses."""
    batches = Batches()
    result = trainer(batches, total_steps=total).run()
    assert [row["step"] for row in result.history] == list(range(1, total + 1))
    assert batches.position == result.step == total


def test_run_in_parts_is_the_run():
    whole, parts = trainer(), trainer()
    expected = whole.run()
    assert parts.run(until=1).step == 1
    assert numbers(parts.run().history) == numbers(expected.history)
    with pytest.raises(ValueError, match=r"until is 9; it must be in 4\.\.4"):
        parts.run(until=9)


def test_batches_that_end_are_an_error():
    with pytest.raises(TrainingError, match="ended after step 2 of 4"):
        trainer([gduf_batch(), gduf_batch()]).run()


def test_errors_propagate_and_name_the_samples():
    """docs/model.md §12.3: an error in the third batch stops the run."""
    wrong = pack([Samples().pair("no loss here")[1]], tiny_config())
    made = trainer([gduf_batch(), gduf_batch(), wrong, gduf_batch()])
    with pytest.raises(ValueError, match="nothing to learn from") as caught:
        made.run()
    assert caught.value.__notes__ == ["in step 3, with the samples ['no loss here']"]
    assert made.state.step == 2


def test_loss_that_is_not_finite_stops_before_the_weights():
    poisoned = gduf_batch(5)
    poisoned.latents[0] = math.nan
    made = trainer([gduf_batch(), poisoned, gduf_batch()])
    made.run(until=1)
    before = weights(made.stage.model)
    with pytest.raises(TrainingError, match=r"step 2 is not finite .*loss = nan.* those of step 1.*generation 5.1"):
        Trainer.train_step(made, poisoned)
    for name, value in weights(made.stage.model).items():
        assert torch.equal(value, before[name]), name


def test_gradient_that_is_not_finite_stops(monkeypatch):
    made = trainer()
    made.stage.model.llm2vae.bias.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match=r"step 1 is not finite .*grad_norm"):
        made.run()


def test_same_seed_same_run():
    first, second, other = (trainer(seed=seed).run().history for seed in (3, 3, 4))
    assert numbers(first) == numbers(second)
    assert numbers(first) != numbers(other)


@pytest.mark.parametrize("stage", ["gduf", "diga"])
def test_overfits_one_batch(stage):
    batch = gduf_batch() if stage == "gduf" else diga_batch()
    optimizer = OptimizerConfig(lr=1e-2, eps=1e-8, warmup_steps=2)
    history = trainer([batch] * 40, stage=stage, total_steps=40, optimizer=optimizer).run().history
    term = "ce" if stage == "gduf" else "diga"
    assert history[-1][term] < 0.3 * history[0][term]
    assert mean_row(history[-10:])["mse"] < mean_row(history[:10])["mse"]


@pytest.mark.parametrize("stage", ["gduf", "diga"])
def test_bf16_is_near_fp32(stage):
    exact = trainer(stage=stage).run().history
    made = trainer(stage=stage, precision="bf16", recompute="full")
    history = made.run().history
    assert numbers(history) != numbers(exact)
    for row, expected in zip(history, exact, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=0.03)
    assert {p.dtype for p in made.stage.model.parameters()} == {torch.float32}


def test_recompute_changes_no_number():
    """Each layer runs twice a step, and the losses are the same."""
    histories, calls = [], []
    for recompute in ("none", "full", "selective"):
        made = trainer(recompute=recompute)
        count = []
        made.stage.model.decoder.layers[0].register_forward_pre_hook(lambda *_, count=count: count.append(1))
        histories.append(numbers(made.run().history))
        calls.append(len(count))
    assert histories[0] == histories[1] == histories[2]
    assert calls == [CONFIG.total_steps, 2 * CONFIG.total_steps, 2 * CONFIG.total_steps]


def test_clipping_bounds_the_gradient(monkeypatch):
    """The reported norm is that before clipping; what the optimizer sees has at most the norm ``clip``."""
    made = trainer(optimizer=OptimizerConfig(lr=1e-3, clip=0.01))
    seen = []
    step = made.state.optimizer.step

    def watch():
        seen.append(torch.nn.utils.get_total_norm([p.grad for p in made.stage.trained.values()]).item())
        step()

    monkeypatch.setattr(made.state.optimizer, "step", watch)
    assert made.train_step(gduf_batch())["grad_norm"] > 1
    assert seen == [pytest.approx(0.01, rel=1e-3)]


def test_average_follows_the_trained_weights_only():
    """docs/model.md §12.9: no second copy of what is frozen."""
    made = trainer(stage="diga", ema_decay=0.75)
    average, trained = made.ema, made.stage.trained
    assert [t.shape for t in average.tensors] == [p.shape for p in trained.values()]
    assert sum(t.numel() for t in average.tensors) < sum(p.numel() for p in made.stage.model.parameters())
    expected = [p.detach().clone() for p in trained.values()]
    for i in range(3):
        made.train_step(diga_batch(i))
        expected = [0.75 * e + 0.25 * p.detach() for e, p in zip(expected, trained.values(), strict=True)]
    torch.testing.assert_close(average.tensors, expected)
    live = [p.detach().clone() for p in trained.values()]
    with average.applied():
        torch.testing.assert_close([p.detach() for p in trained.values()], expected)
    assert all(torch.equal(p, before) for p, before in zip(trained.values(), live, strict=True))
    average.copy_to_model()
    torch.testing.assert_close([p.detach() for p in trained.values()], expected)
    assert trainer(ema_decay=None).ema is None


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_learning_rate(schedule):
    config = OptimizerConfig(lr=2.0, schedule=schedule, warmup_steps=4, final_lr=0.1)
    rates = [learning_rate(step, config, 104) for step in range(105)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[54] == pytest.approx(2.0 if schedule == "constant" else 1.1)
    assert rates[104] == pytest.approx(2.0 if schedule == "constant" else 0.2)
    made = trainer(optimizer=config, total_steps=4)
    assert [row["lr"] for row in made.run().history] == [0.5, 1.0, 1.5, 2.0]
    assert made.state.optimizer.param_groups[0]["lr"] == 2.0


def test_warmup_fits_the_run():
    """docs/model.md §12.7: by default the warm-up is a share of the run; a longer one than the run is an error."""
    for total in (1, 10, 500, 1000):
        config = TrainConfig(total_steps=total)
        assert config.optimizer.warmup(total) <= 0.1 * total + 1
        assert learning_rate(total - 1, config.optimizer, total) == config.optimizer.lr
    with pytest.raises(ValueError, match=r"optimizer\.warmup_steps is 2000; it must be at most total_steps \(1000\)"):
        TrainConfig(total_steps=1000, optimizer=OptimizerConfig(warmup_steps=2000))


def test_progress_is_shown():
    plain, fancy = io.StringIO(), io.StringIO()
    trainer(console=Console(file=plain, width=200), log_every=2).run()
    lines = plain.getvalue().splitlines()
    assert [line.split("  ")[:2] for line in lines] == [["gduf", "step 2/4"], ["gduf", "step 4/4"]]
    assert all(word in lines[0] for word in ("loss", "mse", "ce", "label", "tokens/s"))
    console = Console(file=fancy, force_terminal=True, width=200)
    trainer(console=console, stage="diga").run()
    assert all(word in fancy.getvalue() for word in ("diga", "4/4", "tokens/s"))
    assert trainer().run().step == 4  # quiet: no console at all


def test_metrics_are_written(tmp_path):
    result = trainer(output=str(tmp_path), log_every=2).run()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.history
    (events,) = (tmp_path / "tensorboard").glob("events.*")
    content = events.read_bytes()
    assert all(f"train/{name}".encode() in content for name in ("loss", "mse", "ce", "label", "lr", "grad_norm"))


def test_mean_row():
    rows = [
        {"step": 1, "loss": 1.0, "ce": 4.0, "tokens": 10, "seconds": 1.0, "tokens_per_second": 10.0},
        {"step": 2, "loss": 3.0, "tokens": 20, "seconds": 4.0, "tokens_per_second": 5.0},
    ]
    mean = mean_row(rows)
    assert mean == {"step": 2, "loss": 2.0, "ce": 4.0, "tokens": 30, "seconds": 2.5, "tokens_per_second": 6.0}
    assert mean_row([]) == {}


@pytest.mark.parametrize("damaged", ['{"step": 3, "lo', "\0\0\0", "3", "{}", ""])
def test_damaged_metrics(tmp_path, damaged):
    """A killed run leaves half a last line; anywhere else it is an error."""
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": 1}, {"step": 2}]
    good = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_text(good + damaged)
    assert read_history(tmp_path) == read_history(tmp_path, 2) == rows
    assert read_history(tmp_path, 1) == rows[:1]
    file.write_text(f"{damaged}\n{good}")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 is '.*'; it must be a step's row"):
        read_history(tmp_path, 1)


def test_a_row_outlives_its_process(tmp_path):
    """Another process's failure ends this one without notice, and nothing of what it had done may be missing."""
    program = (
        "import os, sys; from unigendet.training.metrics import MetricsWriter; writer = MetricsWriter(sys.argv[1])\n"
        "for step in (1, 2, 3): writer.add({'step': step, 'loss': 0.5})\n"
        "os._exit(7)"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=120)
    assert ended.returncode == 7
    assert read_history(tmp_path) == [{"step": step, "loss": 0.5} for step in (1, 2, 3)]


def test_metrics_reach_the_disk_before_a_checkpoint(tmp_path, monkeypatch):
    """So that a run that is killed later goes on with its whole history; and when it does, they stay on the disk."""
    made, seen = trainer(output=str(tmp_path), save_every=1, log_every=100), []
    save = made.save

    def watched():
        seen.append(len(read_history(tmp_path)))
        return save()

    monkeypatch.setattr(made, "save", watched)
    made.run()
    assert seen == [1, 2, 3, 4]
    again = MetricsWriter(tmp_path, made.history)
    assert read_history(tmp_path) == made.history
    again.close()
