"""What :func:`unigendet.integrations.bagel.accelerate` puts in the place of BAGEL's forward methods.

Each class here holds functions that are bound to an instance of a class of the model. Whatever they need they find on
that instance, and the method they replace on its class.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from unigendet.integrations.fused import concatenated
from unigendet.layout import Layout
from unigendet.ops import qk_norm_rope, rms_norm, stream_linear, swiglu, symbiotic_attention

GENERATION = "_moe_gen"  # suffix of the second weight set

# Shapes: T rows; S samples; K key rows, those of a cache included.


@dataclass(frozen=True)
class SplitMask:
    """A pack's splits, in the place of the mask: per sample, (tokens, mode) of each split in order."""

    samples: tuple[tuple[tuple[int, str], ...], ...]

    @classmethod
    def of(
        cls, sample_lens: Sequence[int], split_lens: Sequence[int], attn_modes: Sequence[str], sequence_length: int
    ) -> SplitMask:
        """From the lists of a BAGEL batch; samples beyond ``sequence_length``, which are padding, are left out.

        Args:
            sample_lens: tokens of each sample.
            split_lens: tokens of each split, all samples in a row.
            attn_modes: "causal", "full" or "noise", of each split.
            sequence_length: tokens of the pack.

        Raises:
            ValueError: the lists do not fit each other.
        """
        if len(split_lens) != len(attn_modes):
            raise ValueError(f"attn_modes has {len(attn_modes)} entries; it must have one per split: {len(split_lens)}")
        samples, split, end, sequence_length = [], 0, 0, int(sequence_length)
        for i, length in enumerate(map(int, sample_lens)):
            if end == sequence_length:
                break
            first, tokens = split, 0
            while tokens < length and split < len(split_lens):
                tokens += int(split_lens[split])
                split += 1
            if tokens != length:
                raise ValueError(f"sample_lens[{i}] is {length}; it must be the sum of the sample's split_lens")
            sample = zip(map(int, split_lens[first:split]), attn_modes[first:split], strict=True)
            samples.append(tuple((n, mode) for n, mode in sample if n))
            end += length
        if end != sequence_length:
            raise ValueError(f"sequence_length is {sequence_length}; it must be the end of a sample ({end} is one)")
        return cls(tuple(sample for sample in samples if sample))


@dataclass(frozen=True, eq=False)
class Pack:
    """What every layer needs of a pass."""

    layout: Layout  # its positions number the tokens: layers get tables with a row per token
    past_rows: Tensor | None = None  # int64: the key rows of what a cache holds; None if there is nothing

    @classmethod
    def of(
        cls,
        samples: Sequence[Sequence[tuple[int, str]]],
        streams: Sequence[tuple[str, Tensor | None]] | None,
        cached: Sequence[int],
        like: Tensor,
    ) -> Pack:
        """The pack of ``samples``, of which the leading ``cached`` tokens are keys only, on the device of its rows.

        Args:
            samples: (tokens, mode) of each split, by sample.
            streams: name and value of the two lists of rows, int64, of understanding and of generation tokens (a device
                is waited for); None if all rows are understanding.
            cached: by sample.
            like: the rows [T, ...].

        Raises:
            ValueError: the rows are not as many as the splits say, or not each in one of the lists.
        """
        tokens = sum(length for sample in samples for length, _ in sample) - sum(cached)
        if tokens != len(like):
            raise ValueError(f"the pack has {len(like)} rows; it must have as many as its splits have tokens: {tokens}")
        numbers = np.zeros(tokens, np.int64)
        if streams is not None:
            rows = [np.empty(0, np.int64) if given is None else given.cpu().numpy() for _, given in streams]
            if not np.array_equal(np.sort(np.concatenate(rows)), np.arange(tokens)):
                names = " and ".join(f"{name} ({len(r)} entries)" for (name, _), r in zip(streams, rows, strict=True))
                raise ValueError(f"{names} must name each of the {tokens} rows once")
            numbers[rows[1]] = 1
        layout = Layout.from_splits(samples, streams=numbers, positions=np.arange(tokens), cached=cached)
        past = None
        if sum(cached):
            is_past = torch.ones(layout.num_keys, dtype=torch.bool).index_fill_(0, layout.key_rows, False)
            past = is_past.nonzero()[:, 0].to(like.device)
        return cls(layout.to(like.device), past)

    def stream_rows(self) -> tuple[Tensor, Tensor]:
        """(understanding, generation): the rows of each stream, once rows are sorted by stream."""
        rows = torch.arange(self.layout.num_queries, device=self.layout.device)
        return tuple(rows.split(self.layout.stream_lengths.tolist()))

    def sort(self, rows: Tensor) -> Tensor:
        """[T, ...] in sequence order → sorted by stream."""
        return rows.index_select(0, self.layout.stream_to_sequence)

    def unsort(self, result: Any) -> Any:
        """Undo :meth:`sort`; of a tuple, in each of its tensors."""
        if isinstance(result, tuple):
            return tuple(self.unsort(part) for part in result)
        return None if result is None else result.index_select(0, self.layout.sequence_to_stream)


