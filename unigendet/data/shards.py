"""Sources, and the shards that are read from them: drawing, looking ahead, leaving out, packing.

Every source is an endless sequence of places: the shuffled records of epoch 0, then those of epoch 1, and so on. Of
this sequence, shard s of S takes the elements s, s + S, s + 2S, …, where a shard is one data worker of one rank. So no
two workers read the same element and every record is read once per epoch. Which source comes next is decided by the
number of samples drawn so far, without randomness: the mixture is exact at every moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from unigendet.config import LoaderConfig, ModelConfig
from unigendet.data.parcel import Parcel
from unigendet.data.position import Position, Remaining
from unigendet.data.transforms import BrokenImageError
from unigendet.packing import ConditionDropout, PackedBatch, Sample, pack

Item = Sample | tuple[Sample, ...]  # one sample, or a student and its teacher
Batch = list[Item] | PackedBatch | tuple[PackedBatch, ...]

END, FAILED = -1, -2  # in place of a pack's number: the shard has nothing left; its batch is an error of the data


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


@dataclass(frozen=True)
class TooLong:
    """A sample that no pack may hold, of the first epoch; ``skipped``: how many its shard has left out by then."""

    name: str
    tokens: int
    skipped: int


@dataclass(frozen=True)
class Broken:
    """An image that could not be read, and the error that says so; its notes name the record."""

    which: int
    record: int
    error: Exception


@dataclass
class Packer:
    """Makes one model input of a list of items; picklable."""

    model: ModelConfig | None
    dropout: ConditionDropout | None
    seed: int

    def __call__(self, items: list[Item], shard: int, index: int) -> Batch:
        """Pack ``index`` of a shard."""
        if self.model is None:
            return items
        # Condition dropout must not depend on who packs or on what was packed before, or a resumed run would differ.
        rng = np.random.default_rng([self.seed, shard, index])
        if isinstance(items[0], Sample):
            return pack(items, self.model, dropout=self.dropout, rng=rng)
        student, *others = zip(*items, strict=True)
        first = pack(student, self.model, dropout=self.dropout, rng=rng)
        return (first, *(pack(samples, self.model) for samples in others))


class Shards(IterableDataset):
    """The data set that torch's DataLoader iterates, in each worker over its own shard.

    Yields (batch, worker number, number of the pack in its shard, END or FAILED; position after it, what was left out
    on the way); a worker's batch is a ``Parcel``. An error of the data is yielded, since one that a worker raises
    reaches the consumer as a text, traceback and all. What was left out travels with the pack, so that it is reported
    when the pack is used, once.

    Attributes:
        origins: what is left of each source; positions count from here.
        positions, next_worker: where the shards of this rank stand, and whose turn it is.
        broken: (source, record) of the broken images that are known.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        config: LoaderConfig,
        length: Callable[[Sample], int],
        packer: Packer | None = None,
        epochs: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.sources, self.config, self.length, self.packer = list(sources), config, length, packer
        self.epochs = epochs
        self.workers = max(1, config.num_workers)
        self.first_shard, self.num_shards = rank * self.workers, world_size * self.workers
        self.origins = [Remaining() for _ in sources]
        self.positions = [Position([0] * len(sources)) for _ in range(self.workers)]
        self.next_worker = 0
        self.broken: set[tuple[int, int]] = set()
        self._cache: dict[tuple[int, int], Item] = {}
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __iter__(self) -> Iterator[tuple[Batch | Parcel | Exception, int, int, Position, list[TooLong | Broken]]]:
        info = get_worker_info()
        # DataLoader asks its workers in turn, from 0; on resuming, worker 0 plays the one whose turn it is.
        worker = (self.next_worker + (info.id if info else 0)) % self.workers
        shard = self.first_shard + worker
        reader = _Reader(self, shard, self.positions[worker].copy())
        position = reader.position
        while True:
            try:
                items = reader.gather()
                index = position.packs
                batch = items if self.packer is None or not items else self.packer(items, shard, index)
            except (ValueError, OSError) as error:
                yield error, worker, FAILED, position, reader.reports()
                return
            if not items:
                yield [], worker, END, position, reader.reports()  # samples left out after the last pack still count
                return
            position.packs += 1
            batch = Parcel.of(batch) if info else batch
            yield batch, worker, index, position.copy(), reader.reports()

    def locate(self, which: int, place: int) -> tuple[int, int]:
        """Epoch and record of a place in a source's endless sequence."""
        epoch, row = divmod(place, len(self.sources[which].records))
        return epoch, int(self._order(which, epoch)[row]) if self.config.shuffle else row

    def build(self, which: int, record: int) -> Item:
        """The sample of a record; an error names the record in a note."""
        if (which, record) in self._cache:
            return self._cache[which, record]
        source = self.sources[which]
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


