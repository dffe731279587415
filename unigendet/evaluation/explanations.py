"""How close the explanations come to the annotations in meaning, and in words.

Two measures, each the cosine of an explanation's vector and its annotation's, and each under its own name:

- ``css``: vectors of a *sentence encoder*, the cosine semantic similarity of the paper's evaluation. It needs an
  encoder in a local folder, and its numbers can be compared only between runs with the same encoder.
- ``tfidf_cosine``: TF-IDF vectors of single words, fitted on the annotations of the very run. It needs nothing, and it
  is lexical: a synonym counts as little as any other word. It is no stand-in for ``css``.

An empty explanation scores 0; an image without an annotation scores nothing (None).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer

from unigendet.config import check
from unigendet.data.hashes import file_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def tfidf_cosines(explanations: Sequence[str], references: Sequence[str]) -> list[float | None]:
    """``tfidf_cosine`` of every pair of texts, in [0, 1]; None for an empty reference.

    scikit-learn's ``TfidfVectorizer`` (lower case, smoothed inverse document frequencies, unit length) over words of
    one letter or more, fitted on the references that are not empty.
    """
    if not any(re.search(r"\w", text) for text in references):  # no word to fit to
        return [0.0 if reference else None for reference in references]
    fitted = TfidfVectorizer(token_pattern=r"\b\w+\b").fit([text for text in references if text])
    cosines = fitted.transform(explanations).multiply(fitted.transform(references)).sum(axis=1)
    values = np.clip(np.asarray(cosines, np.float64).ravel(), 0, 1)
    return [float(value) if text else None for value, text in zip(values, references, strict=True)]


class SentenceEncoder:
    """A sentence encoder from a local folder: the mean of the last hidden states of a text's tokens, at unit length.

    Args:
        folder: as transformers saves a model and its tokenizer; the weights as safetensors.
        device: where it runs.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks ``config.json`` or safetensors weights.
        ValueError: its content cannot be read as a model with a tokenizer.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no sentence encoder at {folder}: no such folder")
        lacks = [name for name in ("config.json", "*.safetensors") if not any(folder.glob(name))]
        if lacks:
            raise FileNotFoundError(f"the sentence encoder {folder} lacks {' and '.join(lacks)}")
        self.folder, self._device = folder, torch.device(device)
        self._tokenizer, self._model = _load(folder)
        self._model.to(self._device).eval()

    @property
    def longest(self) -> int:
        """Tokens of a text that are read; the rest is cut off."""
        # Two less than the table has: in RoBERTa's family positions begin after the padding's.
        positions = getattr(self._model.config, "max_position_embeddings", None)
        limits = [self._tokenizer.model_max_length, *([positions - 2] if positions else [])]
        return int(min(limits))

    def describe(self) -> dict[str, Any]:
        """What the numbers depend on: the folder's name, the weights' SHA-256, the longest text in tokens."""
        digest = hashlib.sha256()
        for file in sorted(self.folder.glob("*.safetensors")):
            digest.update(file_hash(file))
        return {"name": self.folder.resolve().name, "weights_sha256": digest.hexdigest(), "max_tokens": self.longest}

    @torch.no_grad()
    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> NDArray[np.float32]:
        """Unit vectors float32 [N, D] of N texts."""
        check(batch_size > 0, "batch_size", batch_size, "positive")
        rows = []
        for start in range(0, len(texts), batch_size):
            tokens = self._tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=self.longest,
                return_tensors="pt",
            ).to(self._device)
            hidden = self._model(**tokens).last_hidden_state.float()  # [B, T, D]
            mask = tokens["attention_mask"][..., None].float()  # [B, T, 1]
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            rows.append(torch.nn.functional.normalize(mean, dim=-1).cpu())
        return torch.cat(rows).numpy() if rows else np.zeros((0, 0), np.float32)

    def cosines(self, explanations: Sequence[str], references: Sequence[str]) -> list[float | None]:
        """``css`` of every pair of texts, in [-1, 1]; 0 for an empty explanation, None for an empty reference."""
        pairs = list(zip(explanations, references, strict=True))
        texts = sorted({text for explanation, reference in pairs if explanation and reference
                        for text in (explanation, reference)}, key=lambda text: (len(text), text))  # fmt: skip
        places, vectors = {text: i for i, text in enumerate(texts)}, self.encode(texts)

        def cosine(explanation: str, reference: str) -> float | None:
            if not reference:
                return None
            return float(vectors[places[explanation]] @ vectors[places[reference]]) if explanation else 0.0

        return [cosine(*pair) for pair in pairs]


def _load(folder: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, found = AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # transformers raises whatever its parts do
        why = str(error).strip().partition("\n")[0]
        raise ValueError(f"{folder} does not hold a sentence encoder: {type(error).__name__}: {why}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    # transformers fills what is missing with random numbers. The pooler comes after the states that are used here.
    missing = sorted(name for name in found["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ValueError(f"the sentence encoder {folder} lacks weights: {', '.join(missing[:5])}")
    return tokenizer, model
