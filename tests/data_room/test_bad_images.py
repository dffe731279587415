"""Every odd kind of image file through ``read_image`` and ``ImageTransform``: upright 8-bit RGB, or an error that names
the file and what to do. ``tests/test_detect_command.py`` takes the same files through the command.
"""

import os
import warnings

import numpy as np
import pytest
import torch
from image_zoo import BAD, GOOD, ORIENTATION, UPRIGHT, oriented, saving
from PIL import Image

from unigendet.config import ImageConfig
from unigendet.data.transforms import ImageTransform, read_image, to_rgb

VIEWS = {"latent": ImageConfig(min_size=512, max_size=1024, stride=16),
         "ViT": ImageConfig(min_size=224, max_size=980, stride=14)}  # fmt: skip


def write(folder, kind, name):
    path = folder / name
    kind[name][0](path)
    return path


@pytest.mark.parametrize("name", GOOD)
def test_what_is_seen(tmp_path, name):
    path = write(tmp_path, GOOD, name)
    _, pixels, tolerance = GOOD[name]
    image = read_image(path)
    assert image.mode == "RGB"
    assert np.asarray(image).shape == np.shape(pixels)
    assert np.abs(np.asarray(image, int) - np.array(pixels, int)).max() <= tolerance
    with Image.open(path) as opened:
        assert np.array_equal(np.asarray(to_rgb(opened)), np.asarray(image))
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image))  # nothing is applied twice


@pytest.mark.parametrize("name", GOOD)
def test_views(tmp_path, name):
    path = write(tmp_path, GOOD, name)
    image = read_image(path)
    for view in VIEWS.values():
        for channels in (1, 3):
            transform = ImageTransform.from_config(view, channels)
            pixels = transform(image)
            width, height = transform.size_of(*image.size)
            assert pixels.shape == (channels, height, width)
            assert torch.isfinite(pixels).all()
            assert pixels.abs().max() <= 1


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read(tmp_path, name):
    path = write(tmp_path, BAD, name)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read_image(path)
    text = str(caught.value)
    assert text.startswith(f"image {path} ")
    assert BAD[name][1] in text
    assert isinstance(caught.value, FileNotFoundError) == ("does not exist" in text)


def test_orientations_differ_in_the_file(tmp_path):
    """Else the test of what is seen would hold for a reader that looks at no orientation."""
    stored = set()
    for value in range(1, 9):
        oriented(value)(tmp_path / "x.png")
        with Image.open(tmp_path / "x.png") as image:
            assert image.getexif()[ORIENTATION] == value
            stored.add((image.size, image.tobytes()))
    assert len(stored) == 8


def test_photographs_of_every_format_are_turned(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # stored lying on its left side
    for name, options in {
        "a.jpg": {"quality": 100, "subsampling": 0},
        "a.webp": {"lossless": True},
        "a.tif": {},
    }.items():
        saving(Image.fromarray(np.rot90(UPRIGHT)), exif=exif, **options)(tmp_path / name)
        assert np.abs(np.asarray(read_image(tmp_path / name), int) - UPRIGHT).max() <= 8


def test_no_permission(tmp_path, monkeypatch):
    path = write(tmp_path, GOOD, "rgba.png")
    path.chmod(0)
    if os.geteuid() == 0:  # root may read everything

        def refused(path):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Image, "open", refused)
    with pytest.raises(
        ValueError, match=r"image .*rgba\.png may not be read: permission denied; change its permissions"
    ):
        read_image(path)


def test_a_decoder_that_fails_in_its_own_way(tmp_path, monkeypatch):
    path = write(tmp_path, GOOD, "rgba.png")
    for error, text in ((KeyError("IHDR"), "cannot be decoded: 'IHDR'; the file is damaged"),
                        (EOFError(), "cannot be decoded: EOFError; the file is damaged"),
                        (MemoryError(), "cannot be decoded: there is not enough memory; scale it down")):  # fmt: skip
        monkeypatch.setattr(Image, "open", lambda path, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(ValueError, match=r"image .*rgba\.png " + text):
            read_image(path)


def test_large_images(tmp_path, monkeypatch):
    """Up to twice Pillow's limit an image is read, and beyond refused."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for size in ((10, 10), (10, 20), (10, 21)):
        Image.new("RGB", size).save(tmp_path / "x.png")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if size == (10, 21):
                with pytest.raises(
                    ValueError, match=r"image .*x\.png has too many pixels to be opened safely: .*scale"
                ):
                    read_image(tmp_path / "x.png")
            else:
                assert read_image(tmp_path / "x.png").size == size
    Image.new("RGB", (10, 20)).save(tmp_path / "x.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an application may choose the lower limit
        with pytest.raises(ValueError, match=r"x\.png has too many pixels"):
            read_image(tmp_path / "x.png")


def test_opened_images_are_refused_without_a_name():
    with pytest.raises(
        ValueError, match=r"^the image holds 32-bit values from 0 to 70000; they must be from 0 to 255 or"
    ):
        to_rgb(Image.fromarray(np.array([[0, 70000]], np.int32)))
