"""Detection against plain decoding written from docs/model.md §9: no cache, one image, a full pass per token."""

import itertools

import pytest
import torch
from tiny_models import Segments, tiny_model

from unigendet.inference.detect import DetectionRequest, detect_packed
from unigendet.model.unigendet import UniGenDet
from unigendet.packing import LatentImage, Sample, Text, VitImage, pack, patchify

EOS, NEW = 1, 10


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def make_request(seed, *, latent=True):
    make = Segments(seed)
    image = make.latent(1 + seed % 3, 2 + seed % 2) if latent else None
    return DetectionRequest(make.vit(2 + seed % 2, 3), make.text(2 + seed), image, f"image {seed}")


def requests(count=6):
    return [make_request(seed, latent=seed % 3 != 2) for seed in range(count)]


@torch.no_grad()
def plain_answer(model, request, steps):
    """(logits of the head, greedy tokens, ended) by a full pass per token over everything before it."""
    prefix = [request.vit, request.question]
    if request.latent is not None:
        prefix.insert(0, request.latent)
    ids, logits = [], None
    for _ in range(steps):
        batch = pack([Sample((*prefix, Text(tuple(ids), eos=False)))], model.config)
        clean = None if request.latent is None else patchify(request.latent.latent, 2)
        times = None if clean is None else torch.zeros(1)
        hidden = model(batch, latent_tokens=clean, timesteps=times).hidden[batch.layout.sequence_to_stream]
        if logits is None:
            logits = model.class_head(hidden[-1])
        token = int(model.lm_head(hidden[-1]).argmax())
        if token == EOS:
            return logits, ids, True
        ids.append(token)
    return logits, ids, False


def as_tuples(outputs):
    return [(output.ids, output.ended) for output in outputs]


def endless_model(seed=0):
    """A model that never says eos: its logit is 0, below the largest of the others."""
    model = tiny_model(seed)
    with torch.no_grad():
        model.lm_head.weight[EOS] = 0
    return model


def ending_model(seed=0):
    """A model that says eos where it would have said another token, and how the answers go on without that.

    The lm_head's rows do not reach the hidden states, so up to there the answers stay the same.
    """
    model = endless_model(seed)
    endless = [plain_answer(model, request, NEW)[1] for request in requests()]
    assert {len(ids) for ids in endless} == {NEW}

    def lengths(token):
        return {ids.index(token) if token in ids else NEW for ids in endless}

    token = max(range(4, model.config.vocab_size), key=lambda token: (len(lengths(token)), -token))
    assert len(lengths(token)) >= 3, "the answers must end at different lengths; choose another seed"
    with torch.no_grad():
        model.lm_head.weight[EOS] = 1.001 * model.lm_head.weight[token]
    expected = [ids[: ids.index(token)] if token in ids else ids for ids in endless]
    return model, expected, [token in ids for ids in endless]


@pytest.mark.parametrize("seed", range(3))
def test_greedy_answer_is_the_plain_one(model, seed):
    """With and without the latent view; request 2 has none."""
    (output,) = detect_packed(model, [requests()[seed]], max_new_tokens=NEW)
    logits, ids, ended = plain_answer(model, requests()[seed], NEW)
    torch.testing.assert_close(output.class_logits, logits, atol=1e-5, rtol=1e-4)
    assert not output.class_logits.is_inference()
    assert (output.ids, output.ended) == (ids, ended)
    assert output.logit == pytest.approx(float(logits[1] - logits[0]), abs=2e-5)


def test_latent_view_matters(model):
    request = make_request(0)
    without = DetectionRequest(request.vit, request.question)
    outputs = detect_packed(model, [request, without], max_new_tokens=0)
    assert not torch.allclose(outputs[0].class_logits, outputs[1].class_logits, atol=1e-3)


def test_stops_at_eos_each_on_its_own():
    """Answers of other lengths in one pack: each ends where it would end alone, and eos is not part of it."""
    model, expected, ended = ending_model()
    together = detect_packed(model, requests(), max_new_tokens=NEW)
    assert as_tuples(together) == list(zip(expected, ended, strict=True))
    for request, output in zip(requests(), together, strict=True):
        (alone,) = detect_packed(model, [request], max_new_tokens=NEW)
        assert as_tuples([alone]) == as_tuples([output])
        torch.testing.assert_close(alone.class_logits, output.class_logits, atol=1e-5, rtol=1e-4)
        assert plain_answer(model, request, NEW)[1:] == (output.ids, output.ended)


def test_ended_answers_cost_nothing(monkeypatch):
    """After the first pass there is one token per answer that goes on, and no pass once all have ended."""
    model, expected, ended = ending_model()
    queries, forward = [], UniGenDet.forward

    def recorded(model, batch, **arguments):
        queries.append(batch.layout.num_queries)
        return forward(model, batch, **arguments)

    monkeypatch.setattr(UniGenDet, "forward", recorded)
    detect_packed(model, requests(), max_new_tokens=NEW)
    steps = [len(ids) + stopped for ids, stopped in zip(expected, ended, strict=True)]
    assert queries[1:] == [sum(n > step for n in steps) for step in range(1, max(steps))]


