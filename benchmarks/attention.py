"""``symbiotic_attention``: every backend and its peers over the standard traces.

In bfloat16 with 28 query heads, 4 key/value heads and head_dim 128 on GPUs, with small heads in float32 on CPUs; and
the ViT's attention, full within each image, with its 16 heads of 72. Useful work is 4·head_dim·heads operations for
every visible pair forward and 2.5 times that backward, as is customary: the scores, which nobody keeps, are computed
again. Results are judged on a sample of each kind and two groups of heads. cuDNN's dense attention on the same machine
is shown as a ceiling of another kind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from unigendet.ops import symbiotic_attention
from unigendet.ops.backends import resolve

from . import traces
from .attention_peers import PEERS, Peer, Setting, cudnn_dense, eager
from .candidate import Candidate, incoming, why_not
from .contest import Case, Work
from .harness import CannotRun
from .judge import Truth, allowances
from .stream_case import random

OP = "symbiotic_attention"
DIRECTIONS = {"forward": 1.0, "backward": 2.5, "both": 3.5}  # work, in units of the forward pass
ERROR_FACTOR = 4.0  # as in the tests of attention
DENSE_LENGTHS = (8192, 16384)
LARGEST_DENSE = 16384  # tokens of a sample that is judged by the dense definition
GPU_TRACES = ("gduf_32k", "diga_23k", "gduf_64k", "text_only_8k", "many_small_16k")


def backend(name: str, **options: Any) -> Peer:
    """A backend of the op itself."""

    def setup(setting: Setting) -> Candidate:
        return Candidate(lambda q, k, v: symbiotic_attention(q, k, v, setting.layout, backend=name, **options))

    return setup


OURS: dict[str, Peer] = {
    "triton": backend("triton"),
    "triton_atomic": backend("triton", deterministic=False),
    "flash": backend("flash"),
    "torch": backend("torch"),
    "cpp": backend("cpp"),
}
FOR_CPUS = ("torch", "cpp")


def case(
    device: torch.device,
    dtype: torch.dtype,
    trace: traces.Trace,
    heads: tuple[int, int],
    head_dim: int,
    *,
    directions: tuple[str, ...] = tuple(DIRECTIONS),
    only: Collection[str] | None = None,
    columns: Mapping[str, Any] | None = None,
) -> Case:
    """Attention over a trace's pack; ``heads`` are (Hq, Hkv); ``only``: candidates (default: all).

    ``columns``: more columns of every row.
    """
    setting = Setting(trace, device, *heads, head_dim)
    tokens, pairs = trace.layout.num_queries, trace.layout.visible_pairs()

    def inputs(seed: int) -> tuple[Tensor, ...]:
        make = random(device, dtype, seed)
        return tuple(make(tokens, h, head_dim).requires_grad_() for h in (heads[0], heads[1], heads[1]))

    flops = 4 * head_dim * heads[0] * pairs
    size = 2 * dtype.itemsize * tokens * head_dim * sum(heads)  # of q, k, v and the output
    sizes = {"forward": size, "backward": 2 * size, "both": 3 * size}
    names = [name for name in (*OURS, *PEERS) if name not in FOR_CPUS or device.type != "cuda"]
    return Case(
        OP,
        f"{heads[0]}/{heads[1]} heads of {head_dim}",
        dtype,
        inputs,
        work={d: Work(DIRECTIONS[d] * flops, sizes[d]) for d in directions},
        candidates={name: _made(name, setting, dtype) for name in names if only is None or name in only},
        peers=frozenset(PEERS),
        truth=functools.partial(_truth, setting),
        trace=trace.name,
        columns=columns or {},
        # Compute decides, not memory; and graphs of many sets at once, each with its dense scores, make peers slow.
        sets=3,
    )


def _made(name: str, setting: Setting, dtype: torch.dtype) -> Callable[[], Candidate]:
    if name in PEERS:
        return lambda: PEERS[name](setting)

    def make() -> Candidate:
        probe = torch.empty(1, setting.heads, setting.head_dim, device=setting.device, dtype=dtype)
        try:
            resolve(OP, name.partition("_")[0], probe)
        except ValueError as error:
            raise CannotRun(why_not(error)) from error
        return OURS[name](setting)

    return make


def _truth(setting: Setting, case: Case, inputs: tuple[Tensor, ...]) -> Truth:
    """What some samples and the first and the last group of heads give in float64, and how far off others may be."""
    starts = setting.layout.cu_seqlens_q.tolist()
    group = setting.heads // setting.kv_heads
    parts = [
        (slice(starts[i], starts[i + 1]), slice(kv * group, (kv + 1) * group), slice(kv, kv + 1))
        for i in setting.trace.judged()
        for kv in sorted({0, setting.kv_heads - 1})
    ]
    settings = [
        Setting(setting.trace.part([i]), setting.device, group, 1, setting.head_dim)
        for i in setting.trace.judged()
        for _ in range(min(2, setting.kv_heads))
    ]
    gradient = incoming([inputs[0].detach()])[0]

    def results(make: Callable[[Setting], Candidate], dtype: torch.dtype) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        for own, (rows, heads, kv) in zip(settings, parts, strict=True):
            chosen = zip(inputs, (heads, kv, kv), strict=True)
            q, k, v = (x.detach()[rows, h].to(dtype).requires_grad_() for x, h in chosen)
            out = make(own).function(q, k, v)
            gradients = torch.autograd.grad(out, (q, k, v), gradient[rows, heads].to(dtype))
            for name, x in zip(("output 0", *(f"gradient {i}" for i in range(3))), (out, *gradients), strict=True):
                found.setdefault(name, []).append(x.detach().flatten())
        return {name: torch.cat(pieces) for name, pieces in found.items()}

    def select(name: str, x: Tensor) -> Tensor:
        of_queries = name in ("output 0", "gradient 0")
        return torch.cat([x[rows, heads if of_queries else kv].flatten() for rows, heads, kv in parts])

    exact = results(lambda own: backend(_definition(own))(own), torch.float64)
    plain = results(lambda own: eager(own) if _definition(own) == "reference" else backend("torch")(own), case.dtype)
    return Truth(exact, allowances(exact, plain, ERROR_FACTOR), select)


def _definition(setting: Setting) -> str:
    """The backend that says what is right: of samples whose scores fit no memory, PyTorch's, which goes by chunks."""
    return "reference" if setting.trace.layout.num_queries <= LARGEST_DENSE else "torch"


