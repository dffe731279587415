"""Makes new models as one of several processes: ``python new_run.py FOLDER``.

Process 0 writes, whole, every model of ``MODELS`` and the state of the random generator after it to FOLDER/NAME.pt;
each process writes what the largest one took to FOLDER/memory-RANK.json.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from training_fixtures import tiny_config

from benchmarks.load_memory import status
from unigendet.model.new_weights import new_model
from unigendet.model.rows import local
from unigendet.model.unigendet import UniGenDet
from unigendet.training.config import ModelSource, ParallelConfig, TrainConfig
from unigendet.training.parallel import make_mesh, mesh_shape, processes, whole
from unigendet.training.run import build_model

UNEVEN = {"vocab_size": 41, "intermediate_size": 47}  # rows that two processes cannot share evenly
MODELS = {
    "mlp": tiny_config(**UNEVEN),
    "conv": tiny_config(align_projector="conv"),
    "headless": tiny_config(class_head=False, align_head=False),
}
LARGE = tiny_config(hidden_size=512, intermediate_size=1536, num_layers=8, num_heads=8, num_kv_heads=2, vocab_size=8000)
PRESET = TrainConfig(device="cpu", model=ModelSource(preset="quickstart"))


def state(model):
    """All that a new model is, and what the generator would draw next."""
    tensors = {name: whole(tensor).clone() for name, tensor in model.state_dict().items()}
    return tensors | {"generator": torch.get_rng_state()}


def alone(name):
    """The same in one process."""
    torch.manual_seed(5)
    return state(build_model(PRESET, None, "cpu") if name == "preset" else UniGenDet(MODELS[name]))


def memory(shard):
    """Bytes of a large model's part, and by how much the most memory of the process ever grew for it."""
    new_model(MODELS["mlp"], shard)  # what is imported for the first
    before = status()["VmHWM"]
    model = new_model(LARGE, shard)
    grown = status()["VmHWM"] - before
    share = sum(local(tensor).nbytes for tensor in model.state_dict().values())
    total = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return {"share": share, "whole": total, "grown": grown}


def main(folder):
    torch.set_num_threads(1)
    with processes(TrainConfig(device="cpu")) as parallel:
        found = memory(parallel.shard)
        Path(folder, f"memory-{parallel.rank}.json").write_text(json.dumps(found))
        mesh = make_mesh(parallel.device, mesh_shape(ParallelConfig(replicate=2), parallel.world_size))
        copies = dataclasses.replace(parallel, mesh=mesh)
        for name in (*MODELS, "preset", "copies"):
            torch.manual_seed(5)
            if name == "preset":
                model = build_model(PRESET, None, parallel.device, shard=parallel.shard)
            else:
                shard = copies.shard if name == "copies" else parallel.shard
                model = new_model(MODELS["mlp" if name == "copies" else name], shard)
            found = state(model)
            if parallel.main:
                torch.save(found, f"{folder}/{name}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
