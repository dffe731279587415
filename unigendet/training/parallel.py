"""The processes of a run: who they are, how the model is divided among them, and that they end together.

Started by ``torchrun``, a run has ``world_size`` processes, one per device, each with packs of its own. Every parameter
is divided by rows among the processes of a shard group (PyTorch's FSDP2, ``fully_shard``), and put together layer by
layer while it is needed; with ``parallel.replicate`` above 1 there are so many such groups, which share gradients
(HSDP). Losses are normalised by the counts of all processes, so gradients are summed, not averaged.

One process, without torchrun, has none of this: ``Parallel()`` answers every question with its own value.

Two rules keep the processes in step, since collectives are entered by all of them or block:

* what one of them decides by its own data (to stop, to skip a step) is agreed on first (``sum``, ``any``, ``gather``);
* a module that one of them has no use for is run for nothing where another one needs it (``model.idle``).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unigendet.config import check
from unigendet.device import find_device
from unigendet.model.unigendet import UniGenDet
from unigendet.training.config import ParallelConfig, TrainConfig
from unigendet.training.failures import FailureWatch, ToldElsewhere, meeting_store

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


T = TypeVar("T")
NO_OFFLOAD = "false on a CPU, and with one process"


@dataclass(frozen=True, eq=False)
class Parallel:
    """One process among those of a run.

    Attributes:
        rank: its number, from 0.
        world_size: how many there are.
        device: where this one computes.
        mesh: of the devices that share parameters; None: parameters are whole, there is one process.
        group: the process group for values on the host; None with one process.
        config: how parameters are divided.
        failing: to be called when this process has failed and has still to close its files, with the error, and whether
            a checkpoint is being written. The others are told at once, and leave it some time.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    group: Any = None
    config: ParallelConfig = field(default_factory=ParallelConfig)
    failing: Callable[[BaseException, bool], None] = lambda error, saving: None

    @property
    def main(self) -> bool:
        """Whether this process writes what only one of them writes."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether parameters are divided among processes."""
        return self.mesh is not None

    @property
    def copy(self) -> tuple[int, int]:
        """Which copy of the model this process has a part of, and how many there are. The others hold the same rows."""
        if self.mesh is None or self.mesh.ndim == 1:
            return 0, 1
        return self.mesh.get_local_rank("replicate"), self.mesh.size(0)

    def sum(self, values: Sequence[float]) -> list[float]:
        """The element-wise sum of every process's numbers, in float64."""
        if self.group is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true in any process."""
        return self.sum([float(flag)])[0] > 0

    def all(self, flag: bool) -> bool:
        """Whether ``flag`` is true in every process."""
        return not self.any(not flag)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank; values must be picklable."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def alike(self, make: Callable[[], T]) -> T:
        """What ``make`` gives. An error that all processes have alike is told by the first one; the others end.

        ``make`` must not enter collectives. Of errors, ValueError, OSError and ModuleNotFoundError are compared.
        """
        made, failure = None, None
        try:
            made = make()
        except (ValueError, OSError, ModuleNotFoundError) as error:
            failure = error
        texts = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is None:
            return made
        if not self.main and len(set(texts)) == 1:
            raise ToldElsewhere(str(failure)) from failure
        raise failure

    def total(self, values: Tensor) -> Tensor:
        """The sum of every process's tensor, on its device and without waiting for it."""
        if self.group is not None:
            dist.all_reduce(values)
        return values

    def sum_copies(self, model: UniGenDet, last: bool) -> None:
        """Before the backward pass of a pack: whether the copies of ``model`` then sum their gradients.

        They do so in the step's ``last`` pack, with those of the packs before, which each copy has summed in float32.
        All packs of a step must have gradients for the same parameters (``model.idle``). Until then FSDP keeps the sums
        on the device. So not with ``cpu_offload``, which is for devices without room: there every pack's are summed.
        """
        if self.config.sums_once and self.mesh is not None:
            model.set_requires_all_reduce(last)

    def shard(self, model: UniGenDet, precision: str = "fp32") -> UniGenDet:
        """Divide the parameters of ``model`` among the processes, in place: by decoder layer, by ViT layer, the rest.

        Args:
            model: not sharded yet. One on the ``meta`` device is allocated, of each parameter this process's rows, and
                all its parameters and buffers are still to be filled.
            precision: ``bf16`` computes with copies in bfloat16 of float32 parameters; gradients are summed in float32.
        """
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            FSDPModule,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
        )

        if self.mesh is None:
            return model
        low = torch.bfloat16 if precision == "bf16" else None
        # Inputs keep their types: among them are tables of positions, which bfloat16 would spoil.
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        offload = CPUOffloadPolicy() if self.config.cpu_offload else OffloadPolicy()
        options = {"mesh": self.mesh, "mp_policy": policy, "offload_policy": offload}
        for layer in (*model.decoder.layers, *model.vision.layers):
            fully_shard(layer, **options)
        # A model that does not learn (DIGA's teacher) has no backward pass after which its root would be put away.
        learns = any(parameter.requires_grad for parameter in model.parameters())
        fully_shard(model, **options, reshard_after_forward=not learns)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        model.compute_dtype = low
        return self._allocated(model) if model.latent_table.is_meta else model

    def _allocated(self, model: UniGenDet) -> UniGenDet:
        if self.config.cpu_offload:  # which buffers are not part of
            model.to_empty(device="cpu")
            for module in model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, torch.empty_like(buffer, device=self.device))
            return model
        return model.to_empty(device=self.device)


