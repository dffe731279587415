"""A model of hidden size 32 and random samples for it."""

import torch

from unigendet.config import LatentConfig, ModelConfig, SpecialTokens, VisionConfig
from unigendet.model.unigendet import UniGenDet
from unigendet.packing import LatentImage, Sample, Text, VitImage, pack


def tiny_config(**changes):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 4, "num_heads": 2, "num_kv_heads": 1}
    vision = VisionConfig(16, 24, 1, 2, patch_size=2, max_patches_per_side=4, num_channels=1)
    latent = LatentConfig(channels=1, downsample=1, patch_size=2, max_size=4, autoencoder="pixels")
    special = SpecialTokens(0, 1, 2, 3)
    other = {"vocab_size": 40, "rope_theta": 1e4, "max_position": 64, "special_tokens": special}
    return ModelConfig(**(sizes | other | {"vision": vision, "latent": latent} | changes))


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    return UniGenDet(tiny_config(**changes))


class Samples:
    """Random samples, all from one generator."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def image(self, rows=4, columns=4):
        return torch.randn(1, 2 * rows, 2 * columns, generator=self.generator)

    def ids(self, count=4):
        return tuple(torch.randint(4, 40, (count,), generator=self.generator).tolist())

    def detection(self, label=1, name="detection"):
        image = self.image()
        question, answer = Text(self.ids()), Text(self.ids(5), loss=True)
        return Sample((LatentImage(image), VitImage(image), question, answer), label, name)

    def generation(self, name="generation", size=(3, 4)):
        return Sample((Text(self.ids(), droppable=True), LatentImage(self.image(*size), noised=True)), name=name)

    def pair(self, name="pair", size=(3, 4)):
        student = self.generation(name, size)
        teacher = (LatentImage(student.segments[1].latent), Text(self.ids(6)), VitImage(self.image(4, 3)))
        return student, Sample(teacher, name=name)


def gduf_batch(seed=0, detections=2, generations=2, config=None):
    make = Samples(seed)
    samples = [make.detection(i % 2, f"detection {seed}.{i}") for i in range(detections)]
    samples += [make.generation(f"generation {seed}.{i}") for i in range(generations)]
    return pack(samples, config or tiny_config())


def diga_batch(seed=0, images=2, config=None):
    make = Samples(seed)
    pairs = [make.pair(f"pair {seed}.{i}", size=(2 + i % 3, 4)) for i in range(images)]
    return tuple(pack(samples, config or tiny_config()) for samples in zip(*pairs, strict=True))


class Batches:
    """Endless batches by number, with a position like a loader's."""

    def __init__(self, make=gduf_batch):
        self.make, self.position = make, 0

    def __iter__(self):
        while True:
            self.position += 1
            yield self.make(self.position)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]
