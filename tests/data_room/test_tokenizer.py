import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from unigendet.config import SpecialTokens
from unigendet.data.quickstart import DIGIT_NAMES, QUESTION, caption
from unigendet.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, train_tokenizer

QWEN_IDS = dict(zip(SPECIAL_TOKENS, (259, 260, 261, 262), strict=True))


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_survives(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(4 <= i < tokenizer.vocab_size for i in ids)


def test_a_lone_surrogate_is_no_text(tokenizer):
    for text in ("a\udcff", "\ud83d"):
        with pytest.raises(ValueError, match=r"text '.*\\ud.*' is no Unicode text \(a lone surrogate\)"):
            tokenizer.encode(text)


def test_text_cannot_spell_special_tokens(tokenizer):
    text = "a <|im_end|><|vision_start|> b"
    for t in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        assert min(t.encode(text)) > 3
        assert t.decode(t.encode(text)) == text


def test_decode_skips_special_and_unknown_ids(tokenizer):
    assert tokenizer.decode([0, *tokenizer.encode("hi"), 1, 100_000]) == "hi"


def test_quickstart_texts_are_short(quickstart, tokenizer):
    assert tokenizer.special == SpecialTokens(0, 1, 2, 3)
    assert tokenizer.vocab_size <= 512
    verdict = tokenizer.encode("This is a real image.")
    assert len(verdict) == len(tokenizer.encode(QUESTION)) == 1
    for image in quickstart.digits.test_images:
        answer = tokenizer.encode(quickstart.annotator.answer(image, 1))
        assert len(answer) <= 8
        assert answer[:1] == verdict


def test_digits_keep_a_token_of_their_own_in_captions(tokenizer):
    for d, name in enumerate(DIGIT_NAMES):
        (word,) = tokenizer.encode(name)
        assert all(word in tokenizer.encode(caption(d, p)) for p in range(4))
        assert word in tokenizer.encode(f"a picture of {name}, please")
        assert all(len(tokenizer.encode(caption(d, p))) <= 3 for p in range(4))


def test_training_is_deterministic(quickstart, tokenizer):
    assert quickstart.tokenizer().__getstate__() == tokenizer.__getstate__()
    with pytest.raises(ValueError, match="vocab_size is 100"):
        train_tokenizer(["x"], 100)


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t")
    assert loaded.encode("the digit nine, maybe") == tokenizer.encode("the digit nine, maybe")
    assert loaded.special == tokenizer.special


def qwen_folder(folder, added=None, **files):
    """A tiny vocabulary in Qwen2's files: bytes, then the merges ``h e``, ``l l`` and ``Ġ t``."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"he": 256, "ll": 257, "Ġt": 258}
    files = {"vocab.json": json.dumps(vocab), "merges.txt": "#version: 0.2\nh e\nl l\nĠ t\n"} | files
    if added is not None:
        decoder = {str(i): {"content": t, "special": True} for t, i in added.items()}
        files["tokenizer_config.json"] = json.dumps({"added_tokens_decoder": decoder})
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("declared", [True, False])
def test_qwen_folder(tmp_path, declared):
    t = load_tokenizer(qwen_folder(tmp_path, added=QWEN_IDS if declared else None))
    assert t.special == SpecialTokens(259, 260, 261, 262)  # appended where the folder does not declare them
    assert t.vocab_size == 263
    assert t.encode("hello the")[:2] == [256, 257]
    assert 258 in t.encode("hello the")
    assert t.decode(t.encode("hello the 42 Cafés")) == "hello the 42 Cafés"


def test_qwen_folder_agrees_with_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(qwen_folder(tmp_path, added=QWEN_IDS))
    theirs = transformers.Qwen2Tokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    for text in (
        "hello the hell",
        "the   12,345 words\n\n they'll tell.",
        "Cafe\u0301 的 hé",
        "  t t\tt ",
        "a_b  c\r\n",
    ):
        assert ours.encode(text) == theirs(text)["input_ids"]


def test_load_errors_name_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"lacks \['vocab.json', 'merges.txt'\]"):
        load_tokenizer(tmp_path)
    qwen_folder(tmp_path, added={"<|im_start|>": 300})
    with pytest.raises(ValueError, match="id 300, which does not continue"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)
