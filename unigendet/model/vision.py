"""The packed ViT (SigLIP): patches of many images in one row, full attention within each image only.

Patches are flattened in (row in patch, column in patch, channel) order; the learned position embedding is indexed by
row · max_patches_per_side + column. Pre-LayerNorm encoder layers, then a LayerNorm.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from unigendet.config import VisionConfig
from unigendet.layout import Layout
from unigendet.model.embeddings import Mlp
from unigendet.model.recompute import run_layer
from unigendet.ops import symbiotic_attention


class VisionLayer(nn.Module):
    """Pre-LayerNorm attention and MLP; x [Nv, hidden]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, layout: Layout, backend: str = "auto") -> Tensor:
        """One encoder layer over the images of ``layout`` (one full split each)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(1, (3, self.heads, -1)).unbind(1)
        x = x + self.out(symbiotic_attention(q, k, v, layout, backend=backend).flatten(1))
        return x + self.mlp(self.norm2(x))


class VisionEncoder(nn.Module):
    """patches [Nv, patch_dim] → features [Nv, hidden]. ``recompute``: as the ``Decoder``'s."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(config.patch_dim, config.hidden_size)
        self.position_embedding = nn.Embedding(config.positions, config.hidden_size)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.recompute = "none"

    def forward(self, patches: Tensor, positions: Tensor, layout: Layout, backend: str = "auto") -> Tensor:
        """Encode the patches of all images; positions int64 [Nv] index the position embedding."""
        x = self.patch_embedding(patches.to(self.patch_embedding.weight.dtype)) + F.embedding(
            positions, self.position_embedding.weight
        )
        for layer in self.layers:
            x = run_layer(layer, self.recompute, x, layout, backend)
        return self.norm(x)
