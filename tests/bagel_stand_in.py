"""A small model with the attributes and call signatures of BAGEL's, computing as plainly as can be.

Rows stay in sequence order. Whatever has two weight sets takes the rows of each, and puts the results back; attention
is one masked product per sample, with keys and values repeated. What the integration must not change is what this
computes; what it must fit are names and signatures.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Sizes:
    """Of a model."""

    hidden: int = 32
    mlp: int = 48
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 40
    latent: int = 6
    freeze_und: bool = False


class Cache:
    """Keys and values [rows, kv_heads, head_dim] of every layer; None before there are any."""

    def __init__(self, layers: int) -> None:
        self.key_cache = dict.fromkeys(range(layers))
        self.value_cache = dict.fromkeys(range(layers))


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.2 * torch.randn(size))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)).to(
            x.dtype
        )


class Mlp(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden, sizes.mlp, bias=False)
        self.up_proj = nn.Linear(sizes.hidden, sizes.mlp, bias=False)
        self.down_proj = nn.Linear(sizes.mlp, sizes.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@dataclass
class Streams:
    """The rows of each weight set in a pass of T rows, and whether those of understanding are constants."""

    und: Tensor
    gen: Tensor
    constant: bool = False

    def apply(self, owner: nn.Module, name: str, x: Tensor) -> Tensor:
        """Module ``name`` of ``owner``, of each row's weight set, on x [T, ...]."""
        parts = [getattr(owner, name)(x[self.und]), getattr(owner, name + "_moe_gen")(x[self.gen])]
        out = torch.zeros(len(x), *parts[0].shape[1:], dtype=parts[0].dtype)
        return out.index_put((self.und,), parts[0].detach() if self.constant else parts[0]).index_put(
            (self.gen,), parts[1]
        )


def turn(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE; x [T, heads, D], rope [T, D] each."""
    first, second = x.chunk(2, -1)
    return x * rope[0][:, None] + torch.cat((-second, first), -1) * rope[1][:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """q [n, Hq, D], k and v [m, Hkv, D], visible bool [n, m] → [n, Hq · D]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)[0].transpose(0, 1).flatten(1)


