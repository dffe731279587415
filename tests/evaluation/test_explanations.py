"""The lexical and the semantic likeness of texts, the latter by a tiny sentence encoder with random weights."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoder import write_encoder
from transformers import BertModel, BertTokenizerFast

from unigendet.evaluation.explanations import SentenceEncoder, tfidf_cosines

TEXTS = ["soft edges", "hard edges pale ink", "ink", "ink ink soft unknown"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders") / "tiny"
    write_encoder(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return SentenceEncoder(folder)


def test_tfidf_by_hand():
    references = ["soft edges", "soft ink", ""]
    found = tfidf_cosines(["soft edges", "Edges!", "anything"], references)
    idf = {"soft": math.log(3 / 3) + 1, "edges": math.log(3 / 2) + 1}  # of the two references that are not empty
    assert found == [pytest.approx(1.0), 0.0, None]
    (other, _) = tfidf_cosines(["edges", ""], references[:2])
    assert other == pytest.approx(idf["edges"] / math.hypot(*idf.values()))


def test_tfidf_at_its_edges():
    assert tfidf_cosines(["", "words that no reference has"], ["soft", "edges"]) == [0.0, 0.0]
    assert tfidf_cosines(["a", "b"], ["!", ""]) == [0.0, None]  # no word to fit to
    assert tfidf_cosines([], []) == []


def test_encoding_is_the_mean_over_the_text_alone(folder, encoder):
    """Each text by itself, without padding, by hand; in batches of two, padded, by the encoder."""
    model = BertModel.from_pretrained(folder).eval()
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    expected = []
    with torch.no_grad():
        for text in TEXTS:
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            mean = hidden.mean(0)
            expected.append((mean / mean.norm()).numpy())
    vectors = encoder.encode(TEXTS, batch_size=2)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, np.stack(expected), atol=1e-5)


def test_cosines(encoder):
    vectors = encoder.encode(TEXTS)
    found = encoder.cosines([TEXTS[0], TEXTS[1], "", TEXTS[2]], [TEXTS[1], TEXTS[1], TEXTS[0], ""])
    assert found == [pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-5), pytest.approx(1.0, abs=1e-5), 0.0, None]
    assert encoder.cosines(["", "x"], ["soft", ""]) == [0.0, None]  # nothing to encode


def test_loading_is_silent_and_leaves_the_library_s_progress_bars_as_they_were(folder, capsys):
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    SentenceEncoder(folder)
    assert capsys.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled() == before


def test_long_texts_are_cut(encoder):
    assert encoder.longest == 10
    long = " ".join(["soft"] * 50)
    assert encoder.cosines([long], [long + " ink"]) == [pytest.approx(1.0, abs=1e-5)]


def test_description_tells_encoders_apart(encoder, folder, tmp_path):
    assert encoder.describe() == SentenceEncoder(folder).describe()
    write_encoder(tmp_path / "tiny", type_vocab_size=3)
    other = SentenceEncoder(tmp_path / "tiny").describe()
    assert other["name"] == encoder.describe()["name"] == "tiny"
    assert other["weights_sha256"] != encoder.describe()["weights_sha256"]


def test_folders_that_hold_no_encoder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no sentence encoder at .*nowhere: no such folder"):
        SentenceEncoder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty lacks config\.json and \*\.safetensors"):
        SentenceEncoder(tmp_path / "empty")
    write_encoder(tmp_path / "pickled")
    weights = tmp_path / "pickled" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pickled" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"pickled lacks \*\.safetensors"):
        SentenceEncoder(tmp_path / "pickled")


def test_damaged_encoders(tmp_path):
    write_encoder(tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cut does not hold a sentence encoder"):
        SentenceEncoder(tmp_path / "cut")
    write_encoder(tmp_path / "odd")
    (tmp_path / "odd" / "config.json").write_text(json.dumps({"model_type": "nothing known"}))
    with pytest.raises(ValueError, match="odd does not hold a sentence encoder"):
        SentenceEncoder(tmp_path / "odd")
    write_encoder(tmp_path / "half")
    weights = load_file(tmp_path / "half" / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("encoder.layer.1.")}
    save_file(kept, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"half lacks weights: encoder\.layer\.1\."):
        SentenceEncoder(tmp_path / "half")
