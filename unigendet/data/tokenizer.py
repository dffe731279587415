"""Byte-level BPE tokenizers: trained on the spot, or read from a BAGEL / Qwen2 folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from unigendet.config import SpecialTokens
from unigendet.data.prompts import is_text
from unigendet.files import rust_errors

SHOWN = 40  # letters of a text in an error message

# In the order of the fields of SpecialTokens.
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")

# Qwen2's rule for where no merge may cross: contractions, words with one leading character, single digits,
# punctuation, spaces.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text to ids and back. Picklable, so it travels into data workers.

    ``encode`` never yields a special token: text that spells one out is encoded letter by letter, so a caption cannot
    end its own segment or begin an image.

    Args:
        backend: a ``tokenizers.Tokenizer`` whose vocabulary holds the four special tokens.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        ids = [backend.token_to_id(token) for token in SPECIAL_TOKENS]
        missing = [token for token, i in zip(SPECIAL_TOKENS, ids, strict=True) if i is None]
        if missing:
            raise ValueError(f"the tokenizer has no special tokens {missing}; it must have {list(SPECIAL_TOKENS)}")
        backend.encode_special_tokens = True
        self._backend = backend
        self.special = SpecialTokens(*ids)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the special ones included; every id is below it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without bos and eos. Raises ValueError for half a surrogate pair, which is no text."""
        if not is_text(text):
            raise ValueError(f"text {text[:SHOWN]!r} is no Unicode text (a lone surrogate)")
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; special tokens and ids beyond the vocabulary (padding of an embedding table) are
        skipped.
        """
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` into ``folder``, which is created."""
        file = Path(folder) / "tokenizer.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        with rust_errors(file):
            self._backend.save(str(file))

    def save_as_published(self, folder: str | Path) -> bool:
        """Write ``vocab.json``, ``merges.txt`` and ``tokenizer_config.json`` into ``folder``, as Qwen2 and BAGEL do.

        Only a tokenizer that cuts texts by Qwen2's rule is the same when it is read from them: for another one nothing
        is written. Returns whether they were.
        """
        state = json.loads(self._backend.to_str())
        steps = (state["pre_tokenizer"] or {}).get("pretokenizers", [])
        if not any(step.get("pattern") == {"Regex": _QWEN2_WORDS} for step in steps):
            return False
        added = {token.pop("id"): token for token in state["added_tokens"]}
        config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": SPECIAL_TOKENS[1], "added_tokens_decoder": added}
        with rust_errors(folder):
            self._backend.model.save(str(folder))
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (Path(folder) / "tokenizer_config.json").write_text(text, encoding="utf-8")
        return True

    def __getstate__(self) -> str:
        return self._backend.to_str()

    def __setstate__(self, state: str) -> None:
        self.__init__(tokenizers.Tokenizer.from_str(state))


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512, *, words: Sequence[str] = ()) -> Tokenizer:
    """Train a byte-level BPE on ``texts``; the same texts give the same tokenizer.

    Merges may cross spaces but not the end of a clause (``. , : ; ? !``) or a line: the clauses of templated
    sentences become single tokens, while every byte keeps a token of its own, so any text can be encoded.

    Args:
        texts: training texts; how often one occurs counts.
        vocab_size: at most so many tokens: 4 special ones (ids 0 to 3), 256 bytes, and merges.
        words: whole words that no merge crosses into, so they read the same in a phrase that is not among ``texts``.
    """
    least = len(SPECIAL_TOKENS) + 256
    if vocab_size < least:
        raise ValueError(f"vocab_size is {vocab_size}; it must be at least {least} (special tokens and bytes)")
    backend = tokenizers.Tokenizer(models.BPE())
    alone = "|".join(["\\n", *(rf"\b{re.escape(word)}\b" for word in words)])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(alone), behavior="isolated"),
            pre_tokenizers.Split(Regex(r"[.,:;?!]+"), behavior="merged_with_previous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read a tokenizer without any download.

    Args:
        folder: holds ``tokenizer.json``, or ``vocab.json`` and ``merges.txt`` as Qwen2 and BAGEL store them; added
            tokens are then read from ``tokenizer_config.json`` or ``added_tokens.json``. Special tokens that a Qwen2
            folder lacks are appended to its vocabulary, as BAGEL does.

    Raises:
        FileNotFoundError: the folder or its files are missing; the message names them.
        ValueError: a file is malformed, or the added tokens do not continue the vocabulary.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"tokenizer folder {folder} does not exist")
    whole = folder / "tokenizer.json"
    if whole.is_file():
        try:
            backend = tokenizers.Tokenizer.from_file(str(whole))
        except Exception as error:  # the library raises bare Exception for malformed files
            raise ValueError(f"{whole} is not a tokenizer: {error}") from error
    else:
        missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"tokenizer folder {folder} lacks {missing}; it must hold tokenizer.json, or vocab.json and merges.txt"
            )
        backend = _qwen2_backend(folder)
    _add_special(backend, [token for token in SPECIAL_TOKENS if backend.token_to_id(token) is None])
    return Tokenizer(backend)


def _qwen2_backend(folder: Path) -> tokenizers.Tokenizer:
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # as above
        raise ValueError(f"{folder}/vocab.json and merges.txt are not a BPE vocabulary: {error}") from error
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    for i, token in sorted(_added_tokens(folder).items()):
        _add_special(backend, [token])
        if backend.token_to_id(token) != i:
            raise ValueError(
                f"{folder} gives the added token {token!r} the id {i}, which does not continue vocab.json; "
                f"the next free id is {backend.token_to_id(token)}"
            )
    return backend


def _added_tokens(folder: Path) -> dict[int, str]:
    """Id → text of the tokens that a folder declares beyond its vocabulary."""
    config, added = folder / "tokenizer_config.json", folder / "added_tokens.json"
    if config.is_file():
        declared = json.loads(config.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
        if declared:
            return {int(i): token["content"] for i, token in declared.items()}
    if added.is_file():
        return {int(i): token for token, i in json.loads(added.read_text(encoding="utf-8")).items()}
    return {}


def _add_special(backend: tokenizers.Tokenizer, tokens: list[str]) -> None:
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