class Attention(nn.Module):
    def __init__(self, sizes: Sizes, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, sizes.hidden // sizes.heads
        for suffix in ("", "_moe_gen"):
            for name, heads in (("q", sizes.heads), ("k", sizes.kv_heads), ("v", sizes.kv_heads)):
                setattr(self, f"{name}_proj{suffix}", nn.Linear(sizes.hidden, heads * self.head_dim))
            setattr(self, f"o_proj{suffix}", nn.Linear(sizes.hidden, sizes.hidden, bias=False))
            setattr(self, f"q_norm{suffix}", Norm(self.head_dim))
            setattr(self, f"k_norm{suffix}", Norm(self.head_dim))

    def heads(self, x: Tensor, rope: tuple[Tensor, Tensor], streams: Streams) -> list[Tensor]:
        """q, k, v [T, heads, D]."""
        q, k, v = (streams.apply(self, f"{n}_proj", x).unflatten(1, (-1, self.head_dim)) for n in "qkv")
        q, k = (turn(streams.apply(self, name, y), rope) for name, y in (("q_norm", q), ("k_norm", k)))
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else v.dtype
        return [y.to(dtype) for y in (q, k, v)]

    def train_pass(self, x: Tensor, masks: list[Tensor], rope: tuple[Tensor, Tensor], streams: Streams) -> Tensor:
        lengths = [len(mask) for mask in masks]
        parts = zip(*(y.split(lengths) for y in self.heads(x, rope, streams)), masks, strict=True)
        return streams.apply(self, "o_proj", torch.cat([attend(*part) for part in parts]))

    def inference_pass(self, x: Tensor, rope: tuple[Tensor, Tensor], streams: Streams, given: dict) -> Tensor:
        q, k, v = self.heads(x, rope, streams)
        cache, lengths = given["past_key_values"], given["query_lens"].tolist()
        before = [0] * len(lengths)
        if cache is not None and cache.key_cache[self.layer_idx] is not None:
            before = given["key_values_lens"].tolist()
            merged = []
            for new, old in ((k, cache.key_cache[self.layer_idx]), (v, cache.value_cache[self.layer_idx])):
                rows = new.new_zeros(len(new) + len(old), *new.shape[1:])
                rows[given["packed_query_indexes"]] = new
                rows[given["packed_key_value_indexes"]] = old
                merged.append(rows)
            k, v = merged
        total = [a + b for a, b in zip(before, lengths, strict=True)]
        parts = zip(q.split(lengths), k.split(total), v.split(total), before, strict=True)
        out = []
        for queries, keys, values, past in parts:
            visible = torch.ones(len(queries), len(keys), dtype=torch.bool)
            out.append(attend(queries, keys, values, visible.tril(past) if given["is_causal"] else visible))
        if given["update_past_key_values"]:
            cache.key_cache[self.layer_idx], cache.value_cache[self.layer_idx] = k, v
        return streams.apply(self, "o_proj", torch.cat(out))


class Layer(nn.Module):
    """In the place of ``Qwen2MoTDecoderLayer``."""

    def __init__(self, sizes: Sizes, layer_idx: int) -> None:
        super().__init__()
        self.freeze_und = sizes.freeze_und
        self.self_attn = Attention(sizes, layer_idx)
        for suffix in ("", "_moe_gen"):
            setattr(self, f"mlp{suffix}", Mlp(sizes))
            setattr(self, f"input_layernorm{suffix}", Norm(sizes.hidden))
            setattr(self, f"post_attention_layernorm{suffix}", Norm(sizes.hidden))

    def forward(self, *args, **kwargs):
        return (self.forward_train if self.training else self.forward_inference)(*args, **kwargs)

    def forward_train(
        self,
        packed_sequence,
        sample_lens,
        attention_mask,
        packed_position_embeddings,
        packed_und_token_indexes,
        packed_gen_token_indexes,
    ):
        streams = Streams(packed_und_token_indexes, packed_gen_token_indexes, self.freeze_und)
        n = streams.apply(self, "input_layernorm", packed_sequence)
        x = packed_sequence + self.self_attn.train_pass(n, attention_mask, packed_position_embeddings, streams)
        return x + streams.apply(self, "mlp", streams.apply(self, "post_attention_layernorm", x))

    def forward_inference(
        self,
        packed_query_sequence,
        query_lens,
        packed_query_position_embeddings,
        packed_query_indexes,
        past_key_values=None,
        key_values_lens=None,
        packed_key_value_indexes=None,
        update_past_key_values=True,
        is_causal=True,
        mode="und",
        packed_vae_token_indexes=None,
        packed_text_indexes=None,
    ):
        x, given = packed_query_sequence, dict(locals())
        streams = inference_streams(x, mode, packed_text_indexes, packed_vae_token_indexes)
        n = streams.apply(self, "input_layernorm", x)
        x = x + self.self_attn.inference_pass(n, packed_query_position_embeddings, streams, given)
        x = x + streams.apply(self, "mlp", streams.apply(self, "post_attention_layernorm", x))
        return x, past_key_values


def inference_streams(x: Tensor, mode: str, text: Tensor | None, vae: Tensor | None) -> Streams:
    none = torch.empty(0, dtype=torch.int64)
    return Streams(text, vae) if mode == "gen" else Streams(torch.arange(len(x)), none)


class Decoder(nn.Module):
    """In the place of ``Qwen2Model``."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_act="silu", freeze_und=sizes.freeze_und)
        self.head_dim = sizes.hidden // sizes.heads
        self.embed_tokens = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.layers = nn.ModuleList(Layer(sizes, i) for i in range(sizes.layers))
        self.norm, self.norm_moe_gen = Norm(sizes.hidden), Norm(sizes.hidden)

    def rotary_emb(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tables [T, head_dim] in x's dtype."""
        frequency = 100.0 ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)
        angle = (positions[:, None] * frequency).repeat(1, 2)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)

    def forward(self, *args, **kwargs):
        return (self.forward_train if self.training else self.forward_inference)(*args, **kwargs)

    def forward_diga(
        self,
        packed_sequence,
        sample_lens,
        attention_mask,
        packed_position_ids,
        packed_und_token_indexes=None,
        packed_gen_token_indexes=None,
        diga_layer_break=False,
    ):
        if packed_gen_token_indexes is None:
            packed_gen_token_indexes = packed_und_token_indexes.new_empty(0)
        streams = Streams(packed_und_token_indexes, packed_gen_token_indexes, self.config.freeze_und)
        x = packed_sequence
        if streams.constant:
            x = x.index_put((streams.und,), x[streams.und].detach())
        rope = self.rotary_emb(x, packed_position_ids)
        middle = None
        for i, layer in enumerate(self.layers):
            x = layer(
                packed_sequence=x,
                sample_lens=sample_lens,
                attention_mask=attention_mask,
                packed_position_embeddings=rope,
                packed_und_token_indexes=packed_und_token_indexes,
                packed_gen_token_indexes=packed_gen_token_indexes,
            )
            if i == 1:
                middle = x.clone()
                if diga_layer_break:
                    break
        x = streams.apply(self, "norm", x)
        return x if diga_layer_break else (middle, x)

    def forward_train(
        self,
        packed_sequence,
        sample_lens,
        attention_mask,
        packed_position_ids,
        packed_und_token_indexes=None,
        packed_gen_token_indexes=None,
    ):
        pack = (packed_sequence, sample_lens, attention_mask, packed_position_ids)
        return Decoder.forward_diga(self, *pack, packed_und_token_indexes, packed_gen_token_indexes)[1]

    def forward_inference(
        self,
        packed_query_sequence,
        query_lens,
        packed_query_position_ids,
        packed_query_indexes,
        past_key_values=None,
        key_values_lens=None,
        packed_key_value_indexes=None,
        update_past_key_values=True,
        is_causal=True,
        mode="und",
        packed_vae_token_indexes=None,
        packed_text_indexes=None,
    ):
        x = packed_query_sequence
        rope = self.rotary_emb(x, packed_query_position_ids)
        for layer in self.layers:
            x, past_key_values = layer(
                packed_query_sequence=x,
                query_lens=query_lens,
                packed_query_position_embeddings=rope,
                packed_query_indexes=packed_query_indexes,
                past_key_values=past_key_values,
                key_values_lens=key_values_lens,
                packed_key_value_indexes=packed_key_value_indexes,
                update_past_key_values=update_past_key_values,
                is_causal=is_causal,
                mode=mode,
                packed_vae_token_indexes=packed_vae_token_indexes,
                packed_text_indexes=packed_text_indexes,
            )
        streams = inference_streams(x, mode, packed_text_indexes, packed_vae_token_indexes)
        x = streams.apply(self, "norm", x)
        return SimpleNamespace(packed_query_sequence=x, past_key_values=past_key_values)


