"""The decoder: Qwen2 layers with two weight sets, on a residual stream that is stream-major throughout.

    n = RMSNorm(x)      q, k, v = RoPE(RMSNorm_head(W_qkv n + b))      x ← x + W_o attention(q, k, v)
    m = RMSNorm(x)      x ← x + W_down(SiLU(W_gate m) · W_up m)

Every weight is that of the token's stream (paper section 3.1, BAGEL's mixture of transformers). The two halves of each
layer add their result to the residual inside the next norm, so a layer passes on (x, delta) with the true residual x +
delta.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from unigendet.config import ModelConfig
from unigendet.layout import Layout, Readout
from unigendet.model.cache import KVCache
from unigendet.model.recompute import run_layer
from unigendet.ops import qk_norm_rope, rms_norm, rope_table, stream_linear, swiglu, symbiotic_attention


class StreamLinear(nn.Module):
    """A linear layer with a weight set per stream; x [T, in] stream-major → [T, out]."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.und = nn.Linear(in_features, out_features, bias)
        self.gen = nn.Linear(in_features, out_features, bias)

    def forward(self, x: Tensor, layout: Layout, backend: str) -> Tensor:
        """Apply each stream's weights to its rows."""
        weights, biases = (self.und.weight, self.gen.weight), (self.und.bias, self.gen.bias)
        return stream_linear(x, weights, layout, biases=biases, backend=backend)


class StreamNorm(nn.Module):
    """The weights of an RMSNorm for both streams."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.und = nn.Parameter(torch.ones(size))
        self.gen = nn.Parameter(torch.ones(size))

    def reset_parameters(self) -> None:
        """Ones."""
        nn.init.ones_(self.und)
        nn.init.ones_(self.gen)

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """(understanding, generation)."""
        return self.und, self.gen


class DecoderLayer(nn.Module):
    """One layer: (x, delta) → (x', delta'), all [T, hidden] stream-major; the residual after it is x' + delta'."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        self.heads = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads}
        self.norm1 = StreamNorm(config.hidden_size)
        self.qkv = StreamLinear(config.hidden_size, (config.num_heads + 2 * config.num_kv_heads) * head_dim, bias=True)
        self.q_norm = StreamNorm(head_dim)
        self.k_norm = StreamNorm(head_dim)
        self.out = StreamLinear(config.num_heads * head_dim, config.hidden_size, bias=False)
        self.norm2 = StreamNorm(config.hidden_size)
        self.gate_up = StreamLinear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = StreamLinear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        layout: Layout,
        rope: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor] | None = None,
        backend: str = "auto",
        readout: Readout | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Apply the layer. ``delta`` None stands for zeros; ``cache``: this layer's k and v.

        With ``readout`` only its rows come out, in its own stream-major order: all other tokens are keys and no more.
        """
        n, x = self._norm(self.norm1, x, delta, layout, backend)
        qkv = self.qkv(n, layout, backend)
        q, k, v = qk_norm_rope(
            qkv,
            self.q_norm.weights,
            self.k_norm.weights,
            *rope,
            layout,
            **self.heads,
            eps=self.eps,
            cache=cache,
            backend=backend,
        )
        if readout is not None:
            q, x = q.index_select(0, readout.query_rows), x.index_select(0, readout.stream_rows)
            layout = readout.layout
        attended = symbiotic_attention(q, k, v, layout, out_order="stream", backend=backend)
        m, x = self._norm(self.norm2, x, self.out(attended.flatten(1), layout, backend), layout, backend)
        return x, self.down(swiglu(self.gate_up(m, layout, backend), backend=backend), layout, backend)

    def _norm(
        self, norm: StreamNorm, x: Tensor, delta: Tensor | None, layout: Layout, backend: str
    ) -> tuple[Tensor, Tensor]:
        if delta is None:
            return rms_norm(x, norm.weights, layout, eps=self.eps, backend=backend), x
        return rms_norm(delta, norm.weights, layout, residual=x, eps=self.eps, backend=backend)


class Decoder(nn.Module):
    """All layers and the final norm. ``recompute``: what layers keep for the backward pass, see ``recompute.py``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = StreamNorm(config.hidden_size)
        self.recompute = "none"
        self._rope: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def rope(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine tables on ``device``: float32 whatever the model's dtype, hence not buffers."""
        if device not in self._rope:
            config = self.config
            with torch.inference_mode(False):  # or a first call in inference mode would leave tables unfit for training
                table = rope_table(config.max_position, config.head_dim, config.rope_theta, device=device)
            self._rope[device] = table
        return self._rope[device]

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        *,
        cache: KVCache | None = None,
        capture: Collection[int] = (),
        stop_after: int | None = None,
        readout: Readout | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the layers.

        Args:
            x: embeddings [T, hidden], stream-major.
            layout: of the pack, on x's device.
            cache: keys and values of earlier tokens; new ones are written into it (no gradients then).
            capture: numbers of layers (1 = the first) whose output, before any final norm, is wanted.
            stop_after: number of layers to run; default all.
            readout: the rows that are wanted of the last layer; default all. It cannot be captured then.
            backend: for every op.

        Returns:
            The final norm's output [T, hidden], or [R, hidden] with ``readout``, and the captured outputs by layer
            number, all stream-major.

        Raises:
            ValueError: a layer number is out of range.
        """
        last = len(self.layers) if stop_after is None else stop_after
        for name, number, most in (("stop_after", last, len(self.layers)), *(("capture", n, last) for n in capture)):
            if not 1 <= number <= most:
                raise ValueError(f"{name} names layer {number}; layers are numbered 1 to {most}")
        if readout is not None and last in capture:
            raise ValueError(f"capture names the last layer, {last}, of which only the rows of readout are computed")
        rope = self.rope(x.device)
        delta: Tensor | None = None
        captured: dict[int, Tensor] = {}
        for number, layer in enumerate(self.layers[:last], start=1):
            arguments: tuple[Any, ...] = (
                x,
                delta,
                layout,
                rope,
                None if cache is None else cache.layer(number - 1),
                backend,
                readout if number == last else None,
            )
            x, delta = run_layer(layer, self.recompute, *arguments)
            if number in capture:
                x, delta = x + delta, None
                captured[number] = x
        eps = self.config.rms_norm_eps
        layout = layout if readout is None else readout.layout
        if delta is None:
            return rms_norm(x, self.norm.weights, layout, eps=eps, backend=backend), captured
        return rms_norm(delta, self.norm.weights, layout, residual=x, eps=eps, backend=backend)[0], captured
