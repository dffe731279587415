import json

import numpy as np
import pytest
from sklearn.svm import SVC

from unigendet.data import quickstart as qs


def load(data, entries, category):
    return np.stack([qs.read_png(data.folder / e["image"]) for e in entries if e["cate"] == category])


def features(images):
    return images.reshape(len(images), -1).astype(float)


def frechet(a, b, pca):
    a, b = pca.transform(a), pca.transform(b)
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.clip(np.linalg.eigvals(cov_a @ cov_b).real, 0, None)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root


def test_split_is_fixed_stratified_and_disjoint():
    digits = qs.load_digits()
    assert digits.train_images.shape == (1400, 8, 8)
    assert digits.test_images.shape == (397, 8, 8)
    assert np.array_equal(digits.test_labels, qs.load_digits().test_labels)
    share = np.bincount(digits.train_labels) / 1400 - np.bincount(digits.test_labels) / 397
    assert np.abs(share).max() < 0.005
    train = {image.tobytes() for image in digits.train_images}
    assert not any(image.tobytes() in train for image in digits.test_images)


def test_png_keeps_every_level(tmp_path):
    image = np.resize(np.arange(17, dtype=np.uint8), (8, 8))
    qs.write_png(tmp_path / "x.png", image)
    assert np.array_equal(qs.read_png(tmp_path / "x.png"), image)


def test_files_hold_the_promised_images(quickstart):
    train = json.loads(quickstart.train_detection.read_text())
    test = json.loads(quickstart.test_detection.read_text())
    count = lambda entries: {c: sum(e["cate"] == c for e in entries) for c in {e["cate"] for e in entries}}  # noqa: E731
    assert count(train) == {"real": 1400, "gaussian_mixture": 4200}  # the kernel density is held out
    assert count(test) == {"real": 397, "gaussian_mixture": 397, "kernel_density": 397}
    assert all(e["label"] == (e["cate"] == "real") for e in train + test)
    real = load(quickstart, train, "real")
    assert np.array_equal(real, quickstart.digits.train_images)
    fakes = load(quickstart, train, "gaussian_mixture")
    assert set(np.unique(fakes)) == set(np.unique(real)) == set(range(17))
    seen = {image.tobytes() for image in [*real, *fakes]}
    for category in count(test):
        assert not any(image.tobytes() in seen for image in load(quickstart, test, category))


def test_same_seed_same_data(tmp_path):
    digits = qs.load_digits()
    for kind in qs.GENERATORS:
        generator = qs.DigitGenerator(kind, digits.train_images, digits.train_labels)
        again = qs.DigitGenerator(kind, digits.train_images, digits.train_labels)
        labels = digits.test_labels[:50]
        images = generator.sample(labels, 7)
        assert np.array_equal(images, again.sample(labels, 7))
        assert not np.array_equal(images, again.sample(labels, 8))
    with pytest.raises(ValueError, match="kind is 'gan'"):
        qs.DigitGenerator("gan", digits.train_images, digits.train_labels)


def test_the_task_is_neither_trivial_nor_impossible(quickstart):
    """A support vector machine on raw pixels, trained on real against the seen generator."""
    train = json.loads(quickstart.train_detection.read_text())
    test = json.loads(quickstart.test_detection.read_text())
    real, fake = features(load(quickstart, train, "real")), features(load(quickstart, train, "gaussian_mixture"))
    machine = SVC(C=10, class_weight="balanced").fit(np.vstack([real, fake]), np.repeat([1, 0], [len(real), len(fake)]))
    said_real = {c: machine.predict(features(load(quickstart, test, c))).mean() for c in ("real", *qs.GENERATORS)}
    seen = (said_real["real"] + 1 - said_real["gaussian_mixture"]) / 2
    held_out = (said_real["real"] + 1 - said_real["kernel_density"]) / 2
    assert 0.80 < seen < 0.97
    assert 0.75 < held_out < 0.97


def test_the_generators_are_good_ones(quickstart):
    from sklearn.decomposition import PCA

    digits = quickstart.digits
    test = json.loads(quickstart.test_detection.read_text())
    pca = PCA(20, svd_solver="full").fit(features(digits.train_images))
    reader = SVC(C=10).fit(features(digits.train_images), digits.train_labels)
    for kind in qs.GENERATORS:
        images = features(load(quickstart, test, kind))
        assert 15 < frechet(images, features(digits.test_images), pca) < 32
        assert reader.score(images, digits.test_labels) > 0.97


def test_measure_by_hand():
    image = np.zeros((8, 8), int)
    image[2:6, 3] = 16  # one vertical stroke of four pixels
    image[6, 6] = 2  # diagonal distance from the stroke: a speck, and faint
    image[2, 4] = 3  # touches the stroke: faint, but no speck
    got = qs.measure(image)
    assert got == {"specks": 1.0, "haze": 2.0, "edges": (2 + 8) / 4, "ink": 1.0, "pieces": 1.0}
    image[4, 3] = 0
    assert qs.measure(image)["pieces"] == 2.0
    assert qs.measure(np.zeros((8, 8), int))["edges"] == 0
    with pytest.raises(ValueError, match=r"image has shape \[4, 4\]"):
        qs.measure(np.zeros((4, 4)))


def test_explanations_depend_on_the_image_alone_and_are_short(quickstart):
    annotator = quickstart.annotator
    for image in quickstart.digits.test_images[:30]:
        real, fake = annotator.answer(image, 1), annotator.answer(image, 0)
        assert real.startswith("This is a real image.")
        assert fake.startswith("This is a fake image.")
        assert real.removeprefix(qs.VERDICTS[1]) == fake.removeprefix(qs.VERDICTS[0])
        assert len(real.split()) <= 22
    with pytest.raises(ValueError, match="label is 2"):
        annotator.answer(quickstart.digits.test_images[0], 2)


def test_words_carry_information(quickstart):
    """Thirds are thirds on real images, and the words lean the other way on fakes without deciding the verdict."""
    test = json.loads(quickstart.test_detection.read_text())
    share = {}
    for category in ("real", "gaussian_mixture"):
        words = [quickstart.annotator.words(image) for image in load(quickstart, test, category)]
        share[category] = lambda word, words=words: np.mean([word in w for w in words])
    for word in ("soft edges", "even edges", "crisp edges", "pale ink", "medium ink", "dark ink"):
        assert 0.2 < share["real"](word) < 0.47
    for word in ("thick haze", "soft edges", "pale ink", "a speckled background"):
        assert share["gaussian_mixture"](word) > share["real"](word) + 0.15
        assert share["gaussian_mixture"](word) < 0.95


def test_model_samples_become_fakes(quickstart, tmp_path):
    images = quickstart.digits.test_images[:3]
    entries = qs.write_detection_images(tmp_path, "model", images, 0, "model", quickstart.annotator)
    assert [e["cate"] for e in entries] == ["model"] * 3
    assert np.array_equal(np.stack([qs.read_png(tmp_path / e["image"]) for e in entries]), images)
    assert entries[0]["conversations"][1]["value"] == quickstart.annotator.answer(images[0], 0)


def test_captions_name_the_digit(quickstart):
    entries = json.loads(quickstart.train_captions.read_text())
    labels = quickstart.digits.train_labels
    assert len(entries) == len(labels)
    assert all(qs.DIGIT_NAMES[label] in e["prompt"].split() for e, label in zip(entries, labels, strict=True))
    assert len({e["prompt"] for e in entries}) == 40
    test = json.loads(quickstart.test_captions.read_text())
    assert {e["prompt"] for e in test} == {qs.caption(d) for d in range(10)}
