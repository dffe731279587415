"""Options of a step: packs that accumulate, steps that are skipped, what is recomputed, compiled layers."""

import dataclasses
import functools
import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_fixtures import Batches, Samples, diga_batch, gduf_batch, tiny_config, tiny_model

from unigendet.packing import Sample, Text, pack
from unigendet.training.config import SKIPS, OptimizerConfig, TrainConfig
from unigendet.training.stages import GDUFStage, make_stage
from unigendet.training.trainer import Trainer, TrainingError

CONFIG = TrainConfig(total_steps=4, align_layer=2, teacher_layer=3, optimizer=OptimizerConfig(lr=1e-3))


def trainer(batches, **settings):
    config = dataclasses.replace(CONFIG, **settings)
    return Trainer(make_stage(tiny_model(), config), batches, config, quiet=True)


def spoilt(step):
    batch = gduf_batch(step)
    batch.latents.fill_(torch.nan)
    return batch


@pytest.mark.parametrize("stage", ["gduf", "diga"])
def test_a_step_takes_as_many_packs_as_are_to_accumulate(stage):
    batches = Batches(diga_batch if stage == "diga" else gduf_batch)
    made = trainer(batches, stage=stage, accumulate=3)
    result = made.run()
    assert batches.position == 12
    assert [row["step"] for row in result.history] == [1, 2, 3, 4]
    one = diga_batch(1)[0] if stage == "diga" else gduf_batch(1)
    assert result.history[0]["tokens"] == pytest.approx(3 * one.layout.num_queries, rel=0.3)


def test_accumulated_losses_are_those_of_one_large_pack():
    """Of text alone, where no noise is drawn: the mean is over all tokens, not over packs of different lengths."""
    make = Samples()
    samples = [Sample((Text(make.ids()), Text(make.ids(count), loss=True)), name=str(count)) for count in (3, 9, 4)]
    parts = [pack(samples[:1], tiny_config()), pack(samples[1:], tiny_config())]
    settings = {"total_steps": 1, "ema_decay": None}
    accumulated, whole = trainer(parts, accumulate=2, **settings), trainer([pack(samples, tiny_config())], **settings)
    (row,), (expected,) = accumulated.run().history, whole.run().history
    for name in ("loss", "ce", "grad_norm"):
        assert row[name] == pytest.approx(expected[name], rel=1e-6)
    assert row["tokens"] == expected["tokens"]


def test_every_pack_of_a_step_has_noise_of_its_own():
    """The same pack twice: with equal noise, two would give the gradient of one."""
    batch = gduf_batch()
    (one,), (two,) = (trainer([batch] * count, accumulate=count, total_steps=1).run().history for count in (1, 2))
    assert one["mse"] != pytest.approx(two["mse"], rel=1e-4)
    assert one["ce"] == pytest.approx(two["ce"], rel=0.2)


def test_a_step_that_is_not_finite_is_skipped_if_asked(caplog):
    batches = [gduf_batch(1), spoilt(2), gduf_batch(3), gduf_batch(4)]
    made = trainer(batches, on_nonfinite="skip")
    with caplog.at_level(logging.WARNING):
        history = made.run().history
    assert [row.get("skipped", 0) for row in history] == [0, 1, 0, 0]
    assert "step 2 is not finite (loss = nan" in caplog.text
    assert "generation 2.1" in caplog.text
    assert all(p.isfinite().all() for p in made.stage.model.parameters())
    assert all(t.isfinite().all() for t in made.ema.tensors)
    assert made.state.optimizer.state[next(iter(made.stage.trained.values()))]["step"].item() == 3


def test_many_skipped_steps_end_the_run():
    made = trainer([spoilt(i) for i in range(20)], on_nonfinite="skip", total_steps=20)
    before = {name: p.detach().clone() for name, p in made.stage.trained.items()}
    with pytest.raises(TrainingError, match=rf"step {SKIPS} is not finite .*like the {SKIPS - 1} steps before it"):
        made.run()
    assert all(torch.equal(p, before[name]) for name, p in made.stage.trained.items())


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def test_what_runs_again():
    """``full`` runs everything in a layer twice; ``attention`` all but attention; ``selective`` no matrix product."""
    counts = {}
    for recompute in ("none", "full", "attention", "selective"):
        model = tiny_model()
        model.decoder.recompute = model.vision.recompute = recompute
        with Calls() as calls:
            GDUFStage(model).losses(gduf_batch(), torch.Generator().manual_seed(0)).total.backward()
        counts[recompute] = calls.counts
    layers = tiny_model().config.num_layers
    for name, per_layer in (("symbiotic_attention", 1), ("stream_linear", 4), ("swiglu", 1), ("qk_norm_rope", 1)):
        none, full, attention, selective = (counts[mode][f"unigendet::{name}"] for mode in counts)
        more = per_layer * layers + (name == "symbiotic_attention")  # the ViT has one layer
        assert full == none + more, name
        assert attention == (none if name == "symbiotic_attention" else full), name
        kept = name in ("symbiotic_attention", "stream_linear")
        assert selective == (none if kept else full), name


def test_compiled_layers_give_the_same_numbers(monkeypatch):
    """Without code generation, which takes long: what is traced, and that packs of other lengths can use it."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    expected = trainer(Batches()).run().history
    history = trainer(Batches(), compile=True).run().history
    for row, other in zip(history, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
