"""The data of the quickstart: real handwritten digits, two classical generators, and annotations that can be checked.

The 1,797 8×8 digits that ship with scikit-learn are the real images. Fakes come from two generators that are fitted
per class to the training digits only, in the space of their first principal components: a Gaussian mixture, which the
detector trains on, and a kernel density, which it meets in the test for the first time. Every image, real or fake,
has the same 17 grey levels, so the quantisation gives nothing away.

The explanations name measured properties of the very image. A property's thresholds come from the real training
digits, and its words are the same for real and fake images, so an explanation is right or wrong whatever the verdict.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unigendet.config import DataConfig, ImageConfig
from unigendet.data.labelled import VERDICTS
from unigendet.data.tokenizer import Tokenizer, train_tokenizer

SIDE = 8
WHITE = 16  # the largest grey level; levels are 0 (background) to 16 (full ink)
QUESTION = "Is this image real or fake and why?"
TEACHER_PROMPT = QUESTION + "\n{caption}"
GENERATORS = ("gaussian_mixture", "kernel_density")  # seen in training; held out
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = ("a handwritten digit {}", "the digit {}", "the number {} written by hand", "{}")

_SPLIT_SEED = 0  # the split is part of the quickstart's definition, not of a run
_TEST_IMAGES = 397
_COMPONENTS = 12  # principal components per class: 83 to 93 % of its variance
_MIXTURE = 4  # Gaussians per class
_BANDWIDTH = 1.5  # of the kernel density, in grey levels


def data_config() -> DataConfig:
    """Both views at the digits' own size, so nothing is resampled; the teacher reads the question and the caption."""
    view = ImageConfig(min_size=SIDE, max_size=SIDE, stride=2)
    return DataConfig(latent_view=view, vit_view=view, teacher_prompt=TEACHER_PROMPT)


