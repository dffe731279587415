"""Short runs of a tiny model as one of several processes: ``python rank_run.py FOLDER RUNS``.

RUNS: JSON, name → fields of a TrainConfig, some nested, and of ``SPECIAL``. Process 0 writes every run's history, the
first step's gradients and the last weights, whole, to FOLDER/NAME.pt.
"""

import dataclasses
import functools
import itertools
import json
import sys
from pathlib import Path

import torch
from training_fixtures import Samples, diga_batch, tiny_config, tiny_model

from unigendet.packing import Sample, Text, pack
from unigendet.training.config import LossWeights, OptimizerConfig, ParallelConfig, TrainConfig
from unigendet.training.parallel import make_mesh, mesh_shape, processes, whole
from unigendet.training.stages import make_stage
from unigendet.training.step import Gradients
from unigendet.training.trainer import Trainer

NESTED = {"optimizer": OptimizerConfig, "parallel": ParallelConfig, "losses": LossWeights}


def gduf(step, slot):
    """Packs that differ in what they have: both tasks, one, the other, text alone, text that nothing is learnt from."""
    make = Samples(100 * step + slot)
    both = [make.detection(0, f"d {step}.{slot}"), make.generation(f"g {step}.{slot}"), make.detection(1)]
    text = Sample((Text(make.ids()), Text(make.ids(5), loss=True)), name=f"t {step}.{slot}")
    mute = Sample((Text(make.ids()),), name=f"m {step}.{slot}")
    kinds = [both, both[1:2], both[:1], [text], [mute]]
    return pack(kinds[(step + slot) % len(kinds)], tiny_config())


def diga(step, slot):
    return diga_batch(100 * step + slot, images=1 + (step + slot) % 3)


SPECIAL = {"fail": None, "nan": None}  # a slot whose second batch is an error, or not finite


def batches(stage, slots, special):
    for step in itertools.count(1):
        for slot in slots:
            batch = (diga if stage == "diga" else gduf)(step, slot)
            if step == 2 and special["fail"] == slot:
                raise OSError("the disk is gone")
            if step == 2 and special["nan"] == slot:
                (batch[0] if stage == "diga" else batch).latents.fill_(torch.nan)
            yield batch


class Recording(Gradients):
    """Keeps the first step's gradients."""

    first = None

    def compute(self, *arguments):
        result = super().compute(*arguments)
        if self.first is None:
            self.first = {n: whole(p.grad).clone() for n, p in self._stage.trained.items() if p.grad is not None}
        return result


def train(values, parallel):
    """The trainer after its run."""
    config, special = read_config(values)
    shard = functools.partial(parallel.shard, precision=config.precision) if parallel.sharded else None
    model = tiny_model()
    torch.nn.init.normal_(model.llm2vae.weight, std=0.2)  # or the velocity's gradient would end there
    model = shard(model) if shard else model
    stage = make_stage(model, config, shard)
    slots = range(parallel.rank * config.accumulate, (parallel.rank + 1) * config.accumulate)
    made = Trainer(stage, batches(config.stage, slots, special), config, parallel=parallel, quiet=True)
    made._gradients = Recording(stage, config, parallel)
    made.run()
    return made


def outcome(made):
    weights = {name: whole(p.detach()).clone() for name, p in made.stage.model.named_parameters()}
    with made.ema.applied():
        averaged = {name: whole(p.detach()).clone() for name, p in made.stage.trained.items()}
    return {"history": made.history, "gradients": made._gradients.first, "weights": weights, "averaged": averaged}


def read_config(values):
    special = {name: values.get(name, default) for name, default in SPECIAL.items()}
    fields = {name: value for name, value in values.items() if name not in SPECIAL}
    nested = {name: NESTED[name](**value) for name, value in fields.items() if name in NESTED}
    return TrainConfig(**{**fields, **nested}), special


def timeouts(parallel):
    """Minutes that collectives wait, by group; of both kinds of mesh."""
    meshes = {"copies": parallel.mesh, "one": make_mesh(parallel.device, (1, parallel.world_size))}
    groups = {f"{name} {dim}": mesh.get_group(dim) for name, mesh in meshes.items() for dim in mesh.mesh_dim_names}
    groups["host"] = parallel.group
    options = {name: group._get_backend(torch.device("cpu")).options for name, group in groups.items()}
    return {name: option._timeout.total_seconds() / 60 for name, option in options.items()}


def main(folder, runs):
    torch.set_num_threads(1)
    with processes(TrainConfig(device="cpu", parallel=ParallelConfig(replicate=2, timeout=7))) as parallel:
        for name, values in json.loads(runs).items():
            config, _ = read_config(values)
            mesh = make_mesh(parallel.device, mesh_shape(config.parallel, parallel.world_size))
            result = outcome(train(values, dataclasses.replace(parallel, mesh=mesh, config=config.parallel)))
            if parallel.main:
                torch.save(result, f"{folder}/{name}.pt")
        if parallel.main:
            Path(folder, f"timeouts-{parallel.world_size}.json").write_text(json.dumps(timeouts(parallel)))


if __name__ == "__main__":
    main(*sys.argv[1:])
