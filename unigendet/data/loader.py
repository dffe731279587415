"""An endless, resumable stream of packs from several sources (``unigendet.data.shards`` says how they are read).

A shard's position is one number per source and the places of the samples that wait in its look-ahead buffer. The
positions of all ranks together are the run's: with them, the same number of ranks and workers goes on with exactly the
packs that would have followed, and any other number reads exactly the records that were left.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from unigendet.config import LoaderConfig, ModelConfig
from unigendet.data.datasets import encode_latents
from unigendet.data.parcel import Parcel
from unigendet.data.position import Position, Remaining, what_remains
from unigendet.data.shards import END, FAILED, Batch, Broken, Packer, Shards, Source, TooLong
from unigendet.packing import ConditionDropout, Sample

logger = logging.getLogger(__name__)


class Loader:
    """Iterates over packs; remembers where it stands.

    ``iter(loader)`` goes on from the loader's position, which moves with every pack handed out (not with those that
    workers have prefetched). The same settings and position give the same packs.

    A sample longer than ``config.max_sample_tokens`` is left out, and reported by name in the first epoch. A broken
    image (missing or unreadable) is left out too and reported by name, once by each rank that meets it. The iteration
    ends with the last one's error when this rank has counted more than ``config.max_broken`` different ones, over all
    its workers and, with the position, over all its resumptions; ranks do not count each other's. Any other error of
    the data is raised at once.

    Attributes:
        encode_seconds: that encoding and packing have taken in this process so far, on its own clock; None without
            ``encode``. A GPU works on behind it, but each image is copied there from memory that the copy waits for:
            so the encoding of all images but the last is in it, and of what the GPU was still busy with before.

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
        self._rank, self._world_size = rank, world_size
        self._encode = encode
        self.encode_seconds: float | None = None if encode is None else 0.0
        self._packer = Packer(model, dropout, config.seed)
        self._start_method = start_method
        self._counted = 0
        self._shards = Shards(sources, config, length, None if encode else self._packer, epochs, rank, world_size)

    def __iter__(self) -> Iterator[Batch]:
        shards, batches = self._shards, iter(self._batches())
        try:
            for batch, worker, index, position, reports in batches:
                for report in reports:
                    self._report(report, worker)
                if index == FAILED:
                    raise batch
                if isinstance(batch, Parcel):
                    batch = batch.open()
                if self._encode is not None and index != END:
                    started = time.perf_counter()
                    batch = self._packer(encode_latents(batch, self._encode), shards.first_shard + worker, index)
                    self.encode_seconds += time.perf_counter() - started
                shards.positions[worker] = position
                shards.next_worker = (worker + 1) % shards.workers
                if index != END:
                    yield batch
        finally:
            # After an error the traceback holds on to the workers, and the garbage collector then waits 5 s for each.
            if self.config.num_workers:
                batches._shutdown_workers()
                for worker in batches._workers:
                    if worker.is_alive():  # stuck, in a file that does not come, say; and it ignores SIGTERM
                        worker.kill()

    def _batches(self) -> DataLoader:
        workers = self.config.num_workers
        if workers:
            # The tokenizers library warns in every forked worker unless its own threads are ruled out first.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return DataLoader(
            self._shards,
            batch_size=None,
            num_workers=workers,
            collate_fn=as_it_is,
            worker_init_fn=leave_signals_to_the_parent,
            prefetch_factor=self.config.prefetch if workers else None,
            multiprocessing_context=self._start_method if workers else None,
            pin_memory=self.config.pin_memory,
        )

    def _report(self, report: TooLong | Broken, worker: int) -> None:
        """Log what was left out; raise the error of a broken image that is one too many."""
        if isinstance(report, TooLong):
            others = self.skipped - self._shards.positions[worker].skipped
            text = "sample %s has %d tokens, more than loader.max_sample_tokens = %d: left out (%d so far)"
            logger.warning(text, report.name, report.tokens, self.config.max_sample_tokens, others + report.skipped)
            return
        self._count_broken(report)

    def _count_broken(self, report: Broken) -> None:
        known, most = self._shards.broken, self.config.max_broken
        if (report.which, report.record) in known:
            return  # met by another worker, in another epoch
        known.add((report.which, report.record))
        self._counted += 1
        count, error = self._counted, report.error
        source = self._shards.sources[report.which]
        if count > most:
            images = "broken image" if count == 1 else "broken images"
            whose = f" counted by rank {self._rank}" if self._world_size > 1 else ""
            error.add_note(f"{count} {images}{whose}; loader.max_broken allows {most}")
            raise error
        if sum(which == report.which for which, _ in known) == len(source.records):
            error.add_note(f"so are all {len(source.records)} images of {source.name}")
            raise error
        logger.warning("%s (%s): left out (%d of at most %d)", error, "; ".join(error.__notes__), count, most)

    @property
    def skipped(self) -> int:
        """How often so far a sample was left out as longer than ``max_sample_tokens`` (on this rank)."""
        return sum(position.skipped for position in self._shards.positions)

    @property
    def broken(self) -> int:
        """How many broken images this rank counts against ``max_broken``: those it has met, or what it took over."""
        return self._counted

    def _identity(self) -> dict[str, Any]:
        """What a saved position is bound to."""
        names = ("seed", "shuffle", "max_tokens", "max_sample_tokens", "lookahead")
        sources = [[source.name, len(source.records), float(source.weight)] for source in self._shards.sources]
        return {name: getattr(self.config, name) for name in names} | {"sources": sources}

    def state_dict(self) -> dict[str, Any]:
        """This rank's position, as plain numbers and strings. ``merge_states`` makes the run's of all ranks'."""
        shards = self._shards
        return {
            "identity": self._identity(),
            "world_size": self._world_size,
            "workers": shards.workers,
            "origins": [[list(origin.left), origin.next] for origin in shards.origins],
            "ranks": [
                {
                    "rank": self._rank,
                    "next_worker": shards.next_worker,
                    "broken": [list(pair) for pair in sorted(shards.broken)],
                    "counted": self._counted,
                    "positions": [position.to_json() for position in shards.positions],
                }
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position of the run, ``merge_states`` of all ranks' (of one rank: what it gave itself).

        With as many ranks and workers as saved it, the next ``iter`` yields exactly the packs that would have followed.
        With other numbers, the shards share what is left: every record that the run had not yet read in its epoch is
        read once, and none twice; a warning says so. Each rank then knows the broken images of all, so that none is
        reported again. Its count goes on from its own with as many ranks, and else from an equal share of all counts
        (``share_of_counts``), with which a run that was within ``max_broken`` still is.

        Raises:
            ValueError: the position belongs to other sources, another seed or budget, or is not that of all ranks.
        """
        mine, saved = self._identity(), state["identity"]
        if different := _differences(mine, saved):
            raise ValueError(f"the saved position does not fit this loader: {'; '.join(different)}")
        world_size, workers = state["world_size"], state["workers"]
        positions = [[Position.from_json(values) for values in one["positions"]] for one in state["ranks"]]
        origins = [Remaining(tuple(left), first) for left, first in state["origins"]]
        ranks = [one["rank"] for one in state["ranks"]]
        if ranks != list(range(world_size)) or {len(own) for own in positions} != {workers}:
            raise ValueError(
                f"the saved position is that of ranks {ranks}; it must be that of all {world_size} in order, with "
                f"{workers} workers each, as merge_states makes it"
            )
        shards = self._shards
        # Positions of earlier versions have no counts of their own: a rank counted all that it knew.
        counts = [one.get("counted", len(one["broken"])) for one in state["ranks"]]
        self._counted = share_of_counts(counts, self._rank, self._world_size)
        if (world_size, workers) == (self._world_size, shards.workers):
            own = state["ranks"][self._rank]
            shards.origins, shards.positions = origins, positions[self._rank]
            shards.next_worker, shards.broken = own["next_worker"], set(map(tuple, own["broken"]))
            return
        if self._rank == 0:
            logger.warning(
                "the data was read by %d × %d workers (ranks × workers of each) and now is by %d × %d: what is left of "
                "it is dealt out anew, so the packs are others than would have followed",
                world_size, workers, self._world_size, shards.workers,
            )  # fmt: skip
        self._deal(origins, [position for own in positions for position in own])
        shards.broken = {tuple(pair) for one in state["ranks"] for pair in one["broken"]}

    @staticmethod
    def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The position of a run, for every rank's ``Loader.load_state_dict``.

        Args:
            states: ``Loader.state_dict()`` of every rank at the same step, in the order of the ranks.

        Raises:
            ValueError: they are not those of all ranks, or of different loaders.
        """
        if not states:
            raise ValueError("states is empty; it must hold the state of every rank")
        first = states[0]
        ranks = [one for state in states for one in state["ranks"]]
        if [one["rank"] for one in ranks] != list(range(first["world_size"])):
            raise ValueError(
                f"states are those of ranks {[one['rank'] for one in ranks]}; they must be those of all "
                f"{first['world_size']} ranks in order"
            )
        for rank, state in enumerate(states):
            others = sorted(key for key in first if key != "ranks" and state[key] != first[key])
            if others:
                raise ValueError(
                    f"states[{rank}] differs from states[0] in {', '.join(others)}; they must be of one run"
                )
        return {**first, "ranks": ranks}

    def _deal(self, origins: Sequence[Remaining], positions: Sequence[Position]) -> None:
        """Begin with this rank's part of what ``positions``, those of all shards, have left."""
        shards = self._shards
        shards.origins = [what_remains(origin, which, positions) for which, origin in enumerate(origins)]
        # Pack numbers go on where no shard has been: condition dropout, which is drawn by them, must not come again.
        packs = max(position.packs for position in positions)
        shards.positions = [Position([0] * len(origins), packs=packs) for _ in range(shards.workers)]
        if self._rank == 0:
            shards.positions[0].skipped = sum(position.skipped for position in positions)
        shards.next_worker = 0


def share_of_counts(counts: Sequence[int], rank: int, world_size: int) -> int:
    """How many broken images ``rank`` of ``world_size`` counts when the ranks before had counted ``counts``.

    As many ranks go on from their own. More of them divide the sum. Fewer get the shares that as many as before would
    have got: ``max_broken`` is of each rank, and what all of them together may leave out becomes less, too. So no share
    is larger than the largest count.
    """
    if world_size == len(counts):
        return counts[rank]
    each, over = divmod(sum(counts), max(world_size, len(counts)))
    return each + (rank < over)


def _differences(mine: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Where two identities differ, settings by the names that users know."""
    found = [
        f"loader.{name} is {value!r}, saved with {saved.get(name)!r}"
        for name, value in mine.items()
        if name != "sources" and value != saved.get(name)
    ]
    ours, theirs = mine["sources"], saved["sources"]
    if len(ours) != len(theirs):
        return [*found, f"the number of sources is {len(ours)}, saved with {len(theirs)}"]
    texts = [[f"{name!r} ({n} records, weight {weight:g})" for name, n, weight in each] for each in (ours, theirs)]
    pairs = enumerate(zip(*texts, strict=True))
    return found + [f"source {i} is {now}, saved with {then}" for i, (now, then) in pairs if ours[i] != theirs[i]]


def as_it_is(value: Any) -> Any:
    """DataLoader's default would turn arrays and numbers into tensors."""
    return value


def leave_signals_to_the_parent(worker: int) -> None:
    """In a worker: ignore signals to the whole process group, as Ctrl-C, torchrun and schedulers send them, some of
    them more than once. The main process finishes its step and then ends its workers; they notice if it is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