@dataclass(frozen=True, eq=False)
class Digits:
    """The real digits, split. Images uint8 [N, 8, 8] with levels 0..16, labels int64 [N] in 0..9."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_digits(split: int | None = None) -> Digits:
    """scikit-learn's digits, 1,400 for training and 397 for the test, stratified by class.

    Args:
        split: None is the quickstart's split, always the same. A number draws another one: its test images come from
            the quickstart's training images, so none of them is an image that the quickstart is tested on, with which
            in view its settings were chosen; those are training images here.
    """
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    bunch = datasets.load_digits()
    images = bunch.images.astype(np.uint8)
    train, test, train_labels, test_labels = train_test_split(
        images, bunch.target, test_size=_TEST_IMAGES, stratify=bunch.target, random_state=_SPLIT_SEED
    )
    if split is not None:
        rest, fresh, rest_labels, fresh_labels = train_test_split(
            train, train_labels, test_size=_TEST_IMAGES, stratify=train_labels, random_state=split
        )
        train, train_labels = np.concatenate((rest, test)), np.concatenate((rest_labels, test_labels))
        test, test_labels = fresh, fresh_labels
    return Digits(train, train_labels.astype(np.int64), test, test_labels.astype(np.int64))


def quantise(values: np.ndarray) -> np.ndarray:
    """Grey levels as the digits have them: ``values`` [...] on the scale 0..16, rounded and clipped to uint8."""
    return np.clip(np.rint(values), 0, WHITE).astype(np.uint8)


class DigitGenerator:
    """A density per digit class on the class's first principal components.

    Args:
        kind: ``gaussian_mixture`` or ``kernel_density``.
        images: uint8 [N, 8, 8], what to fit to.
        labels: int64 [N].
    """

    def __init__(self, kind: str, images: np.ndarray, labels: np.ndarray) -> None:
        from sklearn.decomposition import PCA
        from sklearn.mixture import GaussianMixture
        from sklearn.neighbors import KernelDensity

        if kind not in GENERATORS:
            raise ValueError(f"kind is {kind!r}; it must be one of {GENERATORS}")
        self.kind = kind
        self._models = {}
        for digit in np.unique(labels):
            pixels = images[labels == digit].reshape(-1, SIDE * SIDE).astype(np.float64)
            pca = PCA(_COMPONENTS, svd_solver="full").fit(pixels)
            if kind == "gaussian_mixture":
                density = GaussianMixture(_MIXTURE, reg_covar=1e-3, random_state=0)
            else:
                density = KernelDensity(bandwidth=_BANDWIDTH)
            self._models[int(digit)] = (pca, density.fit(pca.transform(pixels)))

    def sample(self, labels: np.ndarray, seed: int) -> np.ndarray:
        """One new image per entry of ``labels`` [N] → uint8 [N, 8, 8]. The same seed gives the same images."""
        random = np.random.RandomState(seed)  # scikit-learn samples from the legacy generator only
        images = np.empty((len(labels), SIDE, SIDE), np.uint8)
        for digit in np.unique(labels):
            pca, density = self._models[int(digit)]
            rows = np.flatnonzero(labels == digit)
            if self.kind == "gaussian_mixture":
                density.random_state = random
                features, _ = density.sample(len(rows))
            else:
                features = density.sample(len(rows), random_state=random)
            images[rows] = quantise(pca.inverse_transform(features)).reshape(-1, SIDE, SIDE)
        return images


PROPERTIES = ("specks", "haze", "edges", "ink", "pieces")
_WORDS = {  # from the lowest of the property's values to the highest
    "specks": ("a clean background", "a fleck in the background", "a speckled background"),
    "haze": ("thin haze", "some haze", "thick haze"),
    "edges": ("soft edges", "even edges", "crisp edges"),
    "ink": ("pale ink", "medium ink", "dark ink"),
    "pieces": ("a whole stroke", "a broken stroke"),
}


def measure(image: np.ndarray) -> dict[str, float]:
    """The properties that explanations speak of.

    Args:
        image: [8, 8], levels 0..16.

    Returns:
        ``specks``: inked pixels that touch no stroke (a stroke is a pixel of level ≥ 8); ``haze``: pixels of the
        faint levels 1 to 3; ``edges``: steps of at least half the range between neighbours, per stroke pixel;
        ``ink``: share of the stroke pixels that are at level 15 or 16; ``pieces``: connected parts of the stroke
        (sides only, diagonals do not connect).
    """
    from scipy import ndimage

    values = np.asarray(image, np.int64)
    if values.shape != (SIDE, SIDE):
        raise ValueError(f"image has shape {list(values.shape)}; it must be [{SIDE}, {SIDE}]")
    stroke = values >= WHITE // 2
    size = max(1, int(stroke.sum()))
    touching = ndimage.binary_dilation(stroke, np.ones((3, 3), bool))
    steps = sum(int((np.abs(np.diff(values, axis=axis)) >= WHITE // 2).sum()) for axis in (0, 1))
    return {
        "specks": float(((values > 0) & ~touching).sum()),
        "haze": float(((values >= 1) & (values <= 3)).sum()),
        "edges": steps / size,
        "ink": float((values >= WHITE - 1).sum()) / size,
        "pieces": float(ndimage.label(stroke)[1]),
    }


class Annotator:
    """Puts an image's measured properties into words.

    Counts of specks and pieces are named as they are; the other properties are low, middle or high against the thirds
    of the real images it is fitted to.

    Args:
        real_images: [N, 8, 8], levels 0..16: the real training digits.
    """

    def __init__(self, real_images: np.ndarray) -> None:
        measured = [measure(image) for image in real_images]
        self.thresholds: dict[str, tuple[float, ...]] = {"specks": (0.0, 1.0), "pieces": (1.0,)}
        for name in ("haze", "edges", "ink"):
            thirds = np.quantile([values[name] for values in measured], [1 / 3, 2 / 3])
            self.thresholds[name] = tuple(float(value) for value in thirds)

    def words(self, image: np.ndarray) -> tuple[str, ...]:
        """One phrase per property, in the order of ``PROPERTIES``."""
        values = measure(image)
        return tuple(
            _WORDS[name][int(np.digitize(values[name], self.thresholds[name], right=True))] for name in PROPERTIES
        )

    def answer(self, image: np.ndarray, label: int) -> str:
        """The verdict for ``label`` (1 = real, 0 = fake), then the explanation, which depends on the image alone."""
        if label not in (0, 1):
            raise ValueError(f"label is {label!r}; it must be 1 (real) or 0 (fake)")
        return f"{VERDICTS[label]} It has {', '.join(self.words(image))}."

    def entry(self, path: str, image: np.ndarray, label: int, category: str) -> dict:
        """One entry of a FakeClue annotation file for the image at ``path``."""
        return {
            "image": path,
            "label": int(label),
            "cate": category,
            "conversations": [
                {"from": "human", "value": "<image>" + QUESTION},
                {"from": "gpt", "value": self.answer(image, label)},
            ],
        }


def caption(digit: int, phrasing: int = 0) -> str:
    """A caption for ``digit`` 0..9; phrasing 0 is the one to evaluate with."""
    return CAPTIONS[phrasing].format(DIGIT_NAMES[digit])


def write_png(path: Path, image: np.ndarray) -> None:
    """Grey levels 0..16 [8, 8] as an 8-bit grey PNG; level v becomes round(v · 255 / 16), which can be undone
    exactly.
    """
    from PIL import Image

    Image.fromarray(np.rint(np.asarray(image, np.float64) * (255 / WHITE)).astype(np.uint8)).save(path)


def read_png(path: Path) -> np.ndarray:
    """The grey levels uint8 [8, 8] that ``write_png`` wrote."""
    from PIL import Image

    with Image.open(path) as image:
        return quantise(np.asarray(image.convert("L"), np.float64) * (WHITE / 255))


def write_detection_images(
    folder: Path, name: str, images: np.ndarray, label: int, category: str, annotator: Annotator
) -> list[dict]:
    """Write ``images`` [N, 8, 8] as ``images/{name}/{i:05d}.png`` under ``folder``; returns their annotation entries.

    The model's own samples become fakes this way too.
    """
    target = Path(folder) / "images" / name
    target.mkdir(parents=True, exist_ok=True)
    entries = []
    for i, image in enumerate(images):
        path = f"images/{name}/{i:05d}.png"
        write_png(Path(folder) / path, image)
        entries.append(annotator.entry(path, image, label, category))
    return entries


@dataclass(frozen=True, eq=False)
class QuickstartData:
    """Where ``build_quickstart_data`` put things; image paths in the files are relative to ``folder``."""

    folder: Path
    train_detection: Path  # FakeClue format: the real training digits and Gaussian-mixture fakes
    test_detection: Path  # FakeClue format: unseen real digits, Gaussian-mixture and kernel-density fakes
    train_captions: Path  # LAION format: the real training digits
    test_captions: Path  # LAION format: the real test digits, phrasing 0 throughout
    digits: Digits
    annotator: Annotator

    def tokenizer(self) -> Tokenizer:
        """A tokenizer of at most 512 tokens, trained on every training text as often as it occurs.

        Each clause of an answer becomes one token. In captions the digit's word stays apart from the phrase around it.
        """
        detection = json.loads(self.train_detection.read_text(encoding="utf-8"))
        captions = json.loads(self.train_captions.read_text(encoding="utf-8"))
        texts = [turn["value"].removeprefix("<image>") for entry in detection for turn in entry["conversations"]]
        texts += [entry["prompt"] for entry in captions]
        return train_tokenizer(texts, 512, words=DIGIT_NAMES)


def build_quickstart_data(
    folder: str | Path, seed: int = 0, *, fakes_per_real: int = 3, split: int | None = None
) -> QuickstartData:
    """Write the quickstart's images and annotation files.

    Args:
        folder: where to; it is created, and files of an earlier run are overwritten.
        seed: what the generators draw and which phrasing a caption has. The split of the real digits does not depend
            on it.
        fakes_per_real: Gaussian-mixture fakes per real training digit.
        split: of the real digits, see ``load_digits``.

    Returns:
        The paths, the digits and the annotator.
    """
    if fakes_per_real < 1:
        raise ValueError(f"fakes_per_real is {fakes_per_real}; it must be at least 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits(split)
    annotator = Annotator(digits.train_images)
    seen, held_out = (DigitGenerator(kind, digits.train_images, digits.train_labels) for kind in GENERATORS)
    streams = [int(s) for s in np.random.SeedSequence(seed).generate_state(4)]
    train_fakes = seen.sample(np.tile(digits.train_labels, fakes_per_real), streams[0])

    def write(name: str, images: np.ndarray, label: int, category: str) -> list[dict]:
        return write_detection_images(folder, name, images, label, category, annotator)

    train_real = write("train_real", digits.train_images, 1, "real")
    test_real = write("test_real", digits.test_images, 1, "real")
    train = train_real + write("train_gaussian_mixture", train_fakes, 0, GENERATORS[0])
    test = test_real.copy()
    test += write("test_gaussian_mixture", seen.sample(digits.test_labels, streams[1]), 0, GENERATORS[0])
    test += write("test_kernel_density", held_out.sample(digits.test_labels, streams[2]), 0, GENERATORS[1])
    phrasings = np.random.default_rng(streams[3]).integers(len(CAPTIONS), size=len(train_real))
    return QuickstartData(
        folder=folder,
        train_detection=_write_json(folder / "train_detection.json", train),
        test_detection=_write_json(folder / "test_detection.json", test),
        train_captions=_write_json(
            folder / "train_captions.json", _captions(train_real, digits.train_labels, phrasings)
        ),
        test_captions=_write_json(
            folder / "test_captions.json", _captions(test_real, digits.test_labels, np.zeros(len(test_real), int))
        ),
        digits=digits,
        annotator=annotator,
    )


def _captions(entries: Sequence[dict], labels: np.ndarray, phrasings: np.ndarray) -> list[dict]:
    return [
        {"image_path": entry["image"], "prompt": caption(int(label), int(phrasing))}
        for entry, label, phrasing in zip(entries, labels, phrasings, strict=True)
    ]


def _write_json(path: Path, entries: list[dict]) -> Path:
    path.write_text(json.dumps(entries, indent=0), encoding="utf-8")
    return path
