"""DIGA's options: a standardised or shuffled teacher, a convolution as φ, a weight that falls."""

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from training_fixtures import Batches, Samples, diga_batch, tiny_config, tiny_model

from unigendet.config import ModelConfig
from unigendet.model.alignment import ConvProjector, image_groups, standardise_tokens
from unigendet.model.checkpoint import CheckpointError, load_pretrained, save_pretrained
from unigendet.model.losses import latent_rows
from unigendet.packing import LatentImage, Sample, Text, VitImage, pack
from unigendet.training.config import LossWeights, ModelSource, OptimizerConfig, TrainConfig
from unigendet.training.metrics import TIMING
from unigendet.training.run import build_model
from unigendet.training.stages import DIGAStage, make_stage
from unigendet.training.trainer import Trainer

SIZES = ((2, 3), (1, 4), (2, 3), (1, 1))
TOKENS = sum(h * w for h, w in SIZES)
CONFIG = TrainConfig(
    stage="diga", total_steps=6, align_layer=2, teacher_layer=3, optimizer=OptimizerConfig(lr=1e-2, eps=1e-8)
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def images(rows, sizes=SIZES):
    return rows.split([h * w for h, w in sizes])


def diga(model=None, weights=None, **options):
    return DIGAStage(model or tiny_model(), weights, **({"align_layer": 2, "teacher_layer": 3} | options))


def rows_by_image(stage, batch):
    """φ's rows, φ being the MLP, and the teacher's, each as a list by image."""
    student, teacher = batch
    model = stage.model
    latents = stage._noised(student, rng())
    output = model(student, latent_tokens=latents.tokens, timesteps=latents.timesteps, capture=(stage.align_layer,))
    projected = model.align_head(output.captured[stage.align_layer][latent_rows(student)])
    features = stage.features(teacher)
    return images(projected, student.latent_sizes), list(images(features, teacher.vit_sizes))


def cosine(students, student_sizes, teachers, teacher_sizes):
    """1 − mean cosine of every image's tokens to its teacher, resized."""
    total = 0.0
    for s, (h, w), t, (th, tw) in zip(students, student_sizes, teachers, teacher_sizes, strict=True):
        grid = F.interpolate(t.T.reshape(1, -1, th, tw), (h, w), mode="bilinear", align_corners=False)
        total = total + (1 - F.cosine_similarity(s, grid.flatten(2)[0].T)).sum()
    return total / sum(h * w for h, w in student_sizes)


def test_groups_of_one_size():
    groups = {size: rows.tolist() for size, rows in image_groups(SIZES, "cpu")}
    assert groups == {(2, 3): [[0, 1, 2, 3, 4, 5], [10, 11, 12, 13, 14, 15]], (1, 4): [[6, 7, 8, 9]], (1, 1): [[16]]}


def test_standardised_tokens():
    features = torch.randn(TOKENS, 5, generator=rng(), dtype=torch.float64) * 3 + 7
    expected = torch.cat([(x - x.mean(0)) / (x.var(0, correction=0) + 1e-6).sqrt() for x in images(features)])
    result = standardise_tokens(features, SIZES)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    assert not result[-1].any()  # an image of one token
    low = standardise_tokens(features.bfloat16(), SIZES)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, standardise_tokens(features.bfloat16().float(), SIZES))
    with pytest.raises(ValueError, match="rows has 17 rows; it must have 16, the tokens of sizes"):
        standardise_tokens(features, SIZES[:3])


def test_standardised_teacher_in_the_loss():
    stage, batch = diga(teacher_norm="tokens"), diga_batch(0, 3)
    students, teachers = rows_by_image(stage, batch)
    teachers = [(t - t.mean(0)) / (t.var(0, correction=0) + 1e-6).sqrt() for t in teachers]
    expected = cosine(students, batch[0].latent_sizes, teachers, batch[1].vit_sizes)
    torch.testing.assert_close(stage.losses(batch, rng()).terms["diga"], expected.detach())
    assert not torch.isclose(expected, diga().losses(batch, rng()).terms["diga"], rtol=1e-3)


