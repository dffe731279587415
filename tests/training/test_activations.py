"""The plan's activation memory against what autograd really keeps."""

import functools

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from training_fixtures import diga_batch, gduf_batch, tiny_config

from unigendet.config import VisionConfig
from unigendet.model.unigendet import UniGenDet
from unigendet.training.activations import Precision, activations
from unigendet.training.config import TrainConfig
from unigendet.training.sizes import RunSizes
from unigendet.training.stages import DIGAStage, GDUFStage

# The formulas leave out what the real/fake head keeps: of one row per sample, of which a test's pack has many for its
# size. Everything else is counted.
TOLERANCE = 0.005
PRECISIONS = {"fp32": Precision.of("fp32", False), "bf16": Precision.of("bf16", True)}
SAVED = {"unigendet::stream_linear", "unigendet::symbiotic_attention", "aten::addmm"}


def config(**changes):
    vision = VisionConfig(48, 72, 3, 4, patch_size=2, max_patches_per_side=4, num_channels=1)
    sizes = {"hidden_size": 96, "intermediate_size": 168, "num_heads": 6, "num_kv_heads": 2, "vocab_size": 300}
    return tiny_config(**sizes, vision=vision, **changes)


def new_model(precision="fp32", **changes):
    torch.manual_seed(0)
    model = UniGenDet(config(**changes))
    return model.bfloat16() if precision == "bf16" else model


class Selective:
    """Checkpoint contexts that keep the outputs of matrix products and attention, and what they keep."""

    def __init__(self):
        self.modes = []

    def __call__(self):
        contexts = create_selective_checkpoint_contexts(self.policy)
        self.modes.append(contexts[0])
        return contexts

    @staticmethod
    def policy(_, op, *__, **___):
        return CheckpointPolicy.MUST_SAVE if op.name().partition(".")[0] in SAVED else CheckpointPolicy.PREFER_RECOMPUTE

    def tensors(self):
        """What is kept; how a mode lays it out differs between versions of PyTorch."""
        kept, left = [], [mode.storage for mode in self.modes]
        while left:
            value = left.pop()
            if isinstance(value, dict):
                left += value.values()
            elif isinstance(value, list | tuple):
                left += value
            elif isinstance(tensor := getattr(value, "val", None), torch.Tensor):
                kept.append(tensor)
        return kept


def kept_bytes(model, loss, selective=()):
    """Bytes of all floating-point storages that ``loss()`` keeps for its backward pass, but parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    own |= {t.untyped_storage().data_ptr() for t in model.decoder.rope("cpu")}
    saved = []  # holds the tensors, so that no storage is used twice
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = loss()
    for one in selective:
        saved += one.tensors()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved if t.is_floating_point()}
    assert result.requires_grad
    return sum(size for place, size in storages.items() if place not in own)


def recomputed(layer, contexts=None):
    """Make ``layer`` a checkpointed one."""
    options = {} if contexts is None else {"context_fn": contexts}
    layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, **options)


def prepare(model, decoder, vision):
    """Recompute as the two policies say; returns the contexts of the selective ones."""
    contexts = []
    for layers, policy in ((model.decoder.layers, decoder), (model.vision.layers, vision)):
        for layer in layers if policy != "none" else ():
            contexts += [Selective()] * (policy == "selective")
            recomputed(layer, contexts[-1] if policy == "selective" else None)
    return contexts


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("decoder", "vision"), [("none", "none"), ("full", "none"), ("full", "full")])
def test_gduf(precision, decoder, vision):
    model, batch = new_model(precision), gduf_batch(detections=12, generations=12, config=config())
    stage = GDUFStage(model)
    contexts = prepare(model, decoder, vision)
    have = kept_bytes(model, lambda: stage.losses(batch, generator()).total, contexts)
    found = activations(model.config, batch, PRECISIONS[precision], decoder, vision_recompute=vision)
    assert found.kept == pytest.approx(have, rel=TOLERANCE)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("vision", ["none", "selective"])
def test_selective(precision, vision):
    model, batch = new_model(precision), gduf_batch(detections=12, generations=12, config=config())
    stage = GDUFStage(model)
    contexts = prepare(model, "selective", vision)
    have = kept_bytes(model, lambda: stage.losses(batch, generator()).total, contexts)
    found = activations(model.config, batch, PRECISIONS[precision], "selective", vision_recompute=vision)
    assert found.kept == pytest.approx(have, rel=TOLERANCE)


@pytest.mark.parametrize("projector", ["mlp", "conv"])
@pytest.mark.parametrize("decoder", ["none", "full", "selective"])
@pytest.mark.parametrize("layer", [2, 4])
def test_diga(projector, decoder, layer):
    model = new_model(align_projector=projector)
    batch = diga_batch(images=24, config=config())
    stage = DIGAStage(model, align_layer=layer, teacher_layer=3)
    contexts = prepare(model, decoder, "none")
    have = kept_bytes(model, lambda: stage.losses(batch, generator()).total, contexts)
    found = activations(model.config, batch[0], PRECISIONS["fp32"], decoder, captured=layer, teacher=batch[1])
    assert found.kept == pytest.approx(have, rel=TOLERANCE)


@pytest.mark.parametrize("decoder", ["none", "full"])
def test_autocast(decoder):
    """A float32 residual stream, and copies of the weights."""
    model, batch = new_model(), gduf_batch(detections=12, generations=12, config=config())
    stage = GDUFStage(model)
    prepare(model, decoder, "none")

    def loss():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return stage.losses(batch, generator()).total

    have = kept_bytes(model, loss)
    sizes = RunSizes.of(TrainConfig(), model.config)
    copies = sizes.autocast_copies(decoder)
    if decoder == "full":  # no layer is computed again at this moment
        copies -= sum(p.numel() for p in model.decoder.layers[0].parameters() if p.dim() > 1)
    found = activations(model.config, batch, Precision.of("bf16", False), decoder)
    assert found.kept + 2 * copies == pytest.approx(have, rel=TOLERANCE)
