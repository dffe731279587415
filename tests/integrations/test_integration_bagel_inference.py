"""Cached inference of a model built like BAGEL is the same before and after ``accelerate``."""

import pytest
import torch
from bagel_cases import TOLERANCE, assert_close, counting_layers, decoder_of, outer
from bagel_stand_in import Cache

from unigendet.integrations.bagel import accelerate, restore


@pytest.fixture
def count_layers(monkeypatch):
    return counting_layers(monkeypatch)


class Requests:
    """Two requests that a cache serves: rows and index lists as BAGEL's inference prepares them."""

    def __init__(self, model):
        self.decoder, self.cache = decoder_of(model), Cache(3)
        self.lengths, self.generator = [0, 0], torch.Generator().manual_seed(3)

    def step(self, new, causal=True, update=True, latent=False):
        """Run ``new`` tokens for each request; ``latent``: all but the first and last of each are generation."""
        ends = [a + b for a, b in zip(self.lengths, new, strict=True)]
        starts = [0, ends[0]]
        rows = [[*range(s, s + a)] for s, a in zip(starts, self.lengths, strict=True)]
        fresh = [[*range(s + a, s + e)] for s, a, e in zip(starts, self.lengths, ends, strict=True)]
        streams = {}
        if latent:
            first = [0, new[0]]
            vae = [row for f, n in zip(first, new, strict=True) for row in range(f + 1, f + n - 1)]
            text = [row for row in range(sum(new)) if row not in vae]
            streams = {"packed_vae_token_indexes": torch.tensor(vae), "packed_text_indexes": torch.tensor(text)}
        output = self.decoder(
            packed_query_sequence=torch.randn(sum(new), 32, generator=self.generator),
            query_lens=torch.tensor(new, dtype=torch.int32),
            packed_query_position_ids=torch.randint(20, (sum(new),), generator=self.generator),
            packed_query_indexes=torch.tensor([*fresh[0], *fresh[1]]),
            past_key_values=self.cache,
            key_values_lens=torch.tensor(self.lengths, dtype=torch.int32),
            packed_key_value_indexes=torch.tensor([*rows[0], *rows[1]], dtype=torch.int64),
            update_past_key_values=update,
            is_causal=causal,
            mode="gen" if latent else "und",
            **streams,
        )
        if update:
            self.lengths = ends
        return output.packed_query_sequence


def serve(model):
    """A text, an image, an image that is being denoised twice, two text tokens: outputs and the cache at the end."""
    requests = Requests(model.eval())
    with torch.no_grad():
        out = [requests.step([5, 3]), requests.step([4, 6], causal=False)]
        out += [requests.step([6, 4], causal=False, update=False, latent=True) for _ in range(2)]
        out += [requests.step([4, 5], causal=False, latent=True)]
        out += [requests.step([1, 1]), requests.step([2, 0]), requests.step([1, 1])]
    kept = [*requests.cache.key_cache.values(), *requests.cache.value_cache.values()]
    return dict(enumerate([*out, *kept]))


def test_inference_with_a_cache(count_layers):
    model = outer()
    expected = serve(model)
    assert_close(serve(accelerate(model)), expected)
    assert count_layers() == 3 * 8
    assert expected[8].shape[0] == 33


def test_a_cache_may_change_hands():
    """The accelerated model goes on with what the plain one has stored, and the other way round."""
    model = outer().eval()
    plain, mixed = Requests(model), Requests(model)
    with torch.no_grad():
        expected = [plain.step([5, 3]), plain.step([2, 2]), plain.step([1, 1])]
        found = [mixed.step([5, 3])]
        accelerate(model)
        found += [mixed.step([2, 2])]
        restore(model)
        found += [mixed.step([1, 1])]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


def test_inference_wants_cached_tokens_first():
    requests = Requests(accelerate(outer()).eval())
    with torch.no_grad():
        requests.step([3, 3])
        requests.lengths = [2, 4]
        with pytest.raises(ValueError, match=r"packed_query_indexes has another order|packed_key_value_indexes"):
            requests.decoder(
                packed_query_sequence=torch.randn(2, 32),
                query_lens=torch.tensor([1, 1]),
                packed_query_position_ids=torch.zeros(2, dtype=torch.int64),
                packed_query_indexes=torch.tensor([0, 3]),
                past_key_values=requests.cache,
                key_values_lens=torch.tensor([2, 4]),
                packed_key_value_indexes=torch.tensor([1, 2, 4, 5, 6, 7]),
            )