def test_shuffled_teacher_is_the_next_image():
    """A control: with one image more in turn, no image meets its own teacher."""
    stage, batch = diga(shuffled_teacher=True), diga_batch(0, 3)
    students, teachers = rows_by_image(stage, batch)
    turn = lambda items: [*items[1:], items[0]]  # noqa: E731
    expected = cosine(students, batch[0].latent_sizes, turn(teachers), turn(batch[1].vit_sizes))
    torch.testing.assert_close(stage.losses(batch, rng()).terms["diga"], expected.detach())
    with pytest.raises(ValueError, match="the pack has 1 image; with shuffled_teacher it must have at least 2"):
        stage.losses(diga_batch(0, 1), rng())


def test_shuffled_teacher_with_grids_of_different_sizes():
    """Rows and grids move together."""
    make = Samples(3)
    students, samples = [], []
    for i, size in enumerate(((4, 3), (2, 4), (3, 3))):
        student = make.generation(f"{i}", (2 + i, 4))
        students.append(student)
        own = LatentImage(student.segments[1].latent)
        samples.append(Sample((own, Text(make.ids()), VitImage(make.image(*size)))))
    batch = (pack(students, tiny_config()), pack(samples, tiny_config()))
    stage = diga(shuffled_teacher=True, teacher_norm="tokens")
    by_image, teachers = rows_by_image(stage, batch)
    teachers = [(t - t.mean(0)) / (t.var(0, correction=0) + 1e-6).sqrt() for t in teachers]
    turn = lambda items: [*items[1:], items[0]]  # noqa: E731
    expected = cosine(by_image, batch[0].latent_sizes, turn(teachers), turn(batch[1].vit_sizes))
    torch.testing.assert_close(stage.losses(batch, rng()).terms["diga"], expected.detach())


def conv_by_hand(rows, weight, bias):
    """Every token's nine neighbours, one after another."""
    result = []
    for x, (h, w) in zip(images(rows), SIZES, strict=True):
        x = x.view(h, w, -1)
        for i in range(h):
            for j in range(w):
                near = [(i + a - 1, j + b - 1, a, b) for a in range(3) for b in range(3)]
                inside = [weight[:, :, a, b] @ x[y, z] for y, z, a, b in near if 0 <= y < h and 0 <= z < w]
                result.append(bias + sum(inside))
    return torch.stack(result)


def test_convolution_over_packed_images():
    torch.manual_seed(0)
    phi = ConvProjector(4).double()
    rows = torch.randn(TOKENS, 4, dtype=torch.float64, generator=rng(), requires_grad=True)
    parameters = [rows, phi.conv.weight, phi.conv.bias]
    expected = conv_by_hand(*parameters)
    result = phi(rows, SIZES)
    torch.testing.assert_close(result, expected)
    seed = torch.randn(TOKENS, 4, dtype=torch.float64, generator=rng(1))
    theirs = torch.autograd.grad((expected * seed).sum(), parameters)
    for ours, wanted in zip(torch.autograd.grad((result * seed).sum(), parameters), theirs, strict=True):
        torch.testing.assert_close(ours, wanted)
    assert torch.autograd.gradcheck(lambda x: phi(x, SIZES), (rows,))
    with pytest.raises(ValueError, match="rows has 16 rows; it must have 17"):
        phi(rows[:16], SIZES)


def test_conv_projector_learns_and_its_neighbours_are_the_image_s_own():
    model = tiny_model(align_projector="conv")
    stage, batch = diga(model, LossWeights(mse=0.0, diga=1.0)), diga_batch(0, 3)
    assert {n for n in stage.trained if n.startswith("align_head")} == {
        "align_head.conv.weight",
        "align_head.conv.bias",
    }
    student = batch[0]
    hidden = torch.randn(student.layout.num_queries, 32, generator=rng(), requires_grad=True)
    rows = latent_rows(student)
    out = images(model.align(hidden, rows, student.latent_sizes), student.latent_sizes)
    (gradient,) = torch.autograd.grad(out[1].sum(), hidden)
    first, second = (h * w for h, w in student.latent_sizes[:2])
    assert gradient.abs().sum(1).nonzero()[:, 0].tolist() == rows[first : first + second].tolist()
    before = stage.losses(batch, rng())
    before.total.backward()
    with torch.no_grad():
        for parameter in stage.trained.values():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    assert stage.losses(batch, rng()).total < before.total


