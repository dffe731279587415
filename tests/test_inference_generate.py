"""The sampler against a plain one written from docs/model.md §8: no cache, no batch, a full pass per velocity."""

import dataclasses
import itertools

import pytest
import torch
from tiny_models import Segments, tiny_model

from unigendet.config import GuidanceConfig
from unigendet.inference.generate import GenerationRequest, generate_latents, tokens_to_latent
from unigendet.model.losses import gduf_losses, noise_latents
from unigendet.model.unigendet import UniGenDet
from unigendet.packing import LatentImage, Sample, Text, VitImage, pack, patchify

RENORMS = ("global", "channel", "text_channel")
EVERYWHERE = GuidanceConfig(num_timesteps=4, text_scale=3.0, image_scale=2.0, interval=(0.0, 1.0), timestep_shift=2.0)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def image_request(seed, size=(6, 8)):
    """Two texts around an input image in both its views."""
    make = Segments(seed)
    return GenerationRequest((make.text(3), make.latent(), make.vit(), make.text(5)), size)


def text_request(seed, size=(4, 6), length=6):
    return GenerationRequest((Segments(seed).text(length),), size)


def noise_for(*requests, seed=0):
    make = Segments(seed)
    return [make.normal(r.size[0] // 2 * (r.size[1] // 2), 4) for r in requests]


def plain_velocity(model, conditions, size, z, t):
    """One velocity by one full pass over conditions and noised image."""
    block = LatentImage(torch.zeros(1, *size), noised=True)
    batch = pack([Sample((*conditions, block))], model.config)
    clean = [patchify(s.latent, 2) for s in conditions if isinstance(s, LatentImage)]
    times = torch.tensor([0.0] * len(clean) + [t])
    hidden = model(batch, latent_tokens=torch.cat([*clean, z]), timesteps=times).hidden
    sequence = hidden[batch.layout.sequence_to_stream]  # the block is the last split: start, patches, end
    return model.llm2vae(sequence[-1 - len(z) : -1])


def renormed(v, guided, floor, per_token):
    dims = {"dim": -1, "keepdim": True} if per_token else {}
    scale = torch.linalg.vector_norm(v, **dims) / (torch.linalg.vector_norm(guided, **dims) + 1e-8)
    return guided * scale.clamp(floor, 1)


@torch.no_grad()
def plain_sampler(model, request, g, z):
    without_texts = tuple(s for s in request.conditions if not isinstance(s, Text))
    only_texts = tuple(s for s in request.conditions if isinstance(s, Text))
    t = torch.linspace(1, 0, g.num_timesteps)
    t = g.timestep_shift * t / (1 + (g.timestep_shift - 1) * t)
    for i in range(g.num_timesteps - 1):
        v = plain_velocity(model, request.conditions, request.size, z, t[i])
        if g.text_scale > 1 and g.interval[0] < t[i] <= g.interval[1]:
            v_uncond = plain_velocity(model, without_texts, request.size, z, t[i])
            v_text = v_uncond + g.text_scale * (v - v_uncond)
            if g.renorm == "text_channel":
                v_text = renormed(v, v_text, g.renorm_min, True)
            guided = v_text
            if g.image_scale > 1:
                v_img = plain_velocity(model, only_texts, request.size, z, t[i])
                guided = v_img + g.image_scale * (v_text - v_img)
            if g.renorm != "text_channel":
                guided = renormed(v, guided, g.renorm_min, g.renorm == "channel")
            v = guided
        z = z - v * (t[i] - t[i + 1])
    return z


def assert_plain(model, request, guidance, seed=0):
    noise = noise_for(request, seed=seed)
    (tokens,) = generate_latents(model, [request], guidance, noise=noise)
    expected = plain_sampler(model, request, guidance, noise[0])
    torch.testing.assert_close(tokens, expected, atol=2e-5, rtol=2e-5)
    return tokens


class Passes:
    """Records the packs that go through the model, and its caches."""

    def __init__(self, monkeypatch):
        self.batches, self.caches = [], []
        forward, new_cache = UniGenDet.forward, UniGenDet.new_cache

        def recorded(model, batch, **arguments):
            self.batches.append(batch)
            return forward(model, batch, **arguments)

        def made(model, capacity):
            self.caches.append(new_cache(model, capacity))
            return self.caches[-1]

        monkeypatch.setattr(UniGenDet, "forward", recorded)
        monkeypatch.setattr(UniGenDet, "new_cache", made)

    def samples(self):
        return [batch.layout.num_samples for batch in self.batches]


@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize("make", [text_request, image_request])
def test_every_renorm_is_the_plain_sampler(model, make, renorm):
    assert_plain(model, make(1), dataclasses.replace(EVERYWHERE, renorm=renorm))


def test_renorms_differ_and_the_floor_matters(model):
    """Without this the test above could compare three names of one formula."""
    results = [assert_plain(model, image_request(2), dataclasses.replace(EVERYWHERE, renorm=r)) for r in RENORMS]
    for renorm, plain in zip(RENORMS, results, strict=True):
        floored = dataclasses.replace(EVERYWHERE, renorm=renorm, renorm_min=0.9)
        assert not torch.allclose(assert_plain(model, image_request(2), floored), plain, atol=1e-3)
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in itertools.pairwise(results))


# With four times shifted by 2, the steps are at 1, 0.8 and 0.5.
@pytest.mark.parametrize(
    ("interval", "samples"),
    [
        ((0.0, 1.0), [3, 3, 3]),
        ((0.4, 0.9), [3, 3, 3]),  # the first pass fills every branch's cache, even if its step is not guided
        ((0.6, 1.0), [3, 3, 1]),
        ((0.5, 0.8), [3, 3, 1]),  # open below, closed above
        ((0.4, 0.6), [3, 1, 3]),
        ((0.1, 0.2), [3, 1, 1]),
    ],
)
def test_interval(model, interval, samples, monkeypatch):
    guidance = dataclasses.replace(EVERYWHERE, interval=interval)
    expected = plain_sampler(model, image_request(3), guidance, noise_for(image_request(3))[0])
    passes = Passes(monkeypatch)
    (tokens,) = generate_latents(model, [image_request(3)], guidance, noise=noise_for(image_request(3)))
    torch.testing.assert_close(tokens, expected, atol=2e-5, rtol=2e-5)
    assert passes.samples() == samples


def test_interval_bounds_are_compared_in_float32(model):
    """0.7 has no exact float32; a step at time 0.7 is not guided above 0.7, and guided up to 0.7."""
    times = torch.linspace(1, 0, 11)
    assert times[3].item() != 0.7
    assert times[3] == torch.tensor(0.7)
    request = text_request(4)
    for interval in ((0.7, 1.0), (0.0, 0.7)):
        guidance = GuidanceConfig(num_timesteps=11, interval=interval, timestep_shift=1.0, image_scale=1.0)
        assert_plain(model, request, guidance)


@pytest.mark.parametrize("renorm", RENORMS)
def test_no_text_guidance_means_the_plain_velocity(model, renorm, monkeypatch):
    """An image scale alone does nothing, and there is no renorm that could."""
    passes = Passes(monkeypatch)
    for scale in (1.0, 0.5):
        guidance = dataclasses.replace(EVERYWHERE, text_scale=scale, renorm=renorm, renorm_min=0.5)
        guided = assert_plain(model, image_request(5), guidance)
        plain = dataclasses.replace(guidance, image_scale=1.0, renorm="global")
        assert torch.equal(guided, assert_plain(model, image_request(5), plain))
    assert set(passes.samples()) == {1}


@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize("image_scale", [1.0, 0.5])
def test_text_guidance_without_image_guidance(model, renorm, image_scale, monkeypatch):
    guidance = dataclasses.replace(EVERYWHERE, image_scale=image_scale, renorm=renorm)
    expected = plain_sampler(model, image_request(6), guidance, noise_for(image_request(6))[0])
    passes = Passes(monkeypatch)
    (tokens,) = generate_latents(model, [image_request(6)], guidance, noise=noise_for(image_request(6)))
    torch.testing.assert_close(tokens, expected, atol=2e-5, rtol=2e-5)
    assert passes.samples() == [2, 2, 2]


def test_image_step_applies_without_an_input_image(model, monkeypatch):
    """v_image is v then: it costs no branch, but it scales."""
    without = assert_plain(model, text_request(7), dataclasses.replace(EVERYWHERE, image_scale=1.0, renorm_min=1.0))
    assert not torch.allclose(
        assert_plain(model, text_request(7), dataclasses.replace(EVERYWHERE, renorm_min=1.0)), without, atol=1e-3
    )
    passes = Passes(monkeypatch)
    generate_latents(model, [text_request(7)], EVERYWHERE, noise=noise_for(text_request(7)))
    assert passes.samples() == [2, 2, 2]


def test_branches_and_their_positions(model, monkeypatch):
    """Texts of 5 and 7 tokens around two views: the branches keep their order, and positions restart in each."""
    passes = Passes(monkeypatch)
    generate_latents(model, [image_request(8)], EVERYWHERE, noise=noise_for(image_request(8)))
    layout = passes.batches[-1].layout
    lengths = layout.cu_seqlens_q.diff().tolist()
    assert lengths == [14, 14, 14]  # the block alone: 12 patches and two delimiters
    at = layout.positions.split(lengths)
    assert [p.unique().tolist() for p in at] == [[5 + 1 + 1 + 7], [1 + 1], [5 + 7]]
    assert passes.caches[0].lengths == [5 + 8 + 8 + 7, 8 + 8, 5 + 7]


@pytest.mark.parametrize("make", [text_request, image_request])
def test_cache_never_holds_the_noised_block(model, make, monkeypatch):
    passes = Passes(monkeypatch)
    generate_latents(model, [make(9)], EVERYWHERE, noise=noise_for(make(9)))
    cache = passes.caches[0]
    rows = make(9).size[0] // 2 * (make(9).size[1] // 2) + 2
    assert cache.lengths == [capacity - rows for capacity in cache.capacity]
    assert len(passes.caches) == 1
    assert [batch.layout.num_keys for batch in passes.batches] == [sum(cache.capacity)] * 3


def test_empty_prompt_and_no_condition_at_all(model):
    empty = GenerationRequest((Text(()),), (4, 4))
    nothing = GenerationRequest((), (4, 4))
    assert not torch.equal(assert_plain(model, empty, EVERYWHERE), assert_plain(model, nothing, EVERYWHERE))


def test_batch_is_one_at_a_time(model):
    """Requests of other sizes, lengths and kinds in one pack."""
    sizes = ((4, 6), (8, 8), (2, 2))
    requests = [text_request(10, sizes[0], 3), image_request(11, sizes[1]), text_request(12, sizes[2], 9)]
    requests += [GenerationRequest((), (6, 4)), image_request(13, (2, 8))]
    noise = noise_for(*requests)
    for renorm in RENORMS:
        guidance = dataclasses.replace(EVERYWHERE, renorm=renorm, interval=(0.6, 1.0))
        together = generate_latents(model, requests, guidance, noise=noise)
        for request, start, tokens in zip(requests, noise, together, strict=True):
            (alone,) = generate_latents(model, [request], guidance, noise=[start])
            torch.testing.assert_close(tokens, alone, atol=2e-5, rtol=2e-5)


def test_steps_are_one_fewer_than_timesteps(model, monkeypatch):
    seen = []
    velocity = lambda model, hidden, rows: torch.ones(len(rows), 4)  # noqa: E731
    monkeypatch.setattr(UniGenDet, "velocity", velocity)
    noise = noise_for(text_request(14))
    guidance = GuidanceConfig(num_timesteps=7, timestep_shift=3.0)
    progress = lambda done, steps: seen.append((done, steps))  # noqa: E731
    (tokens,) = generate_latents(model, [text_request(14)], guidance, noise=noise, progress=progress)
    assert seen == [(i, 6) for i in range(1, 7)]
    torch.testing.assert_close(tokens, noise[0] - 1)  # the steps go from time 1 to time 0


def test_timesteps_reach_the_model(model, monkeypatch):
    times, forward = [], UniGenDet.forward

    def recorded(model, batch, **arguments):
        times.append(arguments["timesteps"].tolist())
        return forward(model, batch, **arguments)

    monkeypatch.setattr(UniGenDet, "forward", recorded)
    generate_latents(model, [image_request(15)], EVERYWHERE, noise=noise_for(image_request(15)))
    # Clean images, in the first pass alone, have time 0; the third branch has no image.
    assert times[0] == pytest.approx([0, 1, 0, 1, 1])
    assert times[1] == pytest.approx([0.8] * 3)
    assert times[2] == pytest.approx([0.5] * 3)


def test_noise_comes_from_the_generator(model):
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return generate_latents(model, [text_request(16), image_request(16)], EVERYWHERE, generator=generator)

    assert all(torch.equal(a, b) for a, b in zip(run(1), run(1), strict=True))
    assert not torch.equal(run(1)[0], run(2)[0])


def test_tokens_to_latent_is_the_inverse_of_patchify(model):
    image = Segments(17).normal(1, 4, 6)
    assert torch.equal(tokens_to_latent(model, patchify(image, 2), (4, 6)), image)


def test_model_can_train_after_generating():
    """Neither what generating caches (position tables, schedules) nor what it returns spoils a later backward pass."""
    model = tiny_model()
    request = text_request(18)
    (tokens,) = generate_latents(model, [request], EVERYWHERE, noise=noise_for(request))
    assert not tokens.is_inference()
    image = LatentImage(tokens_to_latent(model, tokens, request.size), noised=True)
    batch = pack([Sample((*request.conditions, image))], model.config)
    latents = noise_latents(model, batch, torch.tensor([0.5]), torch.zeros(len(tokens), 4))
    output = model(batch, latent_tokens=latents.tokens, timesteps=latents.timesteps)
    gduf_losses(model, batch, output, latents)["mse"].backward()
    assert model.embed_tokens.weight.grad.norm() > 0


def test_lower_precision(model):
    low = tiny_model().to(torch.bfloat16)
    guidance = dataclasses.replace(EVERYWHERE, num_timesteps=2)
    noise = noise_for(image_request(19))
    (expected,) = generate_latents(model, [image_request(19)], guidance, noise=noise)
    (tokens,) = generate_latents(low, [image_request(19)], guidance, noise=noise)
    assert tokens.dtype == torch.float32
    assert (tokens - expected).norm() / expected.norm() < 0.05


def test_errors(model):
    with pytest.raises(ValueError, match="requests is empty"):
        generate_latents(model, [])
    for size in ((5, 4), (4, 10), (0, 4), (-2, 4), (4,)):
        with pytest.raises(ValueError, match=r"requests\[1\]\.size is .*multiples of 2 pixels and at most 8"):
            generate_latents(model, [text_request(0), GenerationRequest((), size)], EVERYWHERE)
    request = text_request(0)  # 6 tokens
    for noise in ([], [torch.zeros(6, 5)], [torch.zeros(6, 4)] * 2):
        with pytest.raises(ValueError, match=r"noise has shapes .*they must be \[\[6, 4\]\]"):
            generate_latents(model, [request], EVERYWHERE, noise=noise)
    with pytest.raises(ValueError, match=r"conditions\[1\] is 'a noised latent image'"):
        GenerationRequest((Text(()), LatentImage(torch.zeros(1, 2, 2), noised=True)), (4, 4))
    bad = VitImage(torch.zeros(1, 3, 3))
    with pytest.raises(ValueError, match=r"odd\.segments\[0\]\.pixels has shape \[1, 3, 3\]"):
        generate_latents(model, [GenerationRequest((bad,), (4, 4), "odd")], EVERYWHERE)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_guidance_must_be_finite(value):
    for name in ("text_scale", "image_scale", "timestep_shift", "renorm_min"):
        with pytest.raises(ValueError, match=rf"guidance\.{name} is {value}; it must be finite"):
            GuidanceConfig(**{name: value})
    for interval in ((value, 1.0), (0.4, value)):
        with pytest.raises(ValueError, match=r"guidance\.interval is \(.*\); it must be finite at both ends"):
            GuidanceConfig(interval=interval)
