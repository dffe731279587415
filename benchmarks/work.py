"""The convention by which the utilisation of BAGEL's training is stated.

It is coarser than the exact count of ``unigendet.model.flops``, which the other utilisations are of.
"""

from __future__ import annotations

from collections.abc import Sequence

from unigendet.config import ModelConfig
from unigendet.model.flops import layer_weights


def published_convention(config: ModelConfig, tokens: int, sample_lengths: Sequence[int]) -> float:
    """Operations of a step as published for BAGEL: 6·N·tokens + 12·d·Σ length².

    N is the number of weights in one stream's linear layers of the decoder, the embedding table and ``lm_head``; d is
    layers · heads · head_dim. So every token counts as predicting one, every pair within a sample as visible, and the
    ViT as nothing.
    """
    weights = config.num_layers * layer_weights(config) + 2 * config.vocab_size * config.hidden_size
    width = config.num_layers * config.num_heads * config.head_dim
    return float(6 * weights * tokens + 12 * width * sum(length**2 for length in sample_lengths))
