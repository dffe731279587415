"""Generation metrics: the Fréchet distance of any two feature sets, and a judge of generated digits.

Fréchet distance: Heusel et al. 2017 (arXiv 1706.08500), eq. 6; for the digits it is defined on ``COMPONENTS`` principal
components of the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.decomposition import PCA
from sklearn.svm import SVC

from unigendet.config import check
from unigendet.evaluation.detection import wilson_interval

PIXEL_MAX = 16.0  # the digits' pixels are counts of a 4×4 block: 0..16
COMPONENTS = 20  # features of the digits' Fréchet distance
SVM_GAMMA = 0.001  # the kernel width of scikit-learn's own digits example
REFERENCE_DRAWS = 10


def frechet_distance(features_a: ArrayLike, features_b: ArrayLike) -> float:
    """Squared Fréchet (Wasserstein-2) distance of the Gaussians fitted to two feature sets, [N, D] and [M, D], N, M ≥
    2.

    |μa − μb|² + tr(Ca + Cb − 2 (Ca Cb)^½) with unbiased covariances, in float64. Needs no matrix square root: with C =
    RᵀR (R from a QR of the centred features) tr (Ca Cb)^½ is the sum of the singular values of Ra Rbᵀ, which stays
    accurate for singular covariances (N < D) and gives 0 for equal sets. The estimate is biased upwards for few
    samples, so compare only numbers from sets of the same sizes.
    Raises ValueError for other shapes, fewer than two rows, or values that are not finite.
    """
    a, b = _features(features_a, "features_a"), _features(features_b, "features_b")
    check(a.shape[1] == b.shape[1], "features_b.shape[1]", b.shape[1], f"features_a.shape[1] ({a.shape[1]})")
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    means = np.sum((a.mean(0) - b.mean(0)) ** 2)
    overlap = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    return float(max(0.0, means + np.sum(root_a**2) + np.sum(root_b**2) - 2 * overlap))


def _features(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    check(array.ndim == 2 and array.shape[0] >= 2, f"{name}.shape", array.shape, "[N, D] with N at least 2")
    check(bool(np.isfinite(array).all()), name, "not finite everywhere", "finite")
    return array


def _covariance_root(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """R [min(N, D), D] with RᵀR the unbiased covariance of ``features`` [N, D]."""
    return np.linalg.qr((features - features.mean(0)) / np.sqrt(len(features) - 1), mode="r")


@dataclass(frozen=True)
class Agreement:
    """How many images show the digit that their prompt asked for.

    ``accuracy`` of ``count`` images with its 95 % Wilson ``interval``; ``per_digit``: accuracy for each digit that was
    asked for, of ``digit_counts`` images.
    """

    count: int
    accuracy: float
    interval: tuple[float, float]
    per_digit: dict[int, float]
    digit_counts: dict[int, int]


@dataclass(frozen=True)
class JudgeReference:
    """What real digits score, to read the generated digits' numbers against.

    ``svm_accuracy``: the SVM on the real test digits, the ceiling of agreement. ``frechet_train``: all training digits
    against the test digits. ``frechet_train_matched``: as many training digits, class by class, as there are test
    digits (mean over ``REFERENCE_DRAWS`` draws with a fixed seed): the sample sizes of a generated set, so the distance
    that a perfect generator would reach. It lies above ``frechet_train``: fewer samples bias the estimate upwards.
    """

    svm_accuracy: float
    frechet_train: float
    frechet_train_matched: float


class DigitJudge:
    """Reads and scores 8×8 images of digits with two models fitted to the real *training* digits alone.

    Fréchet features: ``components`` principal components; reader: an RBF support vector machine. Both see pixels 0..16.

    Args: train_images [N, 8, 8] and test_images [M, 8, 8], values in [0, 16] (any real dtype); train_digits [N] and
    test_digits [M], 0..9.
    Raises ValueError for other shapes or values, for one training class only, or fewer training images than components.
    """

    def __init__(
        self,
        train_images: ArrayLike,
        train_digits: ArrayLike,
        test_images: ArrayLike,
        test_digits: ArrayLike,
        *,
        components: int = COMPONENTS,
    ) -> None:
        train, test = _pixels(train_images, "train_images"), _pixels(test_images, "test_images")
        self.train_digits = _digits(train_digits, "train_digits", len(train))
        self.test_digits = _digits(test_digits, "test_digits", len(test))
        check(0 < components <= min(train.shape), "components", components, f"in 1..{min(train.shape)}")
        check(
            len(np.unique(self.train_digits)) > 1,
            "train_digits",
            np.unique(self.train_digits).tolist(),
            "of two classes or more",
        )
        self._pca = PCA(components, svd_solver="full").fit(train)
        self._svm = SVC(gamma=SVM_GAMMA).fit(train, self.train_digits)
        self._train, self._test = train, test
        self._test_features = self._pca.transform(test)

    def read(self, images: ArrayLike) -> NDArray[np.int64]:
        """The digits the SVM sees: [N, 8, 8] → int64 [N]."""
        return self._svm.predict(_pixels(images, "images")).astype(np.int64)

    def frechet(self, images: ArrayLike) -> float:
        """Fréchet distance of images [N, 8, 8] to the real test digits.

        Use the test set's class counts: images made with ``test_digits`` as their prompts. N ≥ 2.
        """
        return frechet_distance(self._pca.transform(_pixels(images, "images")), self._test_features)

    def agreement(self, images: ArrayLike, digits: ArrayLike) -> Agreement:
        """How well images [N, 8, 8] show the digits [N] they were asked to show. N ≥ 1."""
        seen = self.read(images)
        asked = _digits(digits, "digits", len(seen))
        hit = seen == asked
        classes = np.unique(asked).tolist()
        return Agreement(
            count=len(hit),
            accuracy=float(hit.mean()),
            interval=wilson_interval(int(hit.sum()), len(hit)),
            per_digit={d: float(hit[asked == d].mean()) for d in classes},
            digit_counts={d: int((asked == d).sum()) for d in classes},
        )

    def reference(self) -> JudgeReference:
        """The same measures on real digits."""
        rng = np.random.default_rng(0)
        pools = [np.flatnonzero(self.train_digits == d) for d in range(10)]
        wanted = [min(int((self.test_digits == d).sum()), len(pool)) for d, pool in enumerate(pools)]
        matched = []
        for _ in range(REFERENCE_DRAWS):
            rows = [rng.choice(pool, n, replace=False) for pool, n in zip(pools, wanted, strict=True) if n]
            matched.append(self.frechet(self._train[np.concatenate(rows)]))
        return JudgeReference(
            svm_accuracy=self.agreement(self._test, self.test_digits).accuracy,
            frechet_train=self.frechet(self._train),
            frechet_train_matched=float(np.mean(matched)),
        )


def _pixels(images: ArrayLike, name: str) -> NDArray[np.float64]:
    """Checked images [N, 8, 8] (or already flat [N, 64]) as float64 [N, 64]."""
    array = np.asarray(images, dtype=np.float64)
    check(
        array.shape[1:] in ((8, 8), (64,)) and len(array) > 0,
        f"{name}.shape",
        array.shape,
        "[N, 8, 8] with N at least 1",
    )
    low, high = float(array.min()), float(array.max())
    check(low >= 0 and high <= PIXEL_MAX, name, f"in [{low:g}, {high:g}]", f"in [0, {PIXEL_MAX:g}]")
    return array.reshape(len(array), 64)


def _digits(digits: ArrayLike | Sequence[int], name: str, count: int) -> NDArray[np.int64]:
    array = np.asarray(digits)
    check(array.shape == (count,), f"{name}.shape", array.shape, f"[{count}], one per image")
    check(bool(np.isin(array, range(10)).all()), name, np.unique(array).tolist(), "digits 0 to 9")
    return array.astype(np.int64)
