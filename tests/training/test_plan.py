"""The plan against real runs: bytes of state, files and messages."""

import dataclasses
import functools

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from training_fixtures import diga_batch, gduf_batch, tiny_model

from unigendet.config import DataConfig, ImageConfig, LoaderConfig
from unigendet.model.rows import local
from unigendet.model.shards import read_tensors
from unigendet.training.config import DatasetsConfig, ParallelConfig, TrainConfig
from unigendet.training.footprint import Footprint, pack_bytes
from unigendet.training.parallel import Parallel, make_mesh
from unigendet.training.plan import make_plan
from unigendet.training.plan_text import gib, plan_tables
from unigendet.training.planned_pack import PlannedPack, Texts, planned_pack
from unigendet.training.stages import make_stage
from unigendet.training.step import Gradients, slot_generators
from unigendet.training.trainer import Trainer

BATCHES = {"gduf": gduf_batch, "diga": diga_batch}


def settings(stage="gduf", **changes):
    view = ImageConfig(min_size=8, max_size=8, stride=2)
    views = DataConfig(latent_view=view, vit_view=view)
    values = {"align_layer": 2, "teacher_layer": 3, "total_steps": 4, "datasets": DatasetsConfig(views=views)}
    values["loader"] = LoaderConfig(max_tokens=400, max_sample_tokens=200)
    return TrainConfig(stage=stage, **values | changes)


def plan_of(config, model, batch=None, world_size=1):
    """A plan; with ``batch``, one of this very pack."""
    made = make_plan(config, model, world_size, packs=planned_pack(config, model, Texts(4, 5, 4, 6)))
    if batch is None:
        return made
    student, teacher = batch if isinstance(batch, tuple) else (batch, None)
    packs = PlannedPack(student, teacher, 0, 0, 8, Texts())
    footprint = Footprint(config, model, made.sizes, packs, made.activations, made.replicate, made.shard)
    return dataclasses.replace(made, pack=packs, held=footprint.held())


@pytest.mark.parametrize("decay", [0.9, None])
@pytest.mark.parametrize("stage", ["gduf", "diga"])
def test_state_is_exact(stage, decay, tmp_path):
    config = settings(stage, ema_decay=decay, output=str(tmp_path))
    model = tiny_model()
    trainer = Trainer(make_stage(model, config), [], config, quiet=True)
    gradients = []
    trainer.state.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))
    )
    batch = BATCHES[stage](detections=2) if stage == "gduf" else diga_batch()
    trainer.train_step(batch)
    plan, state = plan_of(config, model.config, batch), trainer.state
    moments = sum(t.nbytes for entries in state.optimizer.state.values() for t in entries.values())
    teacher = {} if stage == "gduf" else {"DIGA's teacher": sum(t.nbytes for t in state.stage.state_dict().values())}
    averages = {} if decay is None else {"averaged weights": sum(t.nbytes for t in state.ema.tensors)}
    assert plan.held == {
        "weights (float32)": sum(p.nbytes for p in model.parameters()),
        "Adam's moments": moments,
        **averages,
        **teacher,
        "position tables": sum(b.nbytes for b in model.buffers()) + sum(t.nbytes for t in model.decoder.rope("cpu")),
        "pack": plan.held["pack"],
    }
    assert plan.moments["end of the backward"] == {"gradients": gradients[0]}
    saved = trainer.save()
    names = {"model": "model", "averaged model": "ema", "optimizer": "optimizer.safetensors"}
    names |= {"DIGA's teacher": "stage.safetensors"} if stage == "diga" else {}
    weights = {
        name: saved / file / "model.safetensors" if "." not in file else saved / file for name, file in names.items()
    }
    written = {name: sum(t.nbytes for t in read_tensors(f).values()) for name, f in weights.items() if f.exists()}
    assert plan.disk == written


def test_pack_bytes():
    student, teacher = diga_batch()
    for batch in (student, teacher):
        tensors = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
        layouts = [batch.layout, batch.vit_layout] + ([batch.readout.layout, batch.readout] if batch.readout else [])
        tensors = [t for t in tensors if isinstance(t, torch.Tensor)]
        tensors += [t for part in layouts if part for t in vars(part).values() if isinstance(t, torch.Tensor)]
        assert pack_bytes(batch) == sum(t.nbytes for t in tensors)
    assert pack_bytes(None) == 0


@pytest.fixture
def parallel(request):
    """A process among others that do not exist: collectives do nothing, but everything has its sizes."""
    shape = request.param
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=shape[0] * shape[1])
    yield Parallel(world_size=shape[0] * shape[1], mesh=make_mesh(torch.device("cpu"), shape))
    dist.destroy_process_group()


def local_bytes(tensors):
    return sum(local(tensor).nbytes for tensor in tensors)


