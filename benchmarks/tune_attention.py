"""Measure launch configurations of attention on this GPU: ``python -m benchmarks.tune_attention``.

Tries, one direction after the other, the configurations of ``candidates`` on the trace ``gduf_32k``, with the other
directions as they are, and writes each winner to ``kernels/tuned.json`` if it beats the configuration in use by more
than the spread of the measurements. That file is part of the source: review it, run the GPU tests, commit it. Nothing
is tuned unless this is run. It has never run on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Sequence

import torch
from unigendet.kernels import config as configs
from unigendet.kernels.config import AttentionConfig

from . import traces
from .harness import Timing, measure

SEED = 0


def candidates(direction: str, capability: tuple[int, int]) -> list[AttentionConfig]:
    """Configurations worth a try; those that do not compile or do not fit are skipped when they are tried."""
    hopper = capability >= (9, 0)
    wide, narrow = (64, 128), (32, 64, 128)  # dk and dv keep a tile of keys, the others one of queries
    tiles = itertools.product(*((narrow, wide) if "dkdv" in direction else (wide, narrow)))
    loads = (True, False) if hopper else (False,)
    return [AttentionConfig(*tile, *rest) for tile, *rest in itertools.product(tiles, (4, 8), (2, 3), loads)]


def choose(
    current: AttentionConfig,
    others: Iterable[AttentionConfig],
    time: Callable[[AttentionConfig], Timing | None],
    report: Callable[[str], None] = print,
) -> AttentionConfig | None:
    """The configuration to use instead of ``current``, or None.

    ``time`` returns None for a configuration that cannot run. The winner's 80th percentile must lie below the 20th
    of ``current``: otherwise the difference is noise.
    """
    base = time(current)
    if base is None:
        raise RuntimeError(f"{current} cannot run")
    report(f"{base.ms:9.3f} ms  {current}  (in use)")
    best, best_timing = None, base
    for config in others:
        timing = None if config == current else time(config)
        if timing is None:
            continue
        report(f"{timing.ms:9.3f} ms  {config}")
        if timing.ms < best_timing.ms and timing.p80 < base.p20:
            best, best_timing = config, timing
    return best


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune_attention", description=__doc__.split("\n")[0])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=28)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--directions", nargs="+", choices=configs.DIRECTIONS, default=configs.DIRECTIONS)
    parser.add_argument("--seconds", type=float, default=0.1, help="measuring time per configuration")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    capability = torch.cuda.get_device_capability()
    calls = _calls(options)
    table = configs.tuned()
    for direction in options.directions:
        key = configs.tuned_key(capability, options.head_dim, options.dtype, direction)
        current = configs.attention_config(capability, options.head_dim, options.dtype, direction)

        def time(
            config: AttentionConfig, key: str = key, call: Callable[[], object] = calls[direction]
        ) -> Timing | None:
            before = table.get(key)
            table[key] = dataclasses.asdict(config)
            try:
                return measure([call], torch.device("cuda"), seconds=options.seconds)
            except Exception as error:  # Triton's errors for what does not fit have no common base
                print(f"  skipped    {config}: {type(error).__name__}")
                return None
            finally:
                table.pop(key) if before is None else table.__setitem__(key, before)

        print(key)
        winner = choose(current, candidates(direction, capability), time)
        if winner is not None:
            table[key] = dataclasses.asdict(winner)
    configs.TUNED_PATH.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
    print(f"{configs.TUNED_PATH}: review, run the GPU tests, commit")


def _calls(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """What to time for each direction: the operator that launches it."""
    layout = traces.trace("gduf_32k").layout.to("cuda")
    generator = torch.Generator("cuda").manual_seed(SEED)
    dtype = getattr(torch, options.dtype)
    q, k, v, grad = (
        torch.randn(layout.num_queries, heads, options.head_dim, device="cuda", dtype=dtype, generator=generator)
        for heads in (options.heads, options.kv_heads, options.kv_heads, options.heads)
    )
    mask = (layout.query_begin, layout.query_end, layout.splits, None, options.head_dim**-0.5, "triton")
    out, lse = torch.ops.unigendet.symbiotic_attention(q, k, v, *mask)
    backward = torch.ops.unigendet.symbiotic_attention_backward

    def run_backward(deterministic: bool) -> object:
        return backward(grad, None, q, k, v, out, lse, *mask, deterministic)

    return {
        "forward": lambda: torch.ops.unigendet.symbiotic_attention(q, k, v, *mask),
        "backward_dkdv": lambda: run_backward(True),
        "backward_dq": lambda: run_backward(True),
        "backward_dkdv_atomic": lambda: run_backward(False),
    }


if __name__ == "__main__":
    main()
