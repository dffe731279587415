"""Fused operations of the model as plain functions on tensors, under autograd, autocast and ``torch.compile``.

One file per op: its maths, its ``torch.library`` contract, its reference implementation and its choice of backend
(:mod:`unigendet.ops.backends`). Kernels are imported when they are called, never here.
"""

from unigendet.ops.alignment_loss import alignment_loss
from unigendet.ops.flow_matching import flow_matching, flow_matching_loss
from unigendet.ops.grids import ImageGrids, LatentGrids
from unigendet.ops.qk_norm_rope import qk_norm_rope, rope_table
from unigendet.ops.rms_norm import rms_norm
from unigendet.ops.stream_linear import stream_linear
from unigendet.ops.swiglu import swiglu
from unigendet.ops.symbiotic_attention import symbiotic_attention

__all__ = [
    "ImageGrids",
    "LatentGrids",
    "alignment_loss",
    "flow_matching",
    "flow_matching_loss",
    "qk_norm_rope",
    "rms_norm",
    "rope_table",
    "stream_linear",
    "swiglu",
    "symbiotic_attention",
]
