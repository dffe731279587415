"""What a pack costs on the host before a step can run: from split lengths to what attention needs, and all of packing.

``attention_metadata``: everything that attention needs beside the lengths, forward and backward. Ours:
``Layout.from_splits`` and what a backend derives from it (the tile schedules of all kernels, or the plan of calls).
Peers: FlexAttention's block mask, eager and compiled, which gets this project's two integers per key for free, and the
published dense masks, one float matrix per sample.
``tile_schedule``: the schedule alone, by size of tile, with the share of launched work that is useful. ``pack``: random
samples into a PackedBatch. All of it is paid once per pack, whatever the number of layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from unigendet import schedule as schedules
from unigendet.layout import Layout, visible
from unigendet.ops import symbiotic_attention_flash, symbiotic_attention_torch
from unigendet.schedule import TileSchedule, layout_schedule

from . import packs, traces
from .contest import Entry, Measurement, Run, Work, make_rows, race
from .harness import CannotRun, first_call, peak_mib
from .published import dense_masks
from .record import table

BLOCKS = ((128, 128), (128, 64), (64, 64), (32, 128))
LARGEST_BLOCK_MASK = 40_000  # tokens; uncompiled, create_block_mask holds matrices of their square


@dataclass(frozen=True)
class HostCase:
    """Functions without arguments that do the same work, timed in turns; ``columns`` by candidate."""

    op: str
    trace: str | None
    shape: str
    candidates: Mapping[str, Callable[[], Any]]
    peers: frozenset[str] = frozenset()
    columns: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    work: Mapping[str, Work] = field(default_factory=lambda: {"host": Work()})

    @property
    def title(self) -> str:
        """For people."""
        return " ".join(filter(None, (self.op, self.trace, self.shape)))

    def run(self, run: Run) -> None:
        """A row for each candidate."""
        measured: dict[str, Measurement] = {}
        entries: dict[str, Entry] = {}
        failures: dict[str, str] = {}
        names = [name for name in self.candidates if run.wants(name)]
        for name in names:
            try:
                run.check_time()
                if name in run.without:
                    raise CannotRun(run.without[name])
                _, seconds = first_call(self.candidates[name], run.device)
                entries[name] = Entry(None, seconds, None)
            except Exception as error:  # the others may still run
                failures[name] = run.failure(error)
        slow = max((entry.first_call_s for entry in entries.values()), default=0.0) > run.seconds
        often = {"turn": 1, "rounds": 3} if slow else {}
        turns = {name: lambda name=name: [self.candidates[name]] for name in entries}
        for name, (timing, columns) in race(turns, run, failures, on_host=True, **often).items():
            peak = peak_mib(self.candidates[name], torch.device("cpu"))
            columns = {**columns, **self.columns.get(name, {})}
            measured[name] = Measurement(dataclasses.asdict(timing), entries[name], peak, columns=columns)
        common = {"op": self.op, "trace": self.trace, "shape": self.shape, "dtype": "", "direction": "host"}
        rows = make_rows(common, names, self.peers, measured, failures, Work(), run.ceilings)
        run.progress.show(table(run.add(rows)))


def fresh_schedule(layout: Layout, block_m: int, block_n: int) -> TileSchedule:
    """A schedule as a pack gets it that was never seen before."""
    schedules._cached.cache_clear()
    return layout_schedule(layout, block_m, block_n)


def metadata_case(trace: traces.Trace, device: torch.device) -> HostCase:
    """From lengths to attention's metadata on ``device``."""
    layout = trace.layout

    def built() -> Layout:
        return Layout.from_splits(trace.splits, streams=trace.streams).to(device)

    def with_tiles() -> object:
        schedules._cached.cache_clear()
        own = built()
        return [layout_schedule(own, *tiles) for tiles in _tiles(device)]

    def with_plan(module: Any) -> object:
        module._plan.cache_clear()
        return module.plan(built().splits, device)

    candidates: dict[str, Callable[[], Any]] = {
        "triton": with_tiles,
        "torch": functools.partial(with_plan, symbiotic_attention_torch),
        "flash": functools.partial(with_plan, symbiotic_attention_flash),
        "dense_masks": lambda: [mask.to(device) for mask in dense_masks(trace.splits, torch.float32)],
    }
    candidates |= {
        "block_mask": functools.partial(_block_mask, layout.to(device)),
        "block_mask_compiled": functools.partial(_block_mask, layout.to(device), compiled=True),
    }
    peers = frozenset({"dense_masks", "block_mask", "block_mask_compiled"})
    return HostCase("attention_metadata", trace.name, f"{layout.num_queries:,} tokens", candidates, peers)


def _tiles(device: torch.device) -> list[tuple[int, int]]:
    """The tiles that a step with head_dim 128 in bfloat16 has, on this GPU, or on the H100 where there is none."""
    from unigendet.kernels.config import attention_config

    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    directions = ("forward", "backward_dkdv", "backward_dq")
    configs = [attention_config(capability, 128, "bfloat16", d, describable=True) for d in directions]
    return sorted({(config.block_m, config.block_n) for config in configs})


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _block_mask(layout: Layout, *, compiled: bool = False) -> object:
    """FlexAttention's, made anew as for a new pack of the same length: for another, a compiled one compiles again."""
    from torch.nn.attention.flex_attention import create_block_mask

    if layout.num_queries > LARGEST_BLOCK_MASK and not compiled:
        raise CannotRun(f"of more than {LARGEST_BLOCK_MASK:,} tokens it would hold matrices of tens of GB")

    def mask_mod(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return visible(query, layout.query_begin[key], layout.query_end[key])

    shape = (None, None, layout.num_queries, layout.num_keys)
    build = _compiled(create_block_mask) if compiled else create_block_mask
    return build(mask_mod, *shape, device=layout.device)


def schedule_case(trace: traces.Trace, block_m: int, block_n: int) -> HostCase:
    """The tile schedule alone."""
    layout = trace.layout
    useful = layout.visible_pairs() / fresh_schedule(layout, block_m, block_n).launched_pairs
    candidates = {"triton": functools.partial(fresh_schedule, layout, block_m, block_n)}
    shape = f"tiles of {block_m} x {block_n}"
    return HostCase("tile_schedule", trace.name, shape, candidates, columns={"triton": {"useful_share": useful}})


def pack_case(trace: traces.Trace, config: Any) -> HostCase:
    """Samples with their contents into a PackedBatch, layout included."""
    samples = packs.samples_of(trace, config)
    candidates = {"pack": lambda: packs.pack(samples, config)}
    return HostCase("pack", trace.name, f"{trace.layout.num_queries:,} tokens", candidates)


def cases(device: torch.device, size: str) -> Iterator[HostCase]:
    """The standard traces; the largest masks only in full runs."""
    if size == "tiny":
        yield metadata_case(traces.tiny(), device)
        yield schedule_case(traces.tiny(), 16, 16)
        yield pack_case(traces.trace("many_small_16k"), packs.quickstart_config())
        return
    names = ("many_small_16k", "gduf_4k", "gduf_32k", "gduf_64k") if size == "full" else ("gduf_4k",)
    for name in names:
        yield metadata_case(traces.trace(name), device)
    for name in names:
        for block_m, block_n in BLOCKS if size == "full" else BLOCKS[:1]:
            yield schedule_case(traces.trace(name), block_m, block_n)
    for name in names:
        small = name == "many_small_16k"
        yield pack_case(traces.trace(name), packs.quickstart_config() if small else packs.small_config())