class OuterForward:
    """Of the outer model (``Bagel``)."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Pass on the splits in the place of ``nested_attention_masks``."""
        original = type(self).forward
        call = inspect.signature(original).bind(self, *args, **kwargs)
        split_lens, attn_modes = (call.arguments.get(name) for name in ("split_lens", "attn_modes"))
        if split_lens is None or attn_modes is None:
            raise ValueError(
                "split_lens or attn_modes is None; an accelerated model must be given both, in place of dense masks "
                "(BAGEL's data sets yield them with use_flex=True)"
            )
        call.arguments["nested_attention_masks"] = SplitMask.of(
            call.arguments["sample_lens"], split_lens, attn_modes, call.arguments["sequence_length"]
        )
        return original(*call.args, **call.kwargs)


class DecoderForward:
    """Of the inner model (``Qwen2Model``). Positions and RoPE tables stay in sequence order."""

    def forward_train(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A pass over a whole pack."""
        return _whole_pack(self, type(self).forward_train, args, kwargs)

    def forward_diga(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The same, in UniGenDet's second stage; some of the results are those of a middle layer."""
        return _whole_pack(self, type(self).forward_diga, args, kwargs)

    def forward_inference(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A pass over new tokens, whose earlier ones a cache may hold."""
        original = type(self).forward_inference
        call = inspect.signature(original).bind(self, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        cache, rows = given["past_key_values"], given["packed_query_sequence"]
        lengths = given["query_lens"].tolist()
        cached = [0] * len(lengths)
        if cache is not None and cache.key_cache[0] is not None:
            cached = given["key_values_lens"].tolist()
        new = "causal" if given["is_causal"] else "full"
        samples = [[(n, m) for n, m in ((p, "full"), (q, new)) if n] for p, q in zip(cached, lengths, strict=True)]
        streams = None
        if given["mode"] == "gen":
            streams = [(name, given[name]) for name in ("packed_text_indexes", "packed_vae_token_indexes")]
        filled = [i for i, sample in enumerate(samples) if sample]
        pack = Pack.of([samples[i] for i in filled], streams, [cached[i] for i in filled], rows)
        if pack.past_rows is not None:
            _check_rows("packed_query_indexes", given["packed_query_indexes"], pack.layout.key_rows)
            _check_rows("packed_key_value_indexes", given["packed_key_value_indexes"], pack.past_rows)
        given["packed_query_indexes"] = pack  # hands it to the layers
        if streams is None:
            return original(*call.args, **call.kwargs)
        given["packed_query_sequence"] = pack.sort(rows)
        given["packed_text_indexes"], given["packed_vae_token_indexes"] = pack.stream_rows()
        output = original(*call.args, **call.kwargs)
        output.packed_query_sequence = pack.unsort(output.packed_query_sequence)
        return output


class LayerForward:
    """Of a decoder layer (``Qwen2MoTDecoderLayer``)."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The layer on sorted rows, if a replaced forward above calls it; otherwise what its class does."""
        pack = kwargs.get("attention_mask", kwargs.get("packed_query_indexes"))
        if not isinstance(pack, Pack):
            return type(self).forward(self, *args, **kwargs)
        if "packed_sequence" in kwargs:
            constant = getattr(self, "freeze_und", False)
            tables = kwargs["packed_position_embeddings"]
            out = _layer(self, kwargs["packed_sequence"], tables, pack, constant=constant)
            return _Constant.apply(out, int(pack.layout.stream_lengths[0])) if constant else out
        cache = kwargs["past_key_values"]
        tables = kwargs["packed_query_position_embeddings"]
        update = kwargs["update_past_key_values"]
        return _layer(self, kwargs["packed_query_sequence"], tables, pack, cache, update), cache


def _whole_pack(model: nn.Module, original: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    call = inspect.signature(original).bind(model, *args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    mask, rows = given["attention_mask"], given["packed_sequence"]
    if not isinstance(mask, SplitMask):
        shown = f"a list of {len(mask)} masks" if isinstance(mask, list) else f"a {type(mask).__name__}"
        raise ValueError(
            f"attention_mask is {shown}; an accelerated model must be given a SplitMask: call the outer model with "
            "split_lens and attn_modes, or pass SplitMask.of(...)"
        )
    streams = [(name, given[name]) for name in ("packed_und_token_indexes", "packed_gen_token_indexes")]
    pack = Pack.of(mask.samples, streams, [0] * len(mask.samples), rows)
    given["attention_mask"] = pack  # hands it to the layers
    given["packed_sequence"] = pack.sort(rows)
    given["packed_und_token_indexes"], given["packed_gen_token_indexes"] = pack.stream_rows()
    return pack.unsort(original(*call.args, **call.kwargs))


def _check_rows(name: str, rows: Tensor, expected: Tensor) -> None:
    if not torch.equal(rows.to(expected), expected):
        raise ValueError(f"{name} has another order; in each sample the cached tokens must come before the new ones")


class Projections(NamedTuple):
    """A layer's linear modules: of each projection, those of the understanding and of the generation weight set.

    Several modules in a row are one projection, their outputs side by side.
    """

    qkv: tuple[list[nn.Linear], list[nn.Linear]]
    out: tuple[list[nn.Linear], list[nn.Linear]]
    gate_up: tuple[list[nn.Linear], list[nn.Linear]]
    down: tuple[list[nn.Linear], list[nn.Linear]]

    @classmethod
    def of(cls, layer: nn.Module) -> Projections:
        """Those of a ``Qwen2MoTDecoderLayer``."""
        attention, mlps = layer.self_attn, (layer.mlp, getattr(layer, "mlp" + GENERATION))
        attentions = [[getattr(attention, n + s) for n in ("q_proj", "k_proj", "v_proj")] for s in ("", GENERATION)]
        outs = [[getattr(attention, "o_proj" + s)] for s in ("", GENERATION)]
        gate_ups = [[mlp.gate_proj, mlp.up_proj] for mlp in mlps]
        return cls(tuple(attentions), tuple(outs), tuple(gate_ups), tuple([mlp.down_proj] for mlp in mlps))


def hook_problems(layer: nn.Module, path: str = "") -> Iterator[str]:
    """Which modules inside a layer have hooks that :class:`LayerForward` would pass over; ``path`` precedes names."""
    for name, module in layer._modules.items():  # named_modules() takes several times as long, and passes call this
        if module is None:
            continue
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            yield f"{path}{name} has hooks, which would not run: of a layer's modules only the layer itself is called"
        yield from hook_problems(module, f"{path}{name}.")


def _layer(
    layer: nn.Module,
    x: Tensor,
    tables: tuple[Tensor, Tensor],
    pack: Pack,
    cache: Any = None,
    update: bool = False,
    constant: bool = False,
) -> Tensor:
    """A decoder layer: x [T, hidden] sorted by stream → the same. tables: cos, sin [T, head_dim], sequence order.

    ``cache`` holds earlier keys and values; with ``update`` it gets the new ones too. ``constant``: the understanding
    weights do not learn.
    """
    for problem in hook_problems(layer):
        raise ValueError(f"{problem}; restore the model before they are registered")
    projections, attention, layout = Projections.of(layer), layer.self_attn, pack.layout
    eps = layer.input_layernorm.variance_epsilon
    n = rms_norm(x, _norms(layer, "input_layernorm", constant), layout, eps=eps)
    qkv = _project(n, projections.qkv, layout, constant)
    q_norms, k_norms = _norms(attention, "q_norm", constant), _norms(attention, "k_norm", constant)
    head_dim = len(q_norms[0])
    heads, kv_heads = (module.out_features // head_dim for module in projections.qkv[0][:2])
    keys = None
    if pack.past_rows is not None:
        keys = tuple(qkv.new_empty(layout.num_keys, kv_heads, head_dim) for _ in range(2))
        for rows, past in zip(keys, (cache.key_cache, cache.value_cache), strict=True):
            rows.index_copy_(0, pack.past_rows, past[attention.layer_idx].to(rows.dtype))
    q, k, v = qk_norm_rope(
        qkv,
        q_norms,
        k_norms,
        *(table[:, : head_dim // 2] for table in tables),  # both halves of a table are the same
        layout,
        num_heads=heads,
        num_kv_heads=kv_heads,
        eps=eps,
        cache=keys,
    )
    if update:
        cache.key_cache[attention.layer_idx], cache.value_cache[attention.layer_idx] = k, v
    attended = symbiotic_attention(q, k, v, layout, out_order="stream").flatten(1)
    delta = _project(attended, projections.out, layout, constant)
    m, x = rms_norm(delta, _norms(layer, "post_attention_layernorm", constant), layout, residual=x, eps=eps)
    gate_up = _project(m, projections.gate_up, layout, constant)
    return x + _project(swiglu(gate_up), projections.down, layout, constant)


def _norms(owner: nn.Module, name: str, constant: bool) -> tuple[Tensor, Tensor]:
    understanding = getattr(owner, name).weight
    return understanding.detach() if constant else understanding, getattr(owner, name + GENERATION).weight


def _project(x: Tensor, modules: tuple[list[nn.Linear], list[nn.Linear]], layout: Layout, constant: bool) -> Tensor:
    for module in (*modules[0], *modules[1]):
        if type(module) is not nn.Linear:
            raise ValueError(
                f"a projection has become a {type(module).__name__}; it must be a Linear: restore the model before its "
                "projections are adapted or quantised"
            )
    weights, biases = [], []
    for stream, detached in zip(modules, (constant, False), strict=True):
        weight = concatenated([module.weight for module in stream])
        bias = None if stream[0].bias is None else concatenated([module.bias for module in stream])
        weights.append(weight.detach() if detached else weight)
        biases.append(bias.detach() if detached and bias is not None else bias)
    return stream_linear(x, tuple(weights), layout, biases=tuple(biases))


class _Constant(torch.autograd.Function):
    """Rows [T, ...], of which the leading ones pass no gradient on: ``freeze_und``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, constant: int) -> Tensor:
        ctx.constant = constant
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        grad[: ctx.constant] = 0
        return grad, None
