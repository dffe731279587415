"""Checkpoints of a run of several processes, which is going on while they are written.

Every process writes its own rows of every tensor, through ``torch.distributed.checkpoint``: it checks that all rows are
there, runs in the background, and tells every process when one has failed. Copies of the model (HSDP) deal among
themselves what they hold alike (``dealt``); a process makes host copies of no more than it has been dealt. What is
written is ours, safetensors alone:

* ``STEM-00002-of-00008.safetensors``: the second process's rows, with their places in the file's metadata
  (``unigendet.model.rows``); PyTorch's ``HuggingFaceStorageReader`` reads such files too;
* ``STEM.safetensors.index.json``: the files that hold rows of each tensor.

PyTorch's own writer of such files leaves no list of them, and holds two more copies of all that a process writes.

All processes must see the same folder. The first one gives it its name once all files are on the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult

from unigendet.files import PARTIAL, beside, naming, sync
from unigendet.model.rows import FIRST, OFFSETS, Part
from unigendet.model.shards import index_name, stream_tensors
from unigendet.training.parallel import Parallel

Tensors = Mapping[str, Mapping[str, Part]]  # stem of the files, relative to the folder → name → rows of this process


class Saving:
    """The checkpoint that is being written, one at a time. Every process has one, and all ask the same of theirs."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel
        self._group: Any = None  # of its own: the run's collectives must not meet those of a save
        self._running: tuple[Future[Any], _Writer] | None = None

    def start(self, path: Path, tensors: Tensors, folder: AbstractContextManager[Path]) -> None:
        """Copy ``tensors`` and begin to write them; waits for the save before.

        Args:
            path: the checkpoint's folder.
            tensors: what this process has of them.
            folder: entered in the first process before any of them writes: a ``files.new_folder`` for ``path``, with
                everything else in it. It is left when all files are on the disk, or with the error that kept one away.

        Raises: as ``wait``.
        """
        self.wait()
        if self._group is None:
            timeout = timedelta(minutes=self._parallel.config.timeout)
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        held = {f"{stem}:{name}": part for stem, parts in tensors.items() for name, part in parts.items()}
        own = dealt({name: part.tensor.nbytes for name, part in held.items()}, *self._parallel.copy)
        state = {name: part for name, part in held.items() if name in own}
        writer = _Writer(path, folder)
        options = {"storage_writer": writer, "planner": _Planner(), "async_stager": _Copies()}
        self._running = dcp.async_save(state, process_group=self._group, **options), writer

    @property
    def running(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._running is not None and not self._running[0].done()

    @property
    def failed(self) -> bool:
        """Whether the save has ended, and not well; ``wait`` says why."""
        return self._running is not None and self._running[0].done() and self._running[0].exception() is not None

    def wait(self) -> None:
        """Wait until the checkpoint is complete, in every process.

        Raises:
            OSError: a process could not write its part; names the file. Nothing is left of the checkpoint.
        """
        if self._running is None:
            return
        future, writer = self._running
        error = future.exception()
        self._running = None
        if error is None:
            return
        writer.abandon(error)
        if isinstance(error, CheckpointException):  # of all processes that failed
            errors = [cause for _, (cause, _) in sorted(error.failures.items())]
            raise next((cause for cause in errors if isinstance(cause, OSError)), errors[0]) from error
        raise error


def dealt(sizes: Mapping[str, int], copy: int, copies: int) -> set[str]:
    """Which of the parts that so many copies of a model hold alike this one writes: about as many bytes as each other.

    Each part, the largest first, goes to the copy that has least so far. It depends on names and ``sizes`` (bytes)
    alone, so all find the same without asking each other.
    """
    loads, own = [0] * copies, set()
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        loads[least] += sizes[name]
        if least == copy:
            own.add(name)
    return own


class _Copies(AsyncStager):
    """Copies in host memory, so that the run may go on."""

    _synchronize_after_execute = False

    def stage(self, state_dict: dict[str, Part]) -> dict[str, Part]:
        """The same with copies of the tensors."""
        copies = {name: part.tensor.detach().to("cpu", copy=True).contiguous() for name, part in state_dict.items()}
        return {name: dataclasses.replace(part, tensor=copies[name]) for name, part in state_dict.items()}


class _Planner(SavePlanner):
    """Offers every part that has rows; one that processes hold alike all the same goes to the one with least to do."""

    def set_up_planner(
        self, state_dict: dict[str, Part], storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        """Keep the parts."""
        self._parts = state_dict

    def create_local_plan(self) -> SavePlan:
        """What this process could write."""
        return SavePlan([_item(name, part) for name, part in self._parts.items() if part.tensor.numel()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Who writes what; an error if rows are missing."""
        options = {"flatten_state_dict": False, "flatten_sharded_tensors": False}
        return dcp.DefaultSavePlanner(**options).create_global_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """What this process will write."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The rows."""
        return self._parts[write_item.index.fqn].tensor


def _item(name: str, part: Part) -> WriteItem:
    offsets = torch.Size([part.row, *[0] * (len(part.shape) - 1)] if part.shape else [])
    properties = TensorProperties.create_from_tensor(part.tensor)
    data = TensorWriteData(ChunkStorageMetadata(offsets, part.tensor.shape), properties, torch.Size(part.shape))
    return WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)


class _Writer(StorageWriter):
    """A folder that appears whole; see the head of this file."""

    def __init__(self, path: Path, folder: AbstractContextManager[Path]) -> None:
        self._partial, self._folder = beside(path, PARTIAL), folder
        self._entered = contextlib.ExitStack()

    def reset(self, checkpoint_id: Any = None) -> None:
        """A writer is for one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """A writer has its folder from the start."""
        return checkpoint_id is None

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """Nothing: a file is made when it is written."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """In the first process, before the others write: make the folder, and number the files."""
        self._entered.enter_context(self._folder)
        return [dataclasses.replace(plan, storage_data=(i, len(plans))) for i, plan in enumerate(plans, 1)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Write this process's files, and bring them onto the disk."""
        number, count = plan.storage_data
        stems: dict[str, dict[str, WriteItem]] = defaultdict(dict)
        for item in plan.items:
            stem, _, name = item.index.fqn.partition(":")
            stems[stem][name] = item
        results = []
        for stem, items in stems.items():
            file = f"{stem}-{number:05}-of-{count:05}.safetensors"
            _write_rows(items, planner, self._partial / file)
            results += [WriteResult(item.index, item.tensor_storage_size() or 0, file) for item in items.values()]
        written: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        written.set_result(results)
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """In the first process, after all have written: the lists of files, and the folder's name."""
        indices: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        sizes: dict[str, int] = defaultdict(int)
        for result in (one for some in results for one in some):
            stem, _, name = result.index.fqn.partition(":")
            indices[stem][name].append(Path(result.storage_data).name)
            sizes[stem] += result.size_in_bytes
        for stem, weight_map in indices.items():
            file = self._partial / index_name(stem)
            index = {"metadata": {"total_size": sizes[stem]}, "weight_map": weight_map}
            with naming(file):
                file.write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")
        self._entered.close()

    def abandon(self, failure: BaseException) -> None:
        """Remove what there is of the checkpoint."""
        self._entered.__exit__(type(failure), failure, failure.__traceback__)


def _write_rows(items: Mapping[str, WriteItem], planner: SavePlanner, file: Path) -> None:
    tensors = {name: planner.resolve_data(item) for name, item in items.items()}
    offsets = {name: {FIRST: list(item.tensor_data.chunk.offsets)} for name, item in items.items()}
    metadata = {OFFSETS: json.dumps(offsets), "DCP_VERSION": "1.0"}
    stream_tensors(tensors, tensors.__getitem__, file, metadata)
    sync(file)