def test_projector_is_a_setting_of_the_model():
    assert ModelConfig.from_dict(tiny_config(align_projector="conv").to_dict()).align_projector == "conv"
    old = tiny_config().to_dict()
    del old["align_projector"]  # written before there was a choice
    assert ModelConfig.from_dict(old) == tiny_config()
    with pytest.raises(ValueError, match="align_projector is 'linear'; it must be 'mlp' or 'conv'"):
        tiny_config(align_projector="linear")


def test_projector_in_files(tmp_path):
    """It has a name of its own, and φ of another form is replaced only on request."""
    conv = tiny_model(1, align_projector="conv")
    save_pretrained(conv, tmp_path / "conv")
    assert {n for n in load_file(tmp_path / "conv" / "model.safetensors") if n.startswith("diga")} == {
        "diga_conv.weight",
        "diga_conv.bias",
    }
    again = load_pretrained(tmp_path / "conv")
    assert torch.equal(again.align_head.conv.weight, conv.align_head.conv.weight)
    mlp = tiny_model(2)
    save_pretrained(mlp, tmp_path / "mlp")
    config = tiny_config(align_projector="conv")
    want = r"2 missing: diga_conv.weight, diga_conv.bias; 4 unexpected: diga_mlp.0.* To start diga_conv afresh, name"
    with pytest.raises(CheckpointError, match=want):
        load_pretrained(tmp_path / "mlp", config=config)
    with pytest.raises(ValueError, match=r"model\.initialize\) names \['diga_mlp'\]"):
        load_pretrained(tmp_path / "mlp", config=config, initialize=["diga_mlp"])
    torch.manual_seed(5)
    fresh = load_pretrained(tmp_path / "mlp", config=config, initialize=["diga_conv"])
    assert torch.equal(fresh.vae2llm.weight, mlp.vae2llm.weight)
    assert not fresh.align_head.conv.bias.any()
    assert 0.8 < fresh.align_head.conv.weight.std() * (9 * 32) ** 0.5 < 1.2
    stray = load_file(tmp_path / "mlp" / "model.safetensors") | {"diga_other.weight": torch.zeros(1)}
    save_file(stray, tmp_path / "mlp" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"Tensors 1 unexpected: diga_other.weight\. The weights must be"):
        load_pretrained(tmp_path / "mlp", config=config, initialize=["diga_conv"])
    with pytest.raises(CheckpointError, match=r"5 unexpected: .*diga_other.weight\. The weights must be those"):
        load_pretrained(tmp_path / "mlp", config=config)


def test_projector_that_is_missing_alone(tmp_path):
    save_pretrained(tiny_model(1, align_head=False), tmp_path)
    with pytest.raises(CheckpointError, match=r"Tensors 2 missing: .*\. To start diga_conv afresh, name them in init"):
        load_pretrained(tmp_path, config=tiny_config(align_projector="conv"))
    save_pretrained(tiny_model(1), tmp_path / "mlp")
    config = tiny_config(align_head=False)  # nothing is missing, and starting afresh no remedy
    with pytest.raises(CheckpointError, match=r"Tensors 4 unexpected: diga_mlp.0.bias, .*\. The weights must be those"):
        load_pretrained(tmp_path / "mlp", config=config)


def test_projector_of_a_run(tmp_path):
    save_pretrained(tiny_model(2), tmp_path)
    source = ModelSource(checkpoint=str(tmp_path), align_projector="conv", initialize=("diga_conv",))
    assert build_model(TrainConfig(stage="diga", model=source), None, "cpu").config.align_projector == "conv"
    kept = dataclasses.replace(source, align_projector=None, initialize=())
    assert build_model(TrainConfig(stage="diga", model=kept), None, "cpu").config.align_projector == "mlp"
    refused = dataclasses.replace(source, initialize=())
    with pytest.raises(CheckpointError, match="diga_conv"):
        build_model(TrainConfig(stage="diga", model=refused), None, "cpu")


