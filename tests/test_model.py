"""The model: what a layer launches, that packing and caching change nothing, sizes, errors."""

import dataclasses
from collections import Counter

import pytest
import torch
from golden import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import Recorder, check_compiles_once, randn

from unigendet.config import ModelConfig, bagel_7b, quickstart
from unigendet.layout import Layout
from unigendet.model.cache import KVCache
from unigendet.model.embeddings import timestep_features
from unigendet.model.losses import clean_latents, noise_latents
from unigendet.model.transformer import Decoder, DecoderLayer
from unigendet.model.unigendet import UniGenDet
from unigendet.ops import rms_norm, rope_table
from unigendet.packing import LatentImage, Sample, Text, VitImage, pack, sample_length

BACKENDS = ("reference", "torch")
STATE = 1e-10  # relative; the models here are float64, their position tables float32


FORWARD = {
    "unigendet.rms_norm": 2,
    "unigendet.stream_linear": 4,
    "unigendet.qk_norm_rope": 1,
    "unigendet.symbiotic_attention": 1,
    "unigendet.swiglu": 1,
}
BACKWARD = {f"{name}_backward": n for name, n in FORWARD.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("streams", [[0] * 6 + [1] * 5, [0, 1] * 5 + [0], [0] * 11, [1] * 11])
def test_operations_of_a_layer(streams, dtype):
    """Nothing but the ops, forward and backward: no slice, cat, zero-fill, copy or permutation of rows."""
    config = quickstart()
    layer = DecoderLayer(config).to(dtype)
    layout = Layout.from_splits([[(5, "causal"), (6, "noise")]], streams=streams)
    rope = rope_table(32, config.head_dim, config.rope_theta)
    x, delta = (randn(11, config.hidden_size, dtype=dtype, seed=i) for i in range(2))
    with Recorder() as forward:
        outputs = layer(x, delta, layout, rope, None, "auto")
    assert forward.work() == FORWARD
    incoming = [randn(*o.shape, dtype=dtype, grad=False, seed=2) for o in outputs]
    with Recorder() as backward:
        torch.autograd.grad(outputs, [x, delta, *layer.parameters()], incoming)
    assert backward.work() == BACKWARD


def test_operations_of_the_decoder():
    """Layers add nothing between them; the first norm's input and the final norm are the only extras."""
    config = quickstart()
    decoder = Decoder(config)
    layout = Layout.from_splits([[(5, "causal"), (6, "noise")]], streams=[0] * 6 + [1] * 5)
    x = randn(11, config.hidden_size)
    decoder.rope(x.device)
    with Recorder() as forward:
        hidden, _ = decoder(x, layout)
    layers = Counter({name: n * config.num_layers for name, n in FORWARD.items()})
    assert forward.work() == layers + Counter({"unigendet.rms_norm": 1})
    incoming = randn(11, config.hidden_size, grad=False)
    with Recorder() as backward:
        torch.autograd.grad(hidden, [x, *decoder.parameters()], incoming)
    layers = Counter({name: n * config.num_layers for name, n in BACKWARD.items()})
    # x goes into the first norm and past it: its two gradients are added.
    assert backward.work() == layers + Counter({"unigendet.rms_norm_backward": 1, "aten.add.Tensor": 1})


def test_a_compiled_layer_serves_packs_of_other_lengths():
    config = quickstart()
    layer = DecoderLayer(config)
    cos, sin = rope_table(32, config.head_dim, config.rope_theta)
    packs = [[[(3, "causal"), (4, "noise")]], [[(9, "causal")], [(2, "full"), (6, "noise")]], [[(4, "full")] * 3]]
    layouts = [Layout.from_splits(p, streams=torch.arange(sum(n for s in p for n, _ in s)) % 2) for p in packs]

    def call(x, delta, layout):
        return layer(x, delta, layout, (cos, sin), None, "auto")

    rows = [layout.num_queries for layout in layouts]
    check_compiles_once(
        call, [[randn(n, 128), randn(n, 128, seed=1), layout] for n, layout in zip(rows, layouts, strict=True)]
    )


def image(channels, height, width, seed):
    return torch.randn(channels, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def detection(seed=0, *, height=4):
    ids = [int(i) for i in torch.randint(4, 512, (7,), generator=torch.Generator().manual_seed(seed))]
    return Sample(
        (
            LatentImage(image(1, height, 6, seed)),
            VitImage(image(1, 6, height, seed + 1)),
            Text(ids[:3]),
            Text(ids[3:], loss=True),
        ),
        label=seed % 2,
    )


def generation(seed=0, *, width=8):
    return Sample((Text([5 + seed, 6, 7]), LatentImage(image(1, 4, width, seed), noised=True)))


SAMPLES = [detection(1), generation(2), detection(3, height=8), Sample((Text([9, 8]),)), generation(4, width=2)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = UniGenDet(dataclasses.replace(quickstart(), num_layers=4)).double()
    with torch.no_grad():  # norm weights of 1 would hide a mix-up of streams
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def noise_for(sample, seed):
    tokens = sum(s.latent.shape[1] * s.latent.shape[2] // 4 for s in sample.segments if isinstance(s, LatentImage))
    return randn(tokens, 4, dtype=torch.float64, grad=False, seed=seed)


def run(model, samples, **options):
    """Hidden states in sequence order; the noise of a sample depends on nothing but the sample."""
    pack_options = {k: options.pop(k) for k in ("cached", "capacity") if k in options}
    batch = pack(samples, model.config, **pack_options)
    timesteps = torch.where(batch.noised_images, 0.25, 0.0).double()
    fresh = [s for s, n in zip(samples, pack_options.get("cached", [0] * len(samples)), strict=True) if n == 0]
    noise = torch.cat([torch.zeros(0, 4).double(), *(noise_for(s, 5) for s in fresh)])[
        : batch.latent_positions.shape[0]
    ]
    latents = noise_latents(model, batch, timesteps, noise)
    output = model(batch, latent_tokens=latents.tokens, timesteps=latents.timesteps, **options)
    return output.hidden.index_select(0, batch.layout.sequence_to_stream), batch, output


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [1, 1, 3]])
def test_hidden_states_do_not_depend_on_the_pack(model, backend, order):
    model.backend = backend
    samples = [SAMPLES[i] for i in order]
    with torch.no_grad():
        packed, batch, _ = run(model, samples)
        parts = packed.split(batch.layout.cu_seqlens_q.diff().tolist())
        for part, sample in zip(parts, samples, strict=True):
            alone, _, _ = run(model, [sample])
            assert relative_error(part, alone) < STATE
    model.backend = "auto"


def prefix(sample, tokens):
    """The first ``tokens`` tokens of a sample; images are whole."""
    segments, left = [], tokens
    for segment in sample.segments:
        length = sample_length(Sample((segment,)), quickstart())
        if left == 0:
            break
        if length > left:
            segment, length = Text(segment.ids[: left - 1], eos=False), left
        segments.append(segment)
        left -= length
    return Sample(tuple(segments))


def texts_begin(sample):
    """Number of tokens of the images that the sample begins with."""
    return sum(sample_length(Sample((s,)), quickstart()) for s in sample.segments if not isinstance(s, Text))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [[1] * 12, [5, 1, 4, 2], [3, 9]])
def test_cached_decoding_is_the_full_forward(model, backend, steps):
    """Two samples of other lengths, token by token or in blocks; spare rows hold NaN all the time."""
    model.backend = backend
    samples = [detection(1), detection(3, height=8)]
    lengths = [sample_length(s, model.config) for s in samples]
    with torch.no_grad():
        whole = [run(model, [s])[0] for s in samples]
        cache = KVCache(model.config, [n + 3 for n in lengths], dtype=torch.float64)
        cache._rows.fill_(float("nan"))
        filled = [texts_begin(s) for s in samples]
        parts = [[], []]
        for step in [0, *steps]:
            filled = [min(n + step, most) for n, most in zip(filled, lengths, strict=True)]
            if filled == cache.lengths:
                continue
            hidden, batch, _ = run(
                model,
                [prefix(s, n) for s, n in zip(samples, filled, strict=True)],
                cached=cache.lengths,
                capacity=cache.capacity,
                cache=cache,
            )
            for i, part in enumerate(hidden.split(batch.layout.cu_seqlens_q.diff().tolist())):
                parts[i].append(part)
            cache.commit(filled)
        for have, want in zip(parts, whole, strict=True):
            have = torch.cat(have)
            assert relative_error(have, want[: len(have)]) < STATE
    model.backend = "auto"


def test_an_image_being_denoised_never_enters_the_cache(model):
    """The same prefix serves every step: without commit, what a step wrote is overwritten by the next."""
    sample = generation(2)
    prompt = Sample(sample.segments[:1])
    tokens = sample_length(prompt, model.config)
    with torch.no_grad():
        whole, _, _ = run(model, [sample])
        cache = KVCache(model.config, [sample_length(sample, model.config)], dtype=torch.float64)
        run(model, [prompt], cached=[0], capacity=cache.capacity, cache=cache)
        cache.commit([tokens])
        for scale in (100.0, 1.0):
            batch = pack([sample], model.config, cached=cache.lengths, capacity=cache.capacity)
            latents = noise_latents(model, batch, torch.tensor([0.25]).double(), scale * noise_for(sample, 5))
            output = model(batch, latent_tokens=latents.tokens, timesteps=latents.timesteps, cache=cache)
        hidden = output.hidden.index_select(0, batch.layout.sequence_to_stream)
        assert relative_error(hidden, whole[tokens:]) < STATE
        assert cache.lengths == [tokens]


@settings(max_examples=8)
@given(st.lists(st.sampled_from(range(len(SAMPLES))), min_size=1, max_size=4))
def test_backends_agree_on_random_packs(order):
    torch.manual_seed(1)
    model = UniGenDet(quickstart()).double()
    samples = [SAMPLES[i] for i in order]
    results = []
    for backend in BACKENDS:
        model.backend = backend
        model.zero_grad()
        hidden, _, _ = run(model, samples)
        (hidden * randn(*hidden.shape, dtype=torch.float64, grad=False)).sum().backward()
        results.append((hidden, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (left, left_grads), (right, right_grads) = results
    assert relative_error(left, right) < STATE
    assert left_grads.keys() == right_grads.keys()
    for name, gradient in right_grads.items():
        difference = (left_grads[name] - gradient).norm()
        assert difference <= 1e-9 * gradient.norm() + 1e-12, name


def test_capture_and_stop_after(model):
    last = model.config.num_layers
    with torch.no_grad():
        hidden, batch, output = run(model, SAMPLES, capture=(1, last))
        assert set(output.captured) == {1, last}
        plain, _, _ = run(model, SAMPLES)
        assert relative_error(hidden, plain) < STATE
        normed = rms_norm(output.captured[last], model.decoder.norm.weights, batch.layout)
        assert relative_error(normed, output.hidden) < STATE
        _, _, stopped = run(model, SAMPLES, stop_after=1, capture=(1,))
        assert torch.equal(stopped.captured[1], output.captured[1])
        normed = rms_norm(stopped.captured[1], model.decoder.norm.weights, batch.layout)
        assert relative_error(stopped.hidden, normed) < STATE
        assert relative_error(stopped.hidden, output.hidden) > 0.1
    for options, message in (
        ({"stop_after": 0}, "stop_after names layer 0; layers are numbered 1 to 4"),
        ({"stop_after": 5}, "stop_after names layer 5; layers are numbered 1 to 4"),
        ({"capture": (1, 5)}, "capture names layer 5; layers are numbered 1 to 4"),
        ({"capture": (0,)}, "capture names layer 0"),
        ({"stop_after": 2, "capture": (3,)}, "capture names layer 3; layers are numbered 1 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            run(model, SAMPLES, **options)


def gradients(model, **options):
    model.zero_grad()
    hidden, _, output = run(model, SAMPLES, capture=(2,), **options)
    (hidden.square().sum() + output.captured[2].sum()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_recomputing_layers_changes_no_bit(model):
    expected = gradients(model)
    model.decoder.recompute = "full"
    forwards = []
    handle = model.decoder.layers[0].register_forward_pre_hook(lambda *_: forwards.append(1))
    actual = gradients(model)
    handle.remove()
    model.decoder.recompute = "none"
    assert len(forwards) == 2  # or nothing was recomputed
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_training_after_a_first_call_in_inference_mode():
    """An evaluation before the first step must not leave tensors behind that a backward pass refuses."""
    model = UniGenDet(quickstart()).double()
    with torch.inference_mode():
        before, _, _ = run(model, SAMPLES)
    hidden, _, _ = run(model, SAMPLES)
    hidden.sum().backward()
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("sample", [Sample((Text([5]),)), Sample((LatentImage(image(1, 2, 2, 0), noised=True),))])
def test_streams_of_nearly_nothing(model, sample):
    """Text alone has no generation rows; a latent of one token has two understanding rows."""
    model.zero_grad()
    hidden, _, _ = run(model, [sample])
    hidden.square().sum().backward()
    assert hidden.isfinite().all()
    used = model.decoder.layers[0].qkv.gen.weight.grad
    has_latents = isinstance(sample.segments[0], LatentImage)
    assert bool(used is not None and used.any()) == has_latents
    assert model.decoder.layers[0].qkv.und.weight.grad.any()


def test_bfloat16_and_autocast():
    torch.manual_seed(0)
    model = UniGenDet(quickstart())
    batch = pack(SAMPLES[:2], model.config)
    latents = clean_latents(model, batch)

    def hidden(model):
        return model(batch, latent_tokens=latents.tokens.float(), timesteps=latents.timesteps).hidden

    expected = hidden(model)
    with torch.autocast("cpu", torch.bfloat16):
        cast = hidden(model)
    cast.float().square().sum().backward()
    assert relative_error(cast, expected) < 0.05
    assert all(
        p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all()) for p in model.parameters()
    )
    small = hidden(model.bfloat16())
    assert small.dtype == torch.bfloat16
    assert relative_error(small, expected) < 0.05


def test_embed_names_what_is_missing(model):
    batch = pack([generation(1), detection(2)], model.config)
    tokens = batch.latent_positions.shape[0]
    good = torch.zeros(tokens, 4)
    times = torch.zeros(2)
    for latents, timesteps, message in (
        (None, times, rf"latent_tokens is None; it must be a tensor \[{tokens}, 4\]"),
        (good[1:], times, rf"latent_tokens is \[{tokens - 1}, 4\]; it must be a tensor \[{tokens}, 4\]"),
        (good[:, :3], times, rf"latent_tokens is \[{tokens}, 3\]"),
        (good, None, r"timesteps is None; it must be a tensor \[2\], one time per latent image"),
        (good, torch.zeros(tokens), rf"timesteps is \[{tokens}\]; it must be a tensor \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.embed(batch, latents, timesteps)


def test_missing_heads():
    model = UniGenDet(dataclasses.replace(quickstart(), class_head=False, align_head=False))
    rows = torch.tensor([0])
    with pytest.raises(ValueError, match="no real/fake head; build it with class_head=True"):
        model.class_logits(torch.zeros(1, 128), rows)
    with pytest.raises(ValueError, match="no alignment head; build it with align_head=True"):
        model.align(torch.zeros(1, 128), rows)


def linear(inputs, outputs, bias=True):
    return inputs * outputs + (outputs if bias else 0)


def test_size_of_bagel_7b():
    """Counted from the published sizes alone, on the meta device: nothing of it is allocated."""
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary = 3584, 18944, 28, 28, 4, 128, 152064
    stream = (
        2 * hidden  # two norms
        + linear(hidden, heads * head_dim)
        + 2 * linear(hidden, kv_heads * head_dim)
        + 2 * head_dim  # norms of q and k
        + linear(heads * head_dim, hidden, bias=False)
        + 3 * linear(hidden, intermediate, bias=False)
    )
    decoder = 2 * (layers * stream + hidden)
    vit, vit_intermediate, vit_layers, patch, side = 1152, 4304, 26, 14, 70
    vit_layer = 4 * linear(vit, vit) + linear(vit, vit_intermediate) + linear(vit_intermediate, vit) + 2 * 2 * vit
    vision = linear(3 * patch**2, vit) + side**2 * vit + vit_layers * vit_layer + 2 * vit
    latent = 2 * 2 * 16
    expected = {
        "embed_tokens": vocabulary * hidden,
        "lm_head": vocabulary * hidden,
        "decoder": decoder,
        "vision": vision,
        "connector": linear(vit, hidden) + linear(hidden, hidden),
        "vae2llm": linear(latent, hidden),
        "llm2vae": linear(hidden, latent),
        "time_embedding": linear(256, hidden) + linear(hidden, hidden),
        "class_head": 2 * hidden + linear(hidden, hidden // 4) + linear(hidden // 4, 2),
        "align_head": linear(hidden, 4 * hidden) + linear(4 * hidden, hidden),
    }
    with torch.device("meta"):
        model = UniGenDet(bagel_7b())
    actual = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    assert actual == expected
    assert sum(expected.values()) == sum(p.numel() for p in model.parameters())
    assert all(p.is_meta for p in model.parameters())
    assert model.vit_table.shape == (70 * 70, hidden)
    assert model.latent_table.shape == (64 * 64, hidden)
    assert model.vit_table.is_meta


def test_size_of_the_quickstart():
    """About a million parameters, or it does not train in minutes on two cores."""
    assert 0.7e6 < sum(p.numel() for p in UniGenDet(quickstart()).parameters()) < 2e6


def test_config_round_trip_and_unknown_settings():
    config = quickstart()
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"unknown settings \['hiden'\]"):
        ModelConfig.from_dict({"hiden": 3})
    with pytest.raises(ValueError, match=r"unknown settings \['vision.depth'\]"):
        ModelConfig.from_dict({"vision": {"depth": 3}})
    with pytest.raises(ValueError, match="vision is 3; it must be settings of VisionConfig"):
        ModelConfig.from_dict({"vision": 3})


def test_cache_errors():
    config = quickstart()
    with pytest.raises(ValueError, match=r"capacity is \[\]; it must hold at least one row"):
        KVCache(config, [])
    with pytest.raises(ValueError, match=r"capacity is \[3, 0\]"):
        KVCache(config, [3, 0])
    cache = KVCache(config, [3, 5])
    with pytest.raises(ValueError, match=r"lengths\[1\] is 6; sample 1 has 5 rows"):
        cache.commit([3, 6])
    assert cache.lengths == [0, 0]
    k, v = cache.layer(1)
    assert k.shape == v.shape == (8, config.num_kv_heads, config.head_dim)
    k.fill_(1)
    assert cache.layer(1)[0].all()
    assert not cache.layer(0)[0].any()
    assert not v.any()


def test_timestep_features_read_no_tensor(monkeypatch):
    """They are what the formula says, and the host waits for no value of a tensor."""
    t = torch.tensor([0.0, 0.3, 1.0])
    angle = t.double()[:, None] * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    monkeypatch.setattr(torch.Tensor, "item", None)
    assert torch.allclose(timestep_features(t), torch.cat((angle.cos(), angle.sin()), 1).float(), atol=1e-6)
