"""Parity with the published implementation on small random models, for every golden file and backend.

``pytest tests/test_golden.py --golden-dir DIR`` runs the ``*.safetensors`` of another folder.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from golden import Golden, relative_error
from unigendet.kernels import config as configs

from unigendet.config import GuidanceConfig
from unigendet.inference.detect import DetectionRequest, detect_packed
from unigendet.inference.generate import GenerationRequest, generate_latents
from unigendet.model.checkpoint import published_names
from unigendet.model.losses import (
    align_loss,
    clean_latents,
    gduf_losses,
    noise_latents,
    shift_timesteps,
)
from unigendet.ops import ImageGrids, backends
from unigendet.packing import LatentImage, Text, VitImage, pack

LOSS, STATE, FLOOR = 1e-5, 1e-4, 1e-6  # relative; relative; absolute (gradients that are truly zero)


def check(name, actual, expected, bound):
    error = relative_error(actual, expected)
    size = (actual.double() - expected.double()).norm()
    assert error <= bound or size <= FLOOR, f"{name}: relative error {error:.2e}, bound {bound}"


def check_gradients(golden, model):
    expected = golden.named("grad.")
    actual = {}
    for name, parameter in model.named_parameters():
        names = published_names(name)
        if parameter.grad is None:
            continue
        config = model.config
        qkv = [config.num_heads * config.head_dim] + [config.num_kv_heads * config.head_dim] * 2
        sizes = (
            qkv if name.startswith("decoder.") and ".qkv." in name else [parameter.shape[0] // len(names)] * len(names)
        )
        actual.update(zip(names, parameter.grad.split(sizes), strict=True))
    assert set(expected) <= set(actual)
    for name, gradient in expected.items():
        got = actual[name]
        if name.endswith("embed_tokens.weight"):  # the published table had padding_idx=0: its row 0 has no gradient
            got, gradient = got[1:], gradient[1:]
        check(f"grad.{name}", got, gradient, STATE)


def timesteps_of(golden, batch):
    """u per latent token → shifted t per latent image."""
    first = torch.zeros(len(batch.latent_sizes), dtype=torch.int64).scatter_reduce(
        0, batch.latent_image, torch.arange(len(batch.latent_image)), "amin", include_self=False
    )
    return shift_timesteps(golden["timestep_logits"][first].sigmoid(), golden.metadata["config"]["timestep_shift"])


def run_gduf(golden, model):
    batch = pack([golden.sample(s) for s in golden.metadata["samples"]], model.config)
    check_packing(golden, batch)
    latents = noised(golden, model, batch)
    output = model(batch, latent_tokens=latents.tokens, timesteps=latents.timesteps)
    losses = gduf_losses(model, batch, output, latents)
    assert losses
    for name, key in (("mse", "out.mse"), ("ce", "out.ce"), ("label", "out.label_ce")):
        if name in losses:
            check(name, losses[name], golden[key], LOSS)
    if "label" in losses:
        check("class_logits", model.class_logits(output.hidden, batch.label_rows), golden["out.class_logits"], STATE)
    total = sum(weight * losses[name] for name, weight in (("mse", 1), ("ce", 1), ("label", 0.2)) if name in losses)
    hidden = output.hidden.index_select(0, batch.layout.sequence_to_stream)
    check("last_hidden_state", hidden, golden["out.last_hidden_state"], STATE)
    check("total", total, golden["out.total"], LOSS)
    total.backward()
    check_gradients(golden, model)


def noised(golden, model, batch):
    if not batch.latent_sizes:
        return noise_latents(model, batch, None, None)
    return noise_latents(model, batch, timesteps_of(golden, batch), golden["noise"])


def check_packing(golden, batch):
    layout, und = batch.layout, int(batch.layout.stream_lengths[0])
    rows = layout.stream_to_sequence
    kinds = torch.ones(layout.num_queries, dtype=torch.bool)
    kinds[rows[batch.vit_rows]] = False
    kinds[rows[und:]] = False
    actual = {
        "packed_text_ids": batch.text_ids,
        "packed_text_indexes": kinds.nonzero()[:, 0],
        "packed_position_ids": layout.positions,
        "packed_latent_position_ids": batch.latent_positions,
        "packed_vit_position_ids": batch.vit_positions,
        "packed_vit_tokens": batch.vit_patches,
        "packed_vit_token_indexes": rows[batch.vit_rows],
        "packed_vae_token_indexes": rows[und:],
        "vit_token_seqlens": torch.tensor([h * w for h, w in batch.vit_sizes]),
        "packed_label_ids": batch.targets,
        "ce_loss_indexes": rows[batch.target_rows],
        "mse_loss_indexes": rows[und + batch.noised_tokens],
    }
    expected = golden.named("packed.")
    for name, value in actual.items():
        if name in expected:
            assert torch.equal(value, expected[name]), name
    mask, bounds = layout.dense_mask(), layout.cu_seqlens_q.tolist()
    for i in range(layout.num_samples):
        if f"mask.{i}" in expected:
            inside = slice(bounds[i], bounds[i + 1])
            assert torch.equal(mask[inside, inside], expected[f"mask.{i}"]), f"mask.{i}"


def run_diga(golden, model):
    samples = golden.metadata["samples"]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            any(n in name for n in ("align_head", "vae2llm", "llm2vae", "time_embedding")) or ".gen" in name
        )
    layer = int(golden.metadata["align_layer"])
    batch = pack([golden.sample(s) for s in samples], model.config)
    teacher_batch = pack([golden.sample(s["teacher"]) for s in samples], model.config)
    latents = noised(golden, model, batch)
    output = model(batch, latent_tokens=latents.tokens, timesteps=latents.timesteps, capture=(layer,))
    with torch.no_grad():
        clean = clean_latents(model, teacher_batch)
        teacher = model(teacher_batch, latent_tokens=clean.tokens, timesteps=clean.timesteps, stop_after=layer).hidden
    grids = ImageGrids.from_sizes([(*s, *t) for s, t in zip(batch.latent_sizes, teacher_batch.vit_sizes, strict=True)])
    mse = gduf_losses(model, batch, output, latents)["mse"]
    align = align_loss(model, batch, output.captured[layer], teacher.index_select(0, teacher_batch.vit_rows), grids)
    check("mse", mse, golden["out.mse"], LOSS)
    check("diga", align, golden["out.diga"], LOSS)
    total = mse + 0.5 * align
    check("total", total, golden["out.total"], LOSS)
    total.backward()
    check_gradients(golden, model)


def run_inference(golden, model):
    ask = golden.metadata["generate"]
    guidance = GuidanceConfig(
        num_timesteps=ask["num_timesteps"],
        text_scale=ask["cfg_text_scale"],
        image_scale=ask["cfg_image_scale"],
        interval=tuple(ask["cfg_interval"]),
        renorm_min=ask["cfg_renorm_min"],
        timestep_shift=ask["timestep_shift"],
    )
    request = GenerationRequest((Text(ask["prompt_ids"]),), tuple(ask["image_size"]))
    for renorm in ("global", "channel", "text_channel"):
        if f"out.latent.{renorm}" in golden.tensors:
            chosen = dataclasses.replace(guidance, renorm=renorm)
            (tokens,) = generate_latents(model, [request], chosen, noise=[golden["init_noise"]])
            check(f"latent.{renorm}", tokens, golden[f"out.latent.{renorm}"], STATE)
    ask = golden.metadata["detect"]
    for name, latent in (("with_latents", LatentImage(golden["latent"])), ("without_latents", None)):
        request = DetectionRequest(VitImage(golden["vit"]), Text(ask["question_ids"]), latent)
        (output,) = detect_packed(model, [request], max_new_tokens=ask["max_new_tokens"] - 1)
        expected = golden[f"out.tokens.{name}"].tolist()
        tokens = [model.config.special_tokens.bos, *output.ids, *[model.config.special_tokens.eos] * output.ended]
        assert tokens[: len(expected)] == expected, name
        check(f"class_logits.{name}", output.class_logits[None], golden[f"out.class_logits.{name}"], STATE)


RUN = {"gduf": run_gduf, "diga": run_diga, "inference": run_inference}


def prefer_triton(monkeypatch, ops):
    """As "auto" chooses on a GPU: Triton's kernels (here in its interpreter) for ``ops``, else plain PyTorch."""

    def automatic(op, tensors):
        fits = tensors[0].dtype in backends._KERNEL_DTYPES
        ran.add((op, "triton" if op in ops and fits else "torch"))
        return "triton" if op in ops and fits else "torch"

    ran = set()
    monkeypatch.setattr(backends, "_automatic", automatic)
    large = configs.AttentionConfig(64, 64, 4, 1)  # fewer programs to interpret
    monkeypatch.setattr(configs, "attention_config", lambda *_, **__: large)
    return ran


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_golden(golden_file, backend, tmp_path):
    golden = Golden.read(golden_file)
    torch.manual_seed(0)
    RUN[golden.metadata["kind"]](golden, golden.model(tmp_path, backend))


def test_golden_with_triton(golden_file, tmp_path, monkeypatch):
    golden = Golden.read(golden_file)
    kind = golden.metadata["kind"]
    ops = {op for op, names in backends.available().items() if "triton" in names}
    if kind == "inference":  # hundreds of passes, and a program for every row: minutes in the interpreter
        ops -= {"qk_norm_rope"}
    ran = prefer_triton(monkeypatch, ops)
    RUN[kind](golden, golden.model(tmp_path, "auto"))
    used = {"symbiotic_attention", "qk_norm_rope", "rms_norm", "swiglu"}
    used |= {"flow_matching", "flow_matching_loss", "alignment_loss"} if kind == "diga" else set()
    assert {(op, "triton") for op in used & ops} <= ran


@pytest.mark.skipif("cpp" not in backends.available()["alignment_loss"], reason="unigendet._C is not built")
def test_golden_with_the_extension(golden_file, tmp_path):
    """As "auto" chooses on a CPU: the alignment loss in C++."""
    golden = Golden.read(golden_file)
    if golden.metadata["kind"] == "diga":
        torch.manual_seed(0)
        run_diga(golden, golden.model(tmp_path, "auto"))