class CausalLM(nn.Module):
    """In the place of ``Qwen2ForCausalLM``."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.model = Decoder(sizes)
        self.lm_head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False)

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def forward_inference(self, **kwargs):
        return self.model(**kwargs)

    def forward_diga(self, **kwargs):
        return self.model.forward_diga(**kwargs)


class Outer(nn.Module):
    """In the place of ``Bagel``: text ids and latents in, hidden states out."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.language_model = CausalLM(sizes)
        self.vae2llm = nn.Linear(sizes.latent, sizes.hidden)
        self.built_masks = 0

    def forward(
        self,
        sequence_length,
        packed_text_ids,
        packed_text_indexes,
        sample_lens,
        packed_position_ids,
        nested_attention_masks=None,
        split_lens=None,
        attn_modes=None,
        packed_latents=None,
        packed_vae_token_indexes=None,
    ):
        x = self.vae2llm.weight.new_zeros(sequence_length, self.vae2llm.out_features)
        x[packed_text_indexes] = self.language_model.model.embed_tokens(packed_text_ids)
        if packed_latents is not None:
            x[packed_vae_token_indexes] = self.vae2llm(packed_latents).to(x.dtype)
        if nested_attention_masks is None:
            self.built_masks += 1
            nested_attention_masks = dense_masks(sample_lens, split_lens, attn_modes, sequence_length)
        return self.language_model(
            packed_sequence=x,
            sample_lens=sample_lens,
            attention_mask=nested_attention_masks,
            packed_position_ids=packed_position_ids,
            packed_und_token_indexes=packed_text_indexes,
            packed_gen_token_indexes=packed_vae_token_indexes,
        )


def dense_masks(sample_lens, split_lens, attn_modes, sequence_length) -> list[Tensor]:
    """Which token sees which [n, n], bool, of every sample up to ``sequence_length``."""
    number = torch.repeat_interleave(torch.arange(len(split_lens)), torch.tensor(split_lens))[:sequence_length]
    is_causal, is_noise = (torch.tensor([mode == m for mode in attn_modes])[number] for m in ("causal", "noise"))
    same = number[:, None] == number
    sees = torch.ones(len(number), len(number), dtype=torch.bool).tril() | (same & ~is_causal)
    sees &= same | ~is_noise
    bounds = [0, *torch.tensor(sample_lens).cumsum(0).tolist()]
    pairs = [(a, b) for a, b in pairwise(bounds) if a < b <= sequence_length]
    return [sees[a:b, a:b] for a, b in pairs]
