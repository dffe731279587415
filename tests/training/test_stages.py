import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_fixtures import Samples, diga_batch, gduf_batch, tiny_config, tiny_model

from unigendet.model.losses import Counts
from unigendet.packing import pack
from unigendet.training.config import LossWeights, TrainConfig
from unigendet.training.stages import DIGAStage, GDUFStage, make_stage


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def diga(model=None, **layers):
    return DIGAStage(model or tiny_model(), **({"align_layer": 2, "teacher_layer": 3} | layers))


def with_velocity(model):
    """The velocity head starts at zero; with other weights the flow loss reaches the decoder in the first step."""
    torch.nn.init.normal_(model.llm2vae.weight, std=0.1)
    return model


def moved(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def descend(stage, batch, steps=1):
    """Plain gradient descent."""
    for step in range(steps):
        stage.losses(batch, rng(step)).total.backward()
        with torch.no_grad():
            for parameter in stage.trained.values():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None


def test_gduf_total_is_the_weighted_sum():
    stage = GDUFStage(tiny_model(), LossWeights(mse=2.0, ce=3.0, label=0.25))
    losses = stage.losses(gduf_batch(), rng())
    assert set(losses.terms) == {"mse", "ce", "label"}
    expected = 2 * losses.terms["mse"] + 3 * losses.terms["ce"] + 0.25 * losses.terms["label"]
    torch.testing.assert_close(losses.total.detach(), expected)


@pytest.mark.parametrize(("detections", "generations", "terms"), [(2, 0, {"ce", "label"}), (0, 2, {"mse"})])
def test_gduf_terms_that_the_pack_has(detections, generations, terms):
    losses = GDUFStage(tiny_model()).losses(gduf_batch(0, detections, generations), rng())
    assert set(losses.terms) == terms


def test_gduf_refuses_a_pack_without_losses():
    batch = pack([Samples().pair()[1]], tiny_config())
    with pytest.raises(ValueError, match="nothing to learn from"):
        GDUFStage(tiny_model()).losses(batch, rng())


def test_gduf_trains_everything_but_the_alignment_head():
    model = with_velocity(tiny_model())
    before = snapshot(model)
    descend(GDUFStage(model), gduf_batch())
    assert moved(model, before) == {name for name in before if not name.startswith("align_head.")}


def test_counts_of_all_ranks_scale_the_losses():
    """Two ranks that divide by both ranks' counts add up to one rank with both packs' samples."""
    model = tiny_model()
    stage, one, two = GDUFStage(model), gduf_batch(1, 1, 0), gduf_batch(2, 3, 0)
    a, b = Counts.of(one), Counts.of(two)
    both = Counts(a.targets + b.targets, a.noised + b.noised, a.labels + b.labels, a.aligned + b.aligned)
    halves = [stage.losses(batch, rng(), both).terms for batch in (one, two)]
    make = [Samples(1), Samples(2)]
    samples = [make[0].detection(0)] + [make[1].detection(i % 2) for i in range(3)]
    whole = stage.losses(pack(samples, tiny_config()), rng()).terms
    for name in ("ce", "label"):
        torch.testing.assert_close(halves[0][name] + halves[1][name], whole[name])


def test_alignment_reaches_generation_stream_and_head_only():
    """docs/model.md §12.1: the alignment loss moves the generation stream below it and φ; never what is frozen."""
    model = tiny_model()
    stage = DIGAStage(model, LossWeights(mse=0.0, diga=1.0), align_layer=2, teacher_layer=3)
    before, teacher_before = snapshot(model), snapshot(stage.teacher)
    descend(stage, diga_batch(), steps=2)
    changed = moved(model, before)
    assert changed == {
        name
        for name in before
        if name.startswith(("align_head.", "vae2llm.", "time_embedding."))
        or (name.startswith(("decoder.layers.0.", "decoder.layers.1.")) and ".gen" in name)
    }
    assert moved(stage.teacher, teacher_before) == set()


def test_diga_trains_exactly_the_generation_side():
    model = tiny_model()
    trained = diga(model).trained
    modules = ("align_head.", "vae2llm.", "llm2vae.", "time_embedding.")
    expected = {
        n
        for n, _ in model.named_parameters()
        if n.startswith(modules) or n.endswith((".gen", ".gen.weight", ".gen.bias"))
    }
    assert trained.keys() == expected
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    batch = diga_batch()
    stage = diga(with_velocity(model))
    stage.losses(batch, rng()).total.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == expected
    assert all(p.grad is None and not p.requires_grad for n, p in stage.teacher.named_parameters() if n in expected)


def test_teacher_does_not_drift():
    """docs/model.md §12.2: an image's features keep every bit during DIGA steps; the live model's do not."""
    model = tiny_model()
    stage, batch, fixed = diga(model), diga_batch(), diga_batch(9)[1]
    features = stage.features(fixed)
    live = DIGAStage(model, align_layer=2, teacher_layer=3).features(fixed)
    assert torch.equal(features, live)
    descend(stage, batch, steps=3)
    assert torch.equal(stage.features(fixed), features)
    assert not torch.equal(DIGAStage(model, align_layer=2, teacher_layer=3).features(fixed), features)


def test_teacher_shares_what_is_frozen_and_copies_what_learns():
    model = tiny_model()
    stage = diga(model, teacher_layer=2)
    own = dict(model.named_parameters())
    teacher = dict(stage.teacher.named_parameters())
    for name, parameter in teacher.items():
        assert (parameter.data_ptr() == own[name].data_ptr()) == (name not in stage.trained), name
    assert all(b.data_ptr() == dict(model.named_buffers())[n].data_ptr() for n, b in stage.teacher.named_buffers())
    assert len(stage.teacher.decoder.layers) == 2
    assert len(model.decoder.layers) == 4
    assert model.lm_head is not None
    assert not any(name.startswith(("lm_head", "llm2vae", "class_head", "align_head")) for name in teacher)
    assert stage.state_dict().keys() == {name for name in teacher if name in stage.trained}


@pytest.mark.parametrize(("align_layer", "teacher_layer"), [(1, 4), (4, 1), (2, 2)])
def test_align_and_teacher_layer_are_independent(align_layer, teacher_layer):
    stage = diga(align_layer=align_layer, teacher_layer=teacher_layer)
    losses = stage.losses(diga_batch(), rng())
    assert set(losses.terms) == {"mse", "diga"}
    total = losses.terms["mse"] + 0.5 * losses.terms["diga"]
    torch.testing.assert_close(losses.total.detach(), total)


def test_diga_without_its_weight_runs_no_teacher():
    stage = DIGAStage(tiny_model(), LossWeights(diga=0.0), align_layer=2, teacher_layer=2)
    assert stage.teacher is None
    assert stage.state_dict() == {}
    assert set(stage.losses(diga_batch(), rng()).terms) == {"mse"}


def test_diga_refuses_unsuitable_batches_and_layers():
    stage, (student, teacher) = diga(), diga_batch(0, 3)
    with pytest.raises(ValueError, match="every latent image of the batch must be noised"):
        stage.losses((teacher, teacher), rng())
    with pytest.raises(ValueError, match="has 2 ViT images; it must have one for each of the 3 latent images"):
        stage.losses((student, diga_batch(0, 2)[1]), rng())
    with pytest.raises(ValueError, match=r"teacher_layer is 5; it must be in 1\.\.4"):
        diga(teacher_layer=5)
    with pytest.raises(ValueError, match="align_head=True"):
        diga(tiny_model(align_head=False))


def test_stages_follow_one_another_on_one_model():
    model = tiny_model()
    GDUFStage(model).losses(gduf_batch(), rng()).total.backward()
    stage = make_stage(model, TrainConfig(stage="diga", align_layer=1, teacher_layer=2))
    assert all(p.grad is None for p in model.parameters())
    assert not model.lm_head.weight.requires_grad
    assert (stage.align_layer, stage.teacher_layer) == (1, 2)
    assert all(p.requires_grad or n.startswith("align_head.") for n, p in GDUFStage(model).model.named_parameters())


def test_recompute_gives_the_same_gradients():
    gradients = []
    for recompute in ("none", "full", "selective"):
        model = with_velocity(tiny_model())
        model.decoder.recompute = recompute
        GDUFStage(model).losses(gduf_batch(), rng()).total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


class Waits(TorchDispatchMode):
    """Counts the operators that make a host wait for its device."""

    NAMES = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in self.NAMES
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["gduf", "diga"])
def test_a_step_does_not_wait_more_often_for_more_samples(kind):
    """docs/model.md §12.6: nothing loops over the elements of device tensors; the counted reads are of CPU tables."""
    counts = []
    for size in (2, 7):
        model = tiny_model()
        stage = GDUFStage(model) if kind == "gduf" else diga(model)
        batch = gduf_batch(0, size, size) if kind == "gduf" else diga_batch(0, size)
        with Waits() as waits:
            stage.losses(batch, rng()).total.backward()
        counts.append(waits.count)
    assert counts[0] == counts[1]
    assert counts[0] <= 4


def test_label_rows_are_part_of_the_pack():
    """docs/model.md §12.6: the real/fake head reads rows that packing computed."""
    batch = gduf_batch(0, 3, 1)
    rows = batch.layout.stream_to_sequence[batch.label_rows]
    before_the_answer = (16 + 2) + (16 + 2) + (4 + 2)  # latent image, ViT image, question
    assert torch.equal(rows, batch.layout.cu_seqlens_q[:3].long() + before_the_answer)
    assert batch.labels.tolist() == [0, 1, 0]
