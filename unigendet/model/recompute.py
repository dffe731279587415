"""Activation checkpointing: what a layer keeps for its backward pass, and what it computes again there.

none        everything that the gradients need
full        the layer's inputs; the whole layer runs again
attention   also the attention's output, which is small for what it costs; everything else runs again
selective   also the outputs of matrix products; only what is cheap runs again (norms, RoPE, SwiGLU)
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


def run_layer(layer: nn.Module, mode: str, *arguments: Any) -> Any:
    """``layer(*arguments)``, keeping what ``mode`` says where gradients are wanted."""
    if mode == "none" or not torch.is_grad_enabled():
        return layer(*arguments)
    contexts = {} if mode == "full" else {"context_fn": functools.partial(_contexts, mode)}
    return checkpoint(layer, *arguments, use_reentrant=False, **contexts)


def _contexts(mode: str) -> Any:
    kept = _kept(mode)

    def policy(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


@functools.cache
def _kept(mode: str) -> frozenset[Any]:
    """The operators whose outputs are kept."""
    ours, aten = torch.ops.unigendet, torch.ops.aten
    attention = {ours.symbiotic_attention.default}
    if mode == "attention":
        return frozenset(attention)
    return frozenset(attention | {ours.stream_linear.default, aten.mm.default, aten.addmm.default})
