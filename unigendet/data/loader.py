"""An endless, resumable stream of packs from several sources.

Every source is an endless sequence: the shuffled records of epoch 0, then those of epoch 1, and so on. Of this
sequence, shard s of S takes the elements s, s + S, s + 2S, …, where a shard is one data worker of one rank. So no two
workers read the same element, every record is read once per epoch, and a shard's whole position is one number per
source. Which source comes next is decided by the number of samples drawn so far, without randomness: the mixture is
exact at every moment.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from unigendet.config import LoaderConfig, ModelConfig
from unigendet.data.datasets import encode_latents
from unigendet.packing import ConditionDropout, PackedBatch, Sample, pack

logger = logging.getLogger(__name__)

Item = Sample | tuple[Sample, ...]  # one sample, or a student and its teacher
Batch = list[Item] | PackedBatch | tuple[PackedBatch, ...]

_END, _FAILED = -1, -2  # in place of a pack's number: the shard has nothing left; its batch is an error of the data


@dataclass(frozen=True)
class Source:
    """Records and how one becomes a sample (or a tuple of samples, of which the first counts for the token budget).

    ``weight``: samples drawn from this source in proportion to the other sources' weights. ``build`` must be
    picklable if workers are spawned: a method of a ``SampleBuilder`` is.
    """

    records: Sequence[Any]
    build: Callable[[Any], Item]
    weight: float = 1.0
    name: str = "source"

    def __post_init__(self) -> None:
        if len(self.records) == 0:
            raise ValueError(f"{self.name}.records is empty; a source needs at least one record")
        if not self.weight > 0:
            raise ValueError(f"{self.name}.weight is {self.weight}; it must be positive")


@dataclass
class _Position:
    """Where one shard stands: samples drawn per source, samples left out as too long, packs made."""

    drawn: list[int]
    skipped: int = 0
    packs: int = 0


@dataclass
class _Packer:
    """Makes one model input of a list of items; picklable."""

    model: ModelConfig | None
    dropout: ConditionDropout | None
    seed: int

    def __call__(self, items: list[Item], shard: int, index: int) -> Batch:
        if self.model is None:
            return items
        # Condition dropout must not depend on who packs or on what was packed before, or a resumed run would differ.
        rng = np.random.default_rng([self.seed, shard, index])
        if isinstance(items[0], Sample):
            return pack(items, self.model, dropout=self.dropout, rng=rng)
        student, *others = zip(*items, strict=True)
        first = pack(student, self.model, dropout=self.dropout, rng=rng)
        return (first, *(pack(samples, self.model) for samples in others))


class _Shards(IterableDataset):
    """The data set that torch's DataLoader iterates, in each worker over its own shard.

    Yields (batch, worker number, number of the pack in its shard, _END or _FAILED, position after it). An error of the
    data is yielded, since one that a worker raises reaches the consumer as a text, traceback and all.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        config: LoaderConfig,
        length: Callable[[Sample], int],
        packer: _Packer | None,
        epochs: int | None,
        rank: int,
        world_size: int,
    ) -> None:
        self.sources, self.config, self.length, self.packer = list(sources), config, length, packer
        self.epochs = epochs
        self.workers = max(1, config.num_workers)
        self.first_shard, self.num_shards = rank * self.workers, world_size * self.workers
        self.positions = [_Position([0] * len(sources)) for _ in range(self.workers)]
        self.next_worker = 0
        self._too_long = [0] * len(sources)  # samples left out since the last one that was not, by source
        self._cache: dict[tuple[int, int], Item] = {}
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __iter__(self) -> Iterator[tuple[Batch | Exception, int, int, _Position]]:
        info = get_worker_info()
        # DataLoader asks its workers in turn, from 0; on resuming, worker 0 plays the one whose turn it is.
        worker = (self.next_worker + (info.id if info else 0)) % self.workers
        shard = self.first_shard + worker
        position = copy.deepcopy(self.positions[worker])
        while True:
            try:
                items = self._gather(shard, position)
                index = position.packs
                batch = items if self.packer is None or not items else self.packer(items, shard, index)
            except (ValueError, OSError) as error:
                yield error, worker, _FAILED, position
                return
            if not items:
                yield [], worker, _END, position  # samples left out after the last pack still count
                return
            position.packs += 1
            yield batch, worker, index, copy.deepcopy(position)

    def _gather(self, shard: int, position: _Position) -> list[Item]:
        """The next pack's items; ``position`` moves on by exactly what was taken or skipped."""
        items: list[Item] = []
        room = self.config.max_tokens
        while (which := self._next_source(shard, position)) is not None:
            item = self._item(which, shard + position.drawn[which] * self.num_shards)
            sample = item if isinstance(item, Sample) else item[0]
            tokens = self.length(sample)
            if tokens > self.config.max_sample_tokens:
                position.drawn[which] += 1
                position.skipped += 1
                self._too_long[which] += 1
                self._warn(sample, tokens, position, which)
                continue
            if tokens > room:
                break  # drawn again as the next pack's first
            position.drawn[which] += 1
            self._too_long[which] = 0
            room -= tokens
            items.append(item)
        return items

    def _next_source(self, shard: int, position: _Position) -> int | None:
        """The source that is furthest behind its weight, among those with records left; None at the end."""
        best, best_turn = None, float("inf")
        for which, source in enumerate(self.sources):
            drawn = position.drawn[which]
            if self.epochs is not None and shard + drawn * self.num_shards >= self.epochs * len(source.records):
                continue
            turn = (drawn + 0.5) / source.weight
            if turn < best_turn:
                best, best_turn = which, turn
        return best

    def _item(self, which: int, place: int) -> Item:
        """Element ``place`` of a source's endless sequence."""
        source = self.sources[which]
        epoch, row = divmod(place, len(source.records))
        record = int(self._order(which, epoch)[row]) if self.config.shuffle else row
        if (which, record) in self._cache:
            return self._cache[which, record]
        try:
            item = source.build(source.records[record])
        except (ValueError, OSError) as error:
            where = getattr(source.records[record], "where", "") or f"{source.name}, record {record}"
            hint = "; image_root says where its images are" if isinstance(error, FileNotFoundError) else ""
            error.add_note(where + hint)
            raise
        if self.config.cache:
            self._cache[which, record] = item
        return item

    def _order(self, which: int, epoch: int) -> np.ndarray:
        if self._orders.get(which, (None,))[0] != epoch:
            rng = np.random.default_rng([self.config.seed, which, epoch])
            self._orders[which] = (epoch, rng.permutation(len(self.sources[which].records)))
        return self._orders[which][1]

    def _warn(self, sample: Sample, tokens: int, position: _Position, which: int) -> None:
        most, source, in_a_row = self.config.max_sample_tokens, self.sources[which], self._too_long[which]
        logger.warning(
            "sample %s has %d tokens, more than max_sample_tokens = %d: left out (%d so far)",
            sample.name or "(unnamed)",
            tokens,
            most,
            position.skipped,
        )
        if in_a_row >= 2 * len(source.records):  # a whole epoch lies among them, in whatever order
            raise ValueError(
                f"loader.max_sample_tokens is {most}; the last {in_a_row} samples of {source.name}, which has "
                f"{len(source.records)}, were all longer (this one has {tokens} tokens)"
            )