@pytest.mark.parametrize(
    ("schedule", "until", "expected"),
    [
        ("constant", 1.0, [0.5] * 5),
        ("linear", 1.0, [0.5, 0.375, 0.25, 0.125, 0.05]),
        ("linear", 0.5, [0.5, 0.25, 0.0, 0.0, 0.0]),
        ("cosine", 0.5, [0.5, 0.25, 0.0, 0.0, 0.0]),
        ("cosine", 1.0, [0.25 * (1 + math.cos(math.pi * p)) for p in (0, 0.25, 0.5, 0.75, 0.9)]),
    ],
)
def test_weight_of_the_alignment(schedule, until, expected):
    weights = LossWeights(diga=0.5, diga_schedule=schedule, diga_until=until)
    assert [weights.alignment(p) for p in (0, 0.25, 0.5, 0.75, 0.9)] == pytest.approx(expected, abs=1e-15)


def test_falling_weight_in_the_loss():
    """The total follows the weight of the step; the reported term is the same; at zero no teacher runs."""
    weights = LossWeights(mse=2.0, diga=0.5, diga_schedule="linear", diga_until=0.5)
    stage, batch = diga(weights=weights), diga_batch()
    terms = stage.losses(batch, rng()).terms
    for progress, weight in ((0.0, 0.5), (0.25, 0.25), (0.4, 0.1)):
        stage.progress = progress
        losses = stage.losses(batch, rng())
        torch.testing.assert_close(losses.terms, terms)
        torch.testing.assert_close(losses.total.detach(), 2 * terms["mse"] + weight * terms["diga"])
    stage.progress, stage.teacher = 0.5, None
    losses = stage.losses(batch, rng())
    assert set(losses.terms) == {"mse"}
    assert torch.equal(losses.total.detach(), 2 * losses.terms["mse"])


def trainer(model=None, **settings):
    config = dataclasses.replace(CONFIG, **settings)
    return Trainer(make_stage(model or tiny_model(), config), Batches(diga_batch), config, quiet=True)


def test_the_trainer_tells_the_stage_where_it_is():
    made = trainer(losses=LossWeights(diga=1.0, diga_schedule="linear", diga_until=0.5))
    history = made.run().history
    assert ["diga" in row for row in history] == [True, True, True, False, False, False]
    shares = [(row["loss"] - row["mse"]) / row["diga"] for row in history[:3]]
    assert shares == pytest.approx([1, 2 / 3, 1 / 3], rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"teacher_norm": "tokens", "losses": LossWeights(diga_schedule="cosine", diga_until=0.9)},
        {"shuffled_teacher": True, "projector": "conv"},
    ],
)
def test_resumed_run_is_the_run(options, tmp_path):
    options = dict(options)
    model = lambda: tiny_model(align_projector=options.get("projector", "mlp"))  # noqa: E731
    settings = {name: value for name, value in options.items() if name != "projector"}
    whole = trainer(model(), **settings)
    whole.run()
    first = trainer(model(), output=str(tmp_path), **settings)
    path = first.run(until=3).checkpoint
    second = trainer(load_pretrained(path / "model"), output=str(tmp_path), **settings)
    second.resume(path)
    second.run()
    rows = [[{k: v for k, v in row.items() if k not in TIMING} for row in made.history] for made in (whole, second)]
    assert rows[0] == rows[1]
    for a, b in zip(whole.state.model.parameters(), second.state.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_is_bound_to_its_teacher(tmp_path):
    path = trainer(teacher_norm="tokens", output=str(tmp_path)).run(until=1).checkpoint
    with pytest.raises(CheckpointError, match="'teacher_norm': 'tokens'"):
        trainer().resume(path)
    assert make_stage(tiny_model(), CONFIG).identity == {"stage": "diga", "align_layer": 2, "teacher_layer": 3}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(teacher_norm="image"), "teacher_norm is 'image'; it must be 'none' or 'tokens'"),
        (lambda: LossWeights(diga_schedule="step"), "losses.diga_schedule is 'step'; it must be one of"),
        (lambda: LossWeights(diga_until=0.0), r"losses.diga_until is 0.0; it must be in \(0, 1\]"),
    ],
)
def test_settings_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()
