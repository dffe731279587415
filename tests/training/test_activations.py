"""The plan's activation memory against what autograd really keeps."""

import pytest
import torch
from training_fixtures import diga_batch, gduf_batch, tiny_config

from unigendet.config import VisionConfig
from unigendet.model import recompute
from unigendet.model.unigendet import UniGenDet
from unigendet.training.activations import Precision, activations
from unigendet.training.config import TrainConfig
from unigendet.training.sizes import RunSizes
from unigendet.training.stages import DIGAStage, GDUFStage

# The formulas leave out what the real/fake head keeps: of one row per sample, of which a test's pack has many for its
# size. Everything else is counted.
TOLERANCE = 0.005
POLICIES = ("none", "full", "attention", "selective")
PRECISIONS = {"fp32": Precision.of("fp32", False), "bf16": Precision.of("bf16", True)}


def config(**changes):
    vision = VisionConfig(48, 72, 3, 4, patch_size=2, max_patches_per_side=4, num_channels=1)
    sizes = {"hidden_size": 96, "intermediate_size": 168, "num_heads": 6, "num_kv_heads": 2, "vocab_size": 300}
    return tiny_config(**sizes, vision=vision, **changes)


def new_model(precision="fp32", policy="none", **changes):
    torch.manual_seed(0)
    model = UniGenDet(config(**changes))
    model.decoder.recompute = model.vision.recompute = policy
    return model.bfloat16() if precision == "bf16" else model


@pytest.fixture
def selected(monkeypatch):
    """The contexts that selective recomputation makes, which hold what it keeps."""
    modes, make = [], recompute._contexts
    monkeypatch.setattr(recompute, "_contexts", lambda mode: modes.append(make(mode)) or modes[-1])
    return modes


def tensors_of(modes):
    """What selective recomputation keeps; how it is laid out differs between versions of PyTorch."""
    kept, left = [], [mode.storage for mode, _ in modes]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
        elif isinstance(tensor := getattr(value, "val", None), torch.Tensor):
            kept.append(tensor)
    return kept


def kept_bytes(model, loss, modes=()):
    """Bytes of all floating-point storages that ``loss()`` keeps for its backward pass, but parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    own |= {t.untyped_storage().data_ptr() for t in model.decoder.rope("cpu")}
    saved = []  # holds the tensors, so that no storage is used twice
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = loss()
    saved += tensors_of(modes)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved if t.is_floating_point()}
    assert result.requires_grad
    return sum(size for place, size in storages.items() if place not in own)


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("policy", POLICIES)
def test_gduf(precision, policy, selected):
    model, batch = new_model(precision, policy), gduf_batch(detections=12, generations=12, config=config())
    stage = GDUFStage(model)
    have = kept_bytes(model, lambda: stage.losses(batch, generator()).total, selected)
    assert bool(selected) == (policy in ("attention", "selective"))
    found = activations(model.config, batch, PRECISIONS[precision], policy)
    assert found.kept == pytest.approx(have, rel=TOLERANCE)


@pytest.mark.parametrize("projector", ["mlp", "conv"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("layer", [2, 4])
def test_diga(projector, policy, layer, selected):
    model = new_model(policy=policy, align_projector=projector)
    batch = diga_batch(images=24, config=config())
    stage = DIGAStage(model, align_layer=layer, teacher_layer=3)
    have = kept_bytes(model, lambda: stage.losses(batch, generator()).total, selected)
    found = activations(model.config, batch[0], PRECISIONS["fp32"], policy, captured=layer, teacher=batch[1])
    assert found.kept == pytest.approx(have, rel=TOLERANCE)


@pytest.mark.parametrize("policy", ["none", "full"])
def test_autocast(policy):
    """A float32 residual stream, and copies of the weights."""
    model, batch = new_model(policy=policy), gduf_batch(detections=12, generations=12, config=config())
    stage = GDUFStage(model)

    def loss():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return stage.losses(batch, generator()).total

    have = kept_bytes(model, loss)
    copies = RunSizes.of(TrainConfig(), model.config).autocast_copies(policy)
    if policy == "full":  # no layer is computed again at this moment
        copies -= sum(p.numel() for p in model.decoder.layers[0].parameters() if p.dim() > 1)
    found = activations(model.config, batch, Precision.of("bf16", False), policy)
    assert found.kept + 2 * copies == pytest.approx(have, rel=TOLERANCE)
