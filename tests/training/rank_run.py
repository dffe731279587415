"""A short run of a tiny model as one of several processes: ``python rank_run.py RESULT SETTINGS [SPECIAL]``.

SETTINGS: JSON of a TrainConfig's fields, some of them nested. SPECIAL: JSON of ``fail`` (a rank that fails in step 2)
and ``nan`` (a rank whose second batch is not finite). Process 0 writes the history, the first step's gradients and the
last weights, whole, to RESULT.
"""

import functools
import itertools
import json
import sys

import torch
from training_fixtures import Samples, diga_batch, tiny_config, tiny_model

from unigendet.packing import Sample, Text, pack
from unigendet.training.config import LossWeights, OptimizerConfig, ParallelConfig, TrainConfig
from unigendet.training.parallel import processes, whole
from unigendet.training.stages import make_stage
from unigendet.training.trainer import Trainer

NESTED = {"optimizer": OptimizerConfig, "parallel": ParallelConfig, "losses": LossWeights}


def gduf(step, slot):
    """Packs that differ in what they have: both tasks, one, the other, text alone."""
    make = Samples(100 * step + slot)
    both = [make.detection(0, f"d {step}.{slot}"), make.generation(f"g {step}.{slot}"), make.detection(1)]
    text = Sample((Text(make.ids()), Text(make.ids(5), loss=True)), name=f"t {step}.{slot}")
    kinds = [both, both[1:2], both[:1], [text]]
    return pack(kinds[(step + slot) % len(kinds)], tiny_config())


def diga(step, slot):
    return diga_batch(100 * step + slot, images=1 + (step + slot) % 3)


def batches(stage, slots, special):
    for step in itertools.count(1):
        for slot in slots:
            batch = (diga if stage == "diga" else gduf)(step, slot)
            if step == 2 and special.get("fail") == slot:
                raise OSError("the disk is gone")
            if step == 2 and special.get("nan") == slot:
                first = batch[0] if stage == "diga" else batch
                first.latents.fill_(torch.nan)
            yield batch


class Recording(Trainer):
    """Keeps the first step's gradients."""

    gradients = None

    def _gradients(self, *arguments):
        result = super()._gradients(*arguments)
        if self.gradients is None:
            self.gradients = {n: whole(p.grad).clone() for n, p in self.stage.trained.items() if p.grad is not None}
        return result


def train(config, parallel, special=None):
    """The trainer after its run."""
    shard = functools.partial(parallel.shard, precision=config.precision) if parallel.sharded else None
    model = tiny_model()
    torch.nn.init.normal_(model.llm2vae.weight, std=0.2)  # or the velocity's gradient would end there
    model = shard(model) if shard else model
    stage = make_stage(model, config, shard)
    slots = range(parallel.rank * config.accumulate, (parallel.rank + 1) * config.accumulate)
    made = Recording(stage, batches(config.stage, slots, special or {}), config, parallel=parallel, quiet=True)
    made.run()
    return made


def outcome(made):
    weights = {name: whole(p.detach()).clone() for name, p in made.stage.model.named_parameters()}
    with made.ema.applied():
        averaged = {name: whole(p.detach()).clone() for name, p in made.stage.trained.items()}
    return {"history": made.history, "gradients": made.gradients, "weights": weights, "averaged": averaged}


def read_config(values):
    nested = {name: NESTED[name](**value) for name, value in values.items() if name in NESTED}
    return TrainConfig(**{**values, **nested})


def main(path, settings, special="{}"):
    torch.set_num_threads(1)
    config = read_config(json.loads(settings))
    with processes(config) as parallel:
        result = outcome(train(config, parallel, json.loads(special)))
        if parallel.main:
            torch.save(result, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
