"""One decoder layer, forward and backward with the gradients of all its weights, against the published way.

The layer passes its result on as two summands, which the next norm adds; here they are added at the end, as every other
layer does, at this one's cost. The published layer works in sequence order and gets its input in it. Results are judged
on a sample of each kind.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from unigendet.config import ModelConfig
from unigendet.layout import Layout
from unigendet.model import flops
from unigendet.model.transformer import DecoderLayer
from unigendet.model.unigendet import init_weights
from unigendet.ops import rope_table
from unigendet.ops.backends import resolve

from . import packs, traces
from .candidate import Candidate, incoming
from .contest import Case, Work
from .judge import Truth, allowances
from .published import PublishedLayer, PublishedPack, rope_of
from .stream_case import random

OP = "decoder_layer"
ERROR_FACTOR = 4.0  # as for attention, which it holds
LARGEST_DENSE = 4096  # tokens that are judged by the dense definition; more of them by PyTorch's operations


def case(
    device: torch.device,
    dtype: torch.dtype,
    trace: traces.Trace,
    config: ModelConfig,
    *,
    directions: Collection[str] = ("forward", "backward", "both"),
    columns: Mapping[str, Any] | None = None,
) -> Case:
    """A layer with random weights on a trace's pack; x [T, hidden] is stream-major."""
    layout = trace.layout.to(device)
    counted = flops.decoder_layer(config, trace.layout)
    work = {"forward": counted.forward, "backward": counted.backward, "both": counted.total}

    def inputs(seed: int) -> tuple[Tensor]:
        return (random(device, dtype, seed)(layout.num_queries, config.hidden_size).requires_grad_(),)

    candidates = {
        default_backend(device): lambda: own_layer(new_layer(config, device, dtype), layout, config),
        "published": lambda: published_layer(new_layer(config, device, dtype), trace, layout, config),
    }
    return Case(
        OP,
        f"hidden {config.hidden_size}, {config.num_heads}/{config.num_kv_heads} heads, MLP {config.intermediate_size}",
        dtype,
        inputs,
        {name: Work(work[name]) for name in directions},
        candidates,
        frozenset({"published"}),
        truth=lambda case, inputs: _truth(trace, layout, config, inputs[0]),
        trace=trace.name,
        columns=columns or {},
        sets=2,  # weights and activations exceed any cache
    )


def new_layer(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> DecoderLayer:
    """The same random weights every time, rounded to ``dtype``."""
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]), torch.device(device):
        torch.manual_seed(0)
        layer = DecoderLayer(config)
        init_weights(layer)
    return layer.to(dtype)


def default_backend(device: torch.device) -> str:
    """What ``auto`` chooses for attention, which stands for the layer: its linear layers are PyTorch's everywhere."""
    return resolve("symbiotic_attention", "auto", torch.empty(1, 1, 1, device=device))


def own_layer(layer: DecoderLayer, layout: Layout, config: ModelConfig, backend: str = "auto") -> Candidate:
    """Ours, on a layout of its device."""
    device = layout.device
    tables = rope_table(layout.max_position + 1, config.head_dim, config.rope_theta, device=device)

    def function(x: Tensor) -> Tensor:
        x, delta = layer(x, None, layout, tables, backend=backend)
        return x + delta

    return Candidate(function, parameters=tuple(layer.parameters()))


def published_layer(layer: DecoderLayer, trace: traces.Trace, layout: Layout, config: ModelConfig) -> Candidate:
    """The published way with the same weights, in sequence order."""
    dtype, device = next(layer.parameters()).dtype, layout.device
    own = PublishedLayer.of(layer, config)
    pack = PublishedPack.of(packs.pack_of(trace, config), trace.splits, dtype).to(device)
    rope = rope_of(pack, config, dtype)
    return Candidate(
        lambda x: own(x, pack, rope),
        arrange=lambda x: x.index_select(0, layout.sequence_to_stream),
        restore=lambda x: x.index_select(0, layout.stream_to_sequence),
        parameters=tuple(own.parameters()),
    )


def _truth(trace: traces.Trace, layout: Layout, config: ModelConfig, x: Tensor) -> Truth:
    """The rows of a sample of each kind, in float64 by the definition of every op, and in x's dtype as published."""
    starts = layout.cu_seqlens_q.tolist()
    small = trace.part(trace.judged())
    sub = small.layout.to(x.device)
    # Their rows, stream-major in the pack, in their own stream-major order.
    in_sequence = torch.cat([layout.sequence_to_stream[starts[i] : starts[i + 1]] for i in trace.judged()])
    rows = in_sequence[sub.stream_to_sequence]
    gradient = incoming([x.detach()])[0][rows]

    def results(candidate: Candidate, dtype: torch.dtype) -> dict[str, Tensor]:
        leaf = candidate.arrange(x.detach()[rows].to(dtype)).requires_grad_()
        out = candidate.function(leaf)
        (found,) = torch.autograd.grad(out, leaf, candidate.arrange(gradient.to(dtype)))
        return {"output 0": candidate.restore(out.detach()), "gradient 0": candidate.restore(found)}

    layer = new_layer(config, x.device, x.dtype)
    plain = results(published_layer(layer, small, sub, config), x.dtype)
    definition = "reference" if sub.num_queries <= LARGEST_DENSE else "torch"
    exact = results(own_layer(layer.double(), sub, config, definition), torch.float64)
    return Truth(exact, allowances(exact, plain, ERROR_FACTOR), lambda _, value: value[rows])


def cases(device: torch.device, size: str) -> Iterator[Case]:
    """BAGEL-7B's width in bfloat16 on GPUs, widths that two cores can do in float32 on CPUs."""
    if size == "tiny":
        config = packs.small_config(32, 1, heads=4, kv_heads=2, intermediate=48)
        yield case(device, torch.float32, traces.tiny(), config)
    elif device.type == "cuda":
        yield case(device, torch.bfloat16, traces.trace("gduf_32k"), packs.bagel_width(1))
        yield case(device, torch.bfloat16, traces.trace("diga_23k"), packs.bagel_width(1))
    else:
        directions = ("forward", "backward", "both") if size == "full" else ("both",)
        if size == "full":
            yield case(device, torch.float32, traces.trace("gduf_4k"), packs.small_config(layers=1))
        small = traces.trace("many_small_16k")
        yield case(device, torch.float32, small, packs.quickstart_config(), directions=directions)