def dense_case(device: torch.device, dtype: torch.dtype, length: int, *, causal: bool) -> Case:
    """cuDNN over one dense sequence, 28 heads of 128."""
    mode = "causal" if causal else "full"
    trace = traces.Trace(f"dense_{mode}_{length}", ((traces.Segment(length, mode),),))
    made = case(device, dtype, trace, (28, 28), 128, only=())
    setting = Setting(trace, device, 28, 28, 128)
    return Case(
        "dense_attention",
        made.shape,
        dtype,
        made.inputs,
        made.work,
        candidates={"cudnn": functools.partial(cudnn_dense, setting, causal=causal)},
        peers=frozenset({"cudnn"}),
        truth=None,
        trace=trace.name,
    )


def vit_trace(trace: traces.Trace) -> traces.Trace:
    """The ViT's own pack for the ViT images of a trace: one full split per image, without delimiters."""
    images = [s for sample in trace.samples for s in sample if s.grid is not None and not s.latent]
    return traces.Trace(f"{trace.name}_vit", tuple((traces.Segment(s.tokens - 2, "full"),) for s in images))


def cases(device: torch.device, size: str) -> Iterator[Case]:
    """The standard traces on GPUs, those that two cores can do in seconds on CPUs."""
    if size == "tiny":
        yield case(device, torch.float32, traces.tiny(), (4, 2), 16)
        return
    if device.type == "cuda":
        for name in GPU_TRACES:
            yield case(device, torch.bfloat16, traces.trace(name), (28, 4), 128)
        yield case(device, torch.bfloat16, vit_trace(traces.trace("gduf_32k")), (16, 16), 72)
        for length in DENSE_LENGTHS:
            for causal in (False, True):
                yield dense_case(device, torch.bfloat16, length, causal=causal)
        return
    directions = tuple(DIRECTIONS) if size == "full" else ("forward", "backward")
    small = traces.trace("many_small_16k")
    yield case(device, torch.float32, small, (4, 2), 32, directions=directions)  # the quickstart's heads
    yield case(device, torch.float32, traces.trace("gduf_4k"), (8, 2), 64, directions=directions)
    if size == "full":
        yield case(device, torch.float32, traces.trace("text_only_8k"), (8, 2), 64)
        yield case(device, torch.float32, vit_trace(traces.trace("gduf_4k")), (4, 4), 72)
