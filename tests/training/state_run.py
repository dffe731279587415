"""Loads, saves and resumes a tiny model as one of several processes: ``python state_run.py FOLDER``.

FOLDER holds ``jobs.json``, a list of {"job": a function's name, other arguments}, done in their order in one start of
the processes. Also imported by the tests, for the same in one process.
"""

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import rank_run
import torch

from unigendet.model.checkpoint import load_pretrained
from unigendet.model.settings import load_config
from unigendet.training import failures, saving
from unigendet.training.config import ParallelConfig, TrainConfig
from unigendet.training.parallel import make_mesh, mesh_shape, processes, whole
from unigendet.training.stages import make_stage
from unigendet.training.trainer import SaveError, Trainer

UNEVEN = {"vocab_size": 41, "intermediate_size": 47}  # rows that two processes cannot share evenly
COMMON = {
    "total_steps": 6,
    "save_every": 3,
    "keep_checkpoints": 9,
    "align_layer": 2,
    "teacher_layer": 3,
    "device": "cpu",
    "ema_decay": 0.5,
    "optimizer": {"lr": 1e-2, "eps": 1e-3, "warmup_steps": 0},  # a large eps: see test_parallel
}


class Batches:
    """Endless batches for some slots, with a position in steps, which all processes share."""

    def __init__(self, stage, slots, before=None):
        self.make, self.slots, self.step, self.before = getattr(rank_run, stage), slots, 0, before

    def __iter__(self):
        while True:
            self.step += 1
            if self.before is not None:
                self.before(self.step)
            for slot in self.slots:
                yield self.make(self.step, slot)

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def sharding(parallel, config=None):
    """(the processes with the mesh that ``config`` asks for, what divides a model among them)."""
    config = config or ParallelConfig()
    if parallel.world_size == 1:
        return parallel, None
    mesh = make_mesh(parallel.device, mesh_shape(config, parallel.world_size))
    parallel = dataclasses.replace(parallel, mesh=mesh, config=config)
    return parallel, parallel.shard


def note(folder):
    """As a tokenizer's ``save``."""
    (folder / "note.txt").write_text("beside the weights")


def trainer(parallel, /, source, resume=None, before=None, **settings):
    """A trainer from the weights at ``source``, or at a checkpoint."""
    config, _ = rank_run.read_config(COMMON | settings)
    parallel, shard = sharding(parallel, config.parallel)
    model = load_pretrained(Path(resume) / "model" if resume else source, shard=shard)
    stage = make_stage(model, config, shard)
    slots = range(parallel.rank * config.accumulate, (parallel.rank + 1) * config.accumulate)
    batches, options = Batches(config.stage, slots, before), {"companions": [note], "parallel": parallel}
    made = Trainer(stage, batches, config, quiet=True, **options)
    if resume:
        made.resume(resume)
    return made


# Jobs


def load(parallel, /, name, path, out, seed=5, **options):
    """The whole state of a model of which every process has read its rows."""
    _, shard = sharding(parallel)
    torch.manual_seed(seed)
    dtype = getattr(torch, options.pop("dtype", "float32"))
    sizes = dataclasses.replace(load_config(path), **options.pop("config", {}))
    model = load_pretrained(path, config=sizes, shard=shard, dtype=dtype, **options)
    values = {name: whole(tensor).clone() for name, tensor in model.state_dict().items()}
    if parallel.main:
        torch.save(values, f"{out}/load-{name}.pt")


def train(parallel, /, **arguments):
    """A run to its end."""
    trainer(parallel, **arguments).run()


def train_counting(parallel, /, output, **arguments):
    """A run to its end; of its last save, the bytes that each process has and those that it copies to host memory."""
    inner, held, staged = saving._Copies.stage, [], []

    def stage(self, parts):
        staged.append({name: part.tensor.nbytes for name, part in parts.items()})
        return inner(self, parts)

    def start(self, path, tensors, folder):
        held.append(sum(part.tensor.nbytes for parts in tensors.values() for part in parts.values()))
        begin(self, path, tensors, folder)

    begin, saving.Saving.start, saving._Copies.stage = saving.Saving.start, start, stage
    try:
        trainer(parallel, output=output, **arguments).run()
    finally:
        saving.Saving.start, saving._Copies.stage = begin, inner
    found = parallel.gather((held[-1], staged[-1]))
    if parallel.main:
        Path(output, "staged.json").write_text(json.dumps(found))


def train_while_writing(parallel, /, output, **arguments):
    """No file is written until the step after the save has begun; it would never end if the run waited for the file."""
    begun, inner = threading.Event(), saving.stream_tensors

    def held(*values, **options):
        assert begun.wait(60)
        inner(*values, **options)

    def before(step):
        if step == COMMON["save_every"] + 1:
            assert not Path(output, "checkpoints", "step-000003").exists()
            begun.set()

    saving.stream_tensors = held
    try:
        trainer(parallel, output=output, before=before, **arguments).run()
    finally:
        saving.stream_tensors = inner


def full_disk(parallel, /, output, failing, **arguments):
    """One process cannot write in the second save; all must say so and end, without waiting for the next save."""
    inner = saving.stream_tensors

    def limited(tensors, read, file, metadata=None):
        if parallel.rank == failing and "000006" in str(file):
            raise OSError(28, os.strerror(28), str(file))
        inner(tensors, read, file, metadata)

    def before(step):
        deadline = time.monotonic() + 60
        while step == 7 and not made.state.saving.failed:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    saving.stream_tensors = limited
    made = trainer(parallel, output=output, before=before, total_steps=9, **arguments)
    try:
        made.run()
    except SaveError as error:
        Path(output, f"error-{parallel.rank}").write_text(str(error))
    finally:
        saving.stream_tensors = inner


def fails_while_saving(parallel, /, output, go, **arguments):
    """Process 1 fails in the step after a save has begun, of which no file is written until there is a file ``go``."""
    inner = saving.stream_tensors
    failures._GRACE = 0.5

    def held(*values, **options):
        deadline = time.monotonic() + 60
        while not Path(go).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        inner(*values, **options)

    def before(step):
        if step == COMMON["save_every"] + 1 and parallel.rank == 1:
            raise OSError("the disk is gone")

    saving.stream_tensors = held
    trainer(parallel, output=output, before=before, **arguments).run()


def killed(parallel, /, output, **arguments):
    """Every process is killed as it brings its first file of the second save onto the disk."""
    inner = saving.sync

    def deadly(path):
        if "000006" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        inner(path)

    saving.sync = deadly
    trainer(parallel, output=output, **arguments).run()


def main(folder):
    torch.set_num_threads(1)
    jobs = json.loads(Path(folder, "jobs.json").read_text())
    with processes(TrainConfig(device="cpu")) as parallel:
        for job in jobs:
            globals()[job.pop("job")](parallel, **job)


if __name__ == "__main__":
    main(*sys.argv[1:])
