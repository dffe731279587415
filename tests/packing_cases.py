"""The model that test packs are for, and images for them."""

import torch

from unigendet.config import LatentConfig, ModelConfig, SpecialTokens, VisionConfig

BOS, EOS, BEGIN, END = 0, 1, 2, 3
CONFIG = ModelConfig(
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    vocab_size=50,
    max_position=64,
    vision=VisionConfig(
        hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, patch_size=2, max_patches_per_side=3
    ),
    latent=LatentConfig(channels=4, patch_size=2, max_size=5),
    special_tokens=SpecialTokens(bos=BOS, eos=EOS, start_of_image=BEGIN, end_of_image=END),
)


def image(channels, rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed * 100 + rows * 10 + columns)
    return torch.randn(channels, 2 * rows, 2 * columns, generator=generator)
