import numpy as np
import pytest
import scipy.linalg
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from unigendet.evaluation.generation import DigitJudge, frechet_distance


def textbook(a, b):
    """The distance as it is usually written, with a matrix square root."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * root)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return train_test_split(data.images, data.target, test_size=397, stratify=data.target, random_state=0)


@pytest.fixture(scope="module")
def judge(digits):
    train, test, train_digits, test_digits = digits
    return DigitJudge(train, train_digits, test, test_digits)


def test_frechet_is_the_textbook_formula():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6))
    b = rng.normal(size=(150, 6)) @ rng.normal(size=(6, 6)) + 1.5
    assert frechet_distance(a, b) == pytest.approx(textbook(a, b), rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_frechet_of_diagonal_gaussians_in_closed_form():
    corners = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])  # covariance 4/3 · identity
    assert frechet_distance(corners, corners * 3 + [2.0, 0.0]) == pytest.approx(4 + 2 * (4 / 3) * (3 - 1) ** 2)


def test_frechet_survives_singular_covariances():
    rng = np.random.default_rng(1)
    few = rng.normal(size=(5, 40))  # fewer samples than features
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(few, few + 2) == pytest.approx(4 * 40, rel=1e-12)
    assert frechet_distance(np.ones((3, 4)), np.zeros((7, 4))) == pytest.approx(4)
    assert frechet_distance(few.astype(np.float32) * 1e4, few.astype(np.float32) * 1e4) <= 1e-3


@pytest.mark.parametrize(
    ("a", "b", "match"),
    [
        (np.zeros((1, 3)), np.zeros((4, 3)), "features_a.shape"),
        (np.zeros((4, 3)), np.zeros((4, 2)), "features_b.shape"),
        (np.zeros(4), np.zeros((4, 2)), "features_a.shape"),
        (np.zeros((4, 2)), np.full((4, 2), np.inf), "features_b is"),
    ],
)
def test_frechet_refuses(a, b, match):
    with pytest.raises(ValueError, match=match):
        frechet_distance(a, b)


def test_reference_numbers(judge):
    reference = judge.reference()
    assert 0.98 <= reference.svm_accuracy <= 1
    assert 9 <= reference.frechet_train <= 17
    assert reference.frechet_train < reference.frechet_train_matched < 30


def test_agreement_reads_pixels(judge, digits):
    _, test, _, test_digits = digits
    right = judge.agreement(test, test_digits)
    assert right.count == 397
    assert right.interval[0] < right.accuracy < right.interval[1]
    assert sum(right.digit_counts.values()) == 397
    assert sum(right.per_digit[d] * n for d, n in right.digit_counts.items()) == pytest.approx(397 * right.accuracy)
    assert judge.agreement(test, (test_digits + 1) % 10).accuracy < 0.02
    threes = test[test_digits == 3][:4]
    assert judge.agreement(threes, [3, 3, 8, 8]).per_digit == {3: 1.0, 8: 0.0}


def test_frechet_orders_damage(judge, digits):
    test = digits[1]
    noise = np.random.default_rng(0).normal(size=test.shape)
    distances = [judge.frechet(np.clip(test + s * noise, 0, 16)) for s in (0, 1, 3)]
    assert distances[0] == pytest.approx(0, abs=1e-9)
    assert distances[0] < distances[1] < distances[2]
    assert judge.frechet(np.zeros_like(test)) > 500


def test_judge_refuses(judge, digits):
    test = digits[1]
    with pytest.raises(ValueError, match=r"images is 'in \[0, 1600"):
        judge.frechet(test * 100)
    with pytest.raises(ValueError, match=r"images\.shape"):
        judge.read(test[0])
    with pytest.raises(ValueError, match=r"digits\.shape"):
        judge.agreement(test, [1, 2])
    with pytest.raises(ValueError, match="digits 0 to 9"):
        judge.agreement(test[:2], [3, 11])