def test_passes_for_other_processes(monkeypatch):
    """A model of which others have a part: as many passes as the longest of all answers takes, and the same answers."""
    model, expected, ended = ending_model()
    passes, questions, forward = [], [], UniGenDet.forward

    def counted(*arguments, **options):
        passes.append(1)
        return forward(*arguments, **options)

    def all_ended(own):
        questions.append(own)
        return own and len(passes) >= others

    monkeypatch.setattr(UniGenDet, "forward", counted)
    for others, which in itertools.product((1, 3, NEW), ([], [0], range(6))):
        passes.clear()
        questions.clear()
        outputs = detect_packed(model, [requests()[i] for i in which], max_new_tokens=NEW, all_ended=all_ended)
        assert as_tuples(outputs) == [(expected[i], ended[i]) for i in which]
        own = max((len(expected[i]) + ended[i] for i in which), default=1)
        assert len(passes) == max(own, others)
        assert questions == [n >= own and all(ended[i] for i in which) for n in range(1, len(passes) + 1)]


def test_passes_for_other_processes_without_answers(model):
    """There is nothing to ask, and one pass, also of a process that has nothing to judge."""

    def all_ended(own):
        raise AssertionError("asked")

    expected = detect_packed(model, requests(), max_new_tokens=0)
    outputs = detect_packed(model, requests(), max_new_tokens=0, all_ended=all_ended)
    assert all(torch.equal(a.class_logits, b.class_logits) for a, b in zip(outputs, expected, strict=True))
    assert detect_packed(model, [], max_new_tokens=0, all_ended=all_ended) == []


def test_longest_answer():
    """One token more makes an answer one token longer; its beginning stays."""
    model = endless_model()
    four, five = (detect_packed(model, requests(2), max_new_tokens=n) for n in (4, 5))
    assert [o.ids[:4] for o in five] == [o.ids for o in four]
    assert {len(o.ids) for o in five} == {5}
    assert not any(o.ended for o in five)


def test_verdict_alone(model):
    verdicts = detect_packed(model, requests(), max_new_tokens=0)
    answers = detect_packed(model, requests(), max_new_tokens=3)
    assert as_tuples(verdicts) == [([], False)] * 6
    for verdict, answer in zip(verdicts, answers, strict=True):
        assert torch.equal(verdict.class_logits, answer.class_logits)


def test_sampling_depends_on_the_seed_alone(model):
    def run(seed, temperature=1.5):
        generator = torch.Generator().manual_seed(seed)
        outputs = detect_packed(model, requests(), max_new_tokens=6, temperature=temperature, generator=generator)
        return as_tuples(outputs)

    assert run(0) == run(0)
    assert run(0) != run(1)
    assert run(0, 1e-4) == as_tuples(detect_packed(model, requests(), max_new_tokens=6))


def test_sampling_follows_the_probabilities(model):
    """800 first tokens of one image against softmax(logits / temperature)."""
    request, temperature = make_request(1), 0.6
    generator = torch.Generator().manual_seed(0)
    outputs = detect_packed(model, [request] * 800, max_new_tokens=1, temperature=temperature, generator=generator)
    tokens = torch.tensor([o.ids[0] if o.ids else EOS for o in outputs])
    batch = pack([Sample((*request.prefix, Text((), eos=False)))], model.config)
    with torch.no_grad():
        clean = patchify(request.latent.latent, 2)
        hidden = model(batch, latent_tokens=clean, timesteps=torch.zeros(1)).hidden
        p = (model.text_logits(hidden, batch.last_rows)[0] / temperature).softmax(0)
    counts = tokens.bincount(minlength=len(p)) / 800
    assert (counts - p).abs().max() < 4 * (0.25 / 800) ** 0.5
    assert len(tokens.unique()) > 5


def test_model_without_head_still_answers():
    model, with_head = tiny_model(class_head=False), tiny_model()
    with_head.load_state_dict(model.state_dict(), strict=False)
    outputs = detect_packed(model, requests(), max_new_tokens=4)
    assert [(o.class_logits, o.logit) for o in outputs] == [(None, None)] * 6
    assert as_tuples(outputs) == as_tuples(detect_packed(with_head, requests(), max_new_tokens=4))


def test_lower_precision(model):
    low = tiny_model().to(torch.bfloat16)
    (expected,), (output,) = (detect_packed(m, [make_request(1)], max_new_tokens=2) for m in (model, low))
    assert abs(output.logit - expected.logit) < 0.05


def test_noised_latent_view_is_refused():
    noised = LatentImage(torch.zeros(1, 4, 4), noised=True)
    with pytest.raises(ValueError, match="latent is 'a noised latent image'; it must be a clean one or None"):
        DetectionRequest(VitImage(torch.zeros(1, 4, 4)), Text(()), noised)


def test_errors(model):
    with pytest.raises(ValueError, match="requests is empty"):
        detect_packed(model, [])
    with pytest.raises(ValueError, match="max_new_tokens is -1; it must be at least 0"):
        detect_packed(model, [make_request(0)], max_new_tokens=-1)
    with pytest.raises(ValueError, match=r"temperature is -0\.5; it must be at least 0"):
        detect_packed(model, [make_request(0)], temperature=-0.5)
    bad = DetectionRequest(VitImage(torch.zeros(1, 4, 3)), Text(()), LatentImage(torch.zeros(1, 4, 4)), "odd.png")
    with pytest.raises(ValueError, match=r"odd\.png\.segments\[1\]\.pixels has shape \[1, 4, 3\]"):
        detect_packed(model, [make_request(0), bad])
    # Positions 0 and 1 are the images', 2 to 5 the question's: bos is the 7th of 128, so 121 tokens follow it.
    (longest,) = detect_packed(endless_model(), [make_request(0)], max_new_tokens=122)
    assert len(longest.ids) == 122  # the last one is never read
    with pytest.raises(ValueError, match="max_new_tokens is 123; it must be at most 122"):
        detect_packed(model, [make_request(0)], max_new_tokens=123)