class _Reader:
    """Reads one shard; ``position`` moves on by exactly what was drawn.

    Packing is first-fit with a look-ahead buffer. A pack begins with the samples that wait, oldest first; then new ones
    are drawn. One that finds no room waits, up to ``config.lookahead`` of them; the first for which there is not even
    room to wait ends the pack and is drawn again for the next. The oldest always fits into an empty pack, so none waits
    for more than lookahead + 1 packs.
    """

    def __init__(self, data: Shards, shard: int, position: Position) -> None:
        self.position = position
        self._data, self._shard = data, shard
        self._made: dict[
            tuple[int, int], tuple[Item, int]
        ] = {}  # of places: samples not yet in a pack, and their tokens
        self._reports: list[TooLong | Broken] = []
        self._broken, self._known = set(data.broken), len(data.broken)
        self._too_long = [0] * len(data.sources)  # in a row since the last sample that was of use, by source
        self._useless = [0] * len(data.sources)  # the same, with broken images

    def reports(self) -> list[TooLong | Broken]:
        """What was left out since the last call."""
        reports, self._reports = self._reports, []
        return reports

    def gather(self) -> list[Item]:
        """The next pack's items; empty at the end."""
        items: list[Item] = []
        position, config = self.position, self._data.config
        room = config.max_tokens
        for waiting in position.held.copy():
            made = self._make(*waiting)
            if made is not None and made[1] > room:
                continue
            position.held.remove(waiting)
            room -= self._take(waiting, items)
        while (which := self._next_source()) is not None:
            at = which, self._place(which)
            made = self._make(*at)
            fits = made is None or made[1] <= room
            if not fits and len(position.held) >= config.lookahead:
                break
            position.drawn[which] += 1
            if fits:
                room -= self._take(at, items)
            else:
                position.held.append(at)
        return items

    def _take(self, at: tuple[int, int], items: list[Item]) -> int:
        """Put the sample of a place into the pack, if it can be used; returns its tokens."""
        item, tokens = self._made.pop(at, (None, 0))
        if item is not None:
            items.append(item)
        return tokens

    def _place(self, which: int) -> int:
        """Where the source goes on for this shard."""
        element = self._shard + self.position.drawn[which] * self._data.num_shards
        return self._data.origins[which].place(element)

    def _next_source(self) -> int | None:
        """The source that is furthest behind its weight, among those with records left; None at the end."""
        best, best_turn = None, float("inf")
        epochs = self._data.epochs
        for which, source in enumerate(self._data.sources):
            if epochs is not None and self._place(which) >= epochs * len(source.records):
                continue
            turn = (self.position.drawn[which] + 0.5) / source.weight
            if turn < best_turn:
                best, best_turn = which, turn
        return best

    def _make(self, which: int, place: int) -> tuple[Item, int] | None:
        """The sample of a place and its tokens; None if it cannot be used, which is reported."""
        if (which, place) in self._made:
            return self._made[which, place]
        epoch, record = self._data.locate(which, place)
        try:
            item = self._data.build(which, record)
        except (BrokenImageError, FileNotFoundError) as error:
            self._leave_out_broken(which, record, error)
            return None
        sample = item if isinstance(item, Sample) else item[0]
        tokens = self._data.length(sample)
        if tokens > self._data.config.max_sample_tokens:
            self._leave_out_long(which, epoch, sample, tokens)
            return None
        self._too_long[which] = self._useless[which] = 0
        self._made[which, place] = item, tokens
        return item, tokens

    def _leave_out_broken(self, which: int, record: int, error: Exception) -> None:
        source, config = self._data.sources[which], self._data.config
        self._useless[which] += 1
        if (which, record) not in self._broken:
            self._broken.add((which, record))
            self._reports.append(Broken(which, record, error))
        if self._useless[which] >= 2 * len(source.records):
            last, all_of_them = self._useless[which], len(source.records)
            error.add_note(f"the last {last} samples of {source.name}, which has {all_of_them}, were all of no use")
            raise error
        if len(self._broken) - self._known > config.max_broken:
            raise error  # the loader, which counts over all workers, stops at the report before it comes to this

    def _leave_out_long(self, which: int, epoch: int, sample: Sample, tokens: int) -> None:
        source, most = self._data.sources[which], self._data.config.max_sample_tokens
        self.position.skipped += 1
        self._too_long[which] += 1
        self._useless[which] += 1
        if epoch == 0:  # of all ranks and workers one meets the record in this epoch
            self._reports.append(TooLong(sample.name or "(unnamed)", tokens, self.position.skipped))
        if self._useless[which] >= 2 * len(source.records):  # a whole epoch lies among them, in whatever order
            in_a_row = self._too_long[which]
            others = self._useless[which] - in_a_row
            beside = f" or broken ({others})" if others else ""
            raise ValueError(
                f"loader.max_sample_tokens is {most}; the last {self._useless[which]} samples of {source.name}, which "
                f"has {len(source.records)}, were all longer{beside} (this one has {tokens} tokens)"
            )