@pytest.mark.parametrize("stage", ["gduf", "diga"])
@pytest.mark.parametrize("parallel", [(1, 8), (2, 4), (1, 3)], indirect=True)
def test_shards_are_exact(parallel, stage):
    model = tiny_model()
    shape = {"replicate": parallel.world_size // parallel.mesh.size(-1)}
    config = settings(stage, parallel=ParallelConfig(**shape))
    plan = plan_of(config, model.config, world_size=parallel.world_size)
    made = make_stage(parallel.shard(model), config, parallel.shard)
    assert plan.held["weights (float32)"] == local_bytes(model.parameters())
    assert plan.held["averaged weights"] == local_bytes(made.trained.values())
    tables = list(model.buffers())
    if stage == "diga":
        assert plan.held["DIGA's teacher"] == local_bytes(made.teacher.parameters())
        tables += made.teacher.buffers()
    assert plan.held["position tables"] == local_bytes(tables) + local_bytes(model.decoder.rope("cpu"))


class Communication(TorchDispatchMode):
    """Counts the bytes that this rank receives when weights are gathered, and sends when gradients are summed."""

    def __init__(self, shape):
        super().__init__()
        self.replicate, self.shard = shape
        self.bytes = {"gathering weights": 0, "summing gradients over the shards": 0}
        if self.replicate > 1:
            self.bytes["summing gradients over the copies"] = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name, others = op.name(), (self.shard - 1) / self.shard
        if "allgather" in name:
            self.bytes["gathering weights"] += args[0].nbytes * others
        elif "reduce_scatter" in name:
            self.bytes["summing gradients over the shards"] += args[1].nbytes * others
        elif "allreduce" in name:
            ring = 2 * (self.replicate - 1) / self.replicate
            self.bytes["summing gradients over the copies"] += args[0][0].nbytes * ring
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(("stage", "packs"), [("gduf", 1), ("diga", 1), ("gduf", 3)])
@pytest.mark.parametrize("parallel", [(1, 4), (2, 4)], indirect=True)
def test_communication(parallel, stage, packs):
    """Of a step: shards are gathered and summed for every pack, the sums of the copies once."""
    # Sizes that 4 divides, but for the last layer of the real/fake head: nothing is padded that would count.
    model = tiny_model(hidden_size=64, vocab_size=240, num_heads=4)
    shape = parallel.world_size // 4, 4
    config = settings(stage, precision="bf16", accumulate=packs, parallel=ParallelConfig(shape[0]))
    plan = plan_of(config, model.config, world_size=parallel.world_size)
    parallel = dataclasses.replace(parallel, config=config.parallel)
    shard = functools.partial(parallel.shard, precision="bf16")
    made = make_stage(shard(model), config, shard)
    generators = slot_generators(0, parallel, packs)
    with Communication(shape) as seen:
        Gradients(made, config, parallel).compute([BATCHES[stage](i) for i in range(packs)], generators, 1)
    assert plan.communication.keys() == seen.bytes.keys()
    for name, size in seen.bytes.items():
        assert plan.communication[name] == pytest.approx(size, rel=0.01)


def test_copies_of_a_model_on_the_host_are_summed_in_every_pack():
    """The sums of packs before would take the room on the device that the setting is to save."""
    model, sent = tiny_model().config, {}
    for offload in (False, True):
        for packs in (1, 3):
            parallel = ParallelConfig(replicate=2, cpu_offload=offload)
            plan = plan_of(settings(accumulate=packs, parallel=parallel), model, world_size=4)
            sent[offload, packs] = plan.communication["summing gradients over the copies"]
            assert parallel.sums_once != offload
    assert sent[False, 1] == sent[False, 3] == sent[True, 1] == sent[True, 3] / 3


def test_each_copy_has_its_part_of_a_checkpoint_on_the_host():
    """The copies together make one copy of the state."""
    model, found = tiny_model().config, {}
    for copies in (1, 2):
        config = settings(parallel=ParallelConfig(replicate=copies, shard=4))
        plan = plan_of(config, model, world_size=4 * copies)
        found[copies] = plan.host["copy of the state for a checkpoint"]
    assert found[1] == pytest.approx(2 * found[2], abs=2)


def test_host_memory_of_all_ranks():
    """That of a node, where the run has one; a run of one process has nothing to add up."""
    model = tiny_model().config
    plan = plan_of(settings(), model, world_size=8)
    (table,) = [table for table in plan_tables(plan) if table.title.startswith("Host memory")]
    total = sum(plan.host.values())
    assert table.rows[-2:] == (("together", gib(total)), ("all 8 ranks, on one node or more", gib(8 * total)))
    (table,) = [table for table in plan_tables(plan_of(settings(), model)) if table.title.startswith("Host memory")]
    assert table.rows[-1][0] == "together"