class Loader:
    """Iterates over packs; remembers where it stands.

    ``iter(loader)`` goes on from the loader's position, which moves with every pack handed out (not with those that
    workers have prefetched). The same settings and position give the same packs.

    Args:
        sources: what to draw from, by weight.
        config: budget, seed, workers.
        length: number of tokens of a sample, normally ``SampleBuilder.length``.
        model: pack for this model, in the worker; None hands out lists of items.
        dropout: condition dropout of samples (of the first sample of a tuple: a teacher sees everything).
        encode: pixels → latent, run by the consuming process on what a ``SampleBuilder`` without ``encode`` left as
            pixels; packing then takes place in the consuming process too.
        epochs: stop when every source has been read so often; None = never. A source that ends earlier drops out of
        the mixture. rank, world_size: this process's part of the data.
        start_method: how workers start (``fork``, ``spawn``, ``forkserver``); None = torch's default.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        config: LoaderConfig,
        *,
        length: Callable[[Sample], int],
        model: ModelConfig | None = None,
        dropout: ConditionDropout | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,
        epochs: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        start_method: str | None = None,
    ) -> None:
        if not sources:
            raise ValueError("sources is empty; a loader needs at least one source")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must be in [0, world_size={world_size})")
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs is {epochs}; it must be at least 1, or None for an endless stream")
        self.config = config
        self._encode = encode
        self._packer = _Packer(model, dropout, config.seed)
        self._start_method = start_method
        self._shards = _Shards(sources, config, length, None if encode else self._packer, epochs, rank, world_size)

    def __iter__(self) -> Iterator[Batch]:
        shards, batches = self._shards, iter(self._batches())
        try:
            for batch, worker, index, position in batches:
                if index == _FAILED:
                    raise batch
                if self._encode is not None and index != _END:
                    batch = self._packer(encode_latents(batch, self._encode), shards.first_shard + worker, index)
                shards.positions[worker] = position
                shards.next_worker = (worker + 1) % shards.workers
                if index != _END:
                    yield batch
        finally:
            # After an error the traceback holds on to the workers, and the garbage collector then waits 5 s for each.
            if self.config.num_workers:
                batches._shutdown_workers()

    def _batches(self) -> DataLoader:
        workers = self.config.num_workers
        if workers:
            # The tokenizers library warns in every forked worker unless its own threads are ruled out first.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return DataLoader(
            self._shards,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals_to_the_parent,
            prefetch_factor=self.config.prefetch if workers else None,
            multiprocessing_context=self._start_method if workers else None,
            pin_memory=self.config.pin_memory,
        )

    @property
    def skipped(self) -> int:
        """Samples left out so far because they were longer than ``max_sample_tokens`` (on this rank)."""
        return sum(position.skipped for position in self._shards.positions)

    def _identity(self) -> dict[str, Any]:
        """What a saved position is bound to."""
        shards, config = self._shards, self.config
        return {
            "seed": config.seed,
            "shuffle": config.shuffle,
            "max_tokens": config.max_tokens,
            "max_sample_tokens": config.max_sample_tokens,
            "first_shard": shards.first_shard,
            "num_shards": shards.num_shards,
            "sources": [[source.name, len(source.records), float(source.weight)] for source in shards.sources],
        }

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain numbers and strings."""
        shards = self._shards
        return {
            "identity": self._identity(),
            "next_worker": shards.next_worker,
            "positions": [dataclasses.asdict(position) for position in shards.positions],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the next ``iter`` yields exactly the packs that would have followed.

        Raises:
            ValueError: the position belongs to other sources, another seed or budget, or another number of ranks or
                workers.
        """
        mine, saved = self._identity(), state["identity"]
        different = [
            f"{key} is {mine[key]!r}, saved with {saved.get(key)!r}" for key in mine if mine[key] != saved.get(key)
        ]
        if different:
            raise ValueError(f"the saved position does not fit this loader: {'; '.join(different)}")
        self._shards.next_worker = state["next_worker"]
        self._shards.positions = [_Position(**copy.deepcopy(position)) for position in state["positions"]]


def _as_it_is(value: Any) -> Any:
    """DataLoader's default would turn arrays and numbers into tensors."""
    return value


def _leave_signals_to_the_parent(worker: int) -> None:
    """In a worker: let a signal to the whole process group pass, as Ctrl-C and schedulers send it.

    The main process finishes its step and then ends its workers. It sends SIGTERM to one that does not end, and again
    when it ends itself; so only the first SIGTERM is let pass.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