def whole(tensor: Tensor) -> Tensor:
    """A small tensor put together from every process's part; all of them must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def put_away(model: nn.Module) -> None:
    """After a use of a sharded model that no backward pass follows: free what was put together, and is soon outdated.

    Layers put themselves away; the root keeps its parameters together after a forward pass, for the backward pass.
    """
    if hasattr(model, "reshard"):
        model.reshard()


@contextmanager
def processes(config: TrainConfig) -> Iterator[Parallel]:
    """Within it, this process is one of those that ``torchrun`` started; without torchrun, the only one.

    If the block raises, the other processes say at once which one failed and why, and end after it (``failures``). They
    end too if a process is killed; what they know of that is less.

    Raises:
        ValueError: ``parallel`` does not fit the number of processes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    shape = _shape_here(config.parallel, world_size)
    several = "'auto', 'cuda' or 'cpu' with several processes, which have a GPU each"
    check(world_size == 1 or not config.device.startswith("cuda:"), "device", config.device, several)
    if world_size > 1 and config.device in ("auto", "cuda") and torch.cuda.is_available():
        number = os.environ.get("LOCAL_RANK")
        check(number is not None, "LOCAL_RANK", number, "this process's number on its machine: start it with torchrun")
        torch.cuda.set_device(int(number))  # before anything else is made on a device
    device = find_device(config.device)
    offload = config.parallel.cpu_offload
    fits = world_size > 1 and device.type == "cuda"
    check(fits or not offload, "parallel.cpu_offload", offload, NO_OFFLOAD)
    if world_size == 1:
        yield Parallel(device=device, config=config.parallel)
        return
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    timeout = timedelta(minutes=config.parallel.timeout)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timeout)
    rank = dist.get_rank()
    watch = FailureWatch(meeting_store(), rank, world_size)
    watch.start()
    try:
        group = dist.new_group(backend="gloo", timeout=timeout)
        mesh = make_mesh(device, shape, timeout)
        yield Parallel(rank, world_size, device, mesh, group, config.parallel, watch.failing)
        dist.barrier(group)  # or one that is still closing its files would take the others' end for a failure
    except BaseException as error:
        watch.report(error)
        error.add_note(f"in process {rank} of {world_size}")
        raise
    watch.stop()
    dist.destroy_process_group()


def _shape_here(config: ParallelConfig, world_size: int) -> tuple[int, int]:
    """``mesh_shape`` of the processes that there are; whoever forgot torchrun is told of it."""
    try:
        return mesh_shape(config, world_size)
    except ValueError as error:
        named = config.replicate * (config.shard or 1)
        if named == 1 or "WORLD_SIZE" in os.environ:
            raise
        start = f"torchrun --nproc-per-node {named} -m unigendet train …"
        raise ValueError(f"{error}. torchrun starts {named} processes, on one machine by: {start}") from error


def mesh_shape(config: ParallelConfig, world_size: int) -> tuple[int, int]:
    """(groups, processes in a group that divide the parameters). Raises ValueError unless that is all processes, and
    for a setting that one process cannot have.
    """
    check(world_size > 1 or not config.cpu_offload, "parallel.cpu_offload", config.cpu_offload, NO_OFFLOAD)
    groups = config.replicate
    fits = world_size % groups == 0
    check(fits, "parallel.replicate", groups, f"a divisor of the number of processes ({world_size})")
    shard = world_size // groups if config.shard is None else config.shard
    need = f"{world_size // groups}, so that parallel.replicate ({groups}) times it is the number of processes"
    fits = world_size % shard == 0 and world_size > shard
    other = f", or parallel.replicate must be {world_size // shard}" if fits else ""
    check(groups * shard == world_size, "parallel.shard", shard, f"{need} ({world_size}){other}")
    return groups, shard


def make_mesh(device: torch.device, shape: tuple[int, int], timeout: timedelta | None = None) -> DeviceMesh:
    """The mesh of ``mesh_shape``'s ``shape``, of all processes.

    Its groups are made here, because those that ``init_device_mesh`` makes do not inherit a ``timeout``. One group of
    all processes is the default group, with the timeout that this was given.
    """
    from torch.distributed.device_mesh import DeviceMesh

    if shape[0] == 1:
        return DeviceMesh.from_group(dist.group.WORLD, device.type, mesh_dim_names=("shard",))
    ranks, groups = torch.arange(shape[0] * shape[1]).view(shape), []
    for rows, name in ((ranks.T, "replicate"), (ranks, "shard")):
        for row in rows.tolist():  # every process takes part in making every group
            group = dist.new_group(row, timeout=timeout, group_desc=f"mesh_{name}")
            if dist.get_rank() in row:
                groups.append(group)
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=("replicate", "shard"))


def stopping_signal(received: signal.Signals | None) -> signal.Signals:
    """The signal that ended a run: this process's, or, where only others had one, SIGTERM."""
    return signal.SIGTERM if received is None else received
