"""Models of hidden size 32 with random weights for the tests of inference, and random segments for them."""

import torch

from unigendet.config import LatentConfig, ModelConfig, SpecialTokens, VisionConfig
from unigendet.model.unigendet import UniGenDet
from unigendet.packing import LatentImage, Text, VitImage

VOCAB = 48


def tiny_config(**changes):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "vocab_size": VOCAB,
        "rope_theta": 1e4,
        "max_position": 128,
        "vision": VisionConfig(16, 24, 1, 2, patch_size=2, max_patches_per_side=5, num_channels=1),
        "latent": LatentConfig(channels=1, downsample=1, patch_size=2, max_size=4, autoencoder="pixels"),
        "special_tokens": SpecialTokens(0, 1, 2, 3),
    }
    return ModelConfig(**(sizes | changes))


def tiny_model(seed=0, **changes):
    """Weights that let every input matter: texts and images move the outputs by as much as the noise does."""
    torch.manual_seed(seed)
    model = UniGenDet(tiny_config(**changes))
    torch.nn.init.normal_(model.llm2vae.weight, std=0.2)
    torch.nn.init.normal_(model.embed_tokens.weight, std=0.7)
    return model.eval()


class Segments:
    """Random segments, all from one generator."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def text(self, length=4):
        return Text(tuple(torch.randint(4, VOCAB, (length,), generator=self.generator).tolist()))

    def latent(self, rows=2, columns=3):
        return LatentImage(self.normal(1, 2 * rows, 2 * columns))

    def vit(self, rows=3, columns=2):
        return VitImage(self.normal(1, 2 * rows, 2 * columns))
