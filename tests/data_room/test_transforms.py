import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unigendet.config import DataConfig, ImageConfig, LoaderConfig
from unigendet.data.transforms import ImageTransform, read_image, resized_size, to_image, to_rgb

LATENT = {"min_size": 512, "max_size": 1024, "stride": 16}
VIT = {"min_size": 224, "max_size": 980, "stride": 14}


@pytest.mark.parametrize(
    ("size", "rule", "want"),
    [
        ((640, 480), LATENT, (688, 512)),  # shorter edge up to 512: 682.67 → 683 → 688
        ((640, 480), VIT, (644, 476)),  # 45.7 and 34.3 strides
        ((2048, 1024), LATENT, (1024, 512)),
        ((4000, 1000), LATENT, (1024, 256)),  # both cannot hold: the longer edge wins
        ((100, 100), VIT, (224, 224)),
        ((5000, 5), VIT, (980, 14)),  # at least one stride
        ((1000, 600), LATENT, (992, 608)),  # 62.5 strides: round half to even
        ((607, 1095), LATENT, (576, 1024)),  # 567.6 → 568 pixels → 35.5 strides → 36: rounded to whole pixels first
        ((800, 801), VIT, (798, 798)),
        ((8, 8), {"min_size": 8, "max_size": 8, "stride": 2}, (8, 8)),
        ((1000, 1000), {"min_size": 16, "max_size": 1024, "stride": 16, "max_pixels": 256 * 256}, (256, 256)),
        ((1024, 512), {"min_size": 16, "max_size": 1024, "stride": 16, "max_pixels": 512 * 256}, (512, 256)),
    ],
)
def test_sizes(size, rule, want):
    assert resized_size(*size, **rule) == want == ImageTransform(**rule).size_of(*size)


@settings(max_examples=300, deadline=None)
@given(
    width=st.integers(1, 6000),
    height=st.integers(1, 6000),
    rule=st.sampled_from([LATENT, VIT]),
    max_pixels=st.sampled_from([14 * 14 * 9 * 1024, 300_000, 20_000]),
)
def test_sizes_keep_every_bound(width, height, rule, max_pixels):
    size = resized_size(width, height, **rule, max_pixels=max_pixels)
    assert all(edge >= rule["stride"] and edge % rule["stride"] == 0 for edge in size)
    assert max(size) <= rule["max_size"]
    assert size[0] * size[1] <= max_pixels
    assert resized_size(height, width, **rule, max_pixels=max_pixels) == size[::-1]
    if max_pixels > 10**6:
        assert min(size) >= rule["min_size"] or max(size) == rule["max_size"]


def test_no_resampling_where_none_is_needed():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 42, 3), dtype=np.uint8))
    tensor = ImageTransform(14, 56, 14)(image)
    assert tensor.shape == (3, 28, 42)
    assert tensor.dtype == torch.float32
    assert torch.equal(tensor, torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 * 2 - 1)
    assert np.array_equal(np.asarray(to_image(tensor)), np.asarray(image))


def test_resampling_is_bicubic_and_antialiased():
    """Against torch's own antialiased bicubic; a checkerboard shrunk fourfold must become flat grey."""
    board = np.indices((128, 128)).sum(0) % 2 * 255
    smooth = np.add.outer(np.arange(128), np.arange(128)) % 256
    for values in (board, smooth):
        image = Image.fromarray(values.astype(np.uint8)).convert("RGB")
        got = ImageTransform(32, 32, 16)(image)
        want = torch.nn.functional.interpolate(
            torch.from_numpy(values)[None, None].float() / 255, (32, 32), mode="bicubic", antialias=True
        )[0, 0]
        assert (got[1] - (want.clamp(0, 1) * 2 - 1)).abs().max() < 0.02
    assert ImageTransform(32, 32, 16)(Image.fromarray(board.astype(np.uint8))).abs().max() < 0.05


def test_transparency_is_composited_on_white():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (200, 0, 0, 255)
    pixels[0, 1] = (200, 0, 0, 0)
    pixels[1, 0] = (0, 0, 0, 51)
    rgb = np.asarray(to_rgb(Image.fromarray(pixels)))
    assert rgb[0, 0].tolist() == [200, 0, 0]
    assert rgb[0, 1].tolist() == [255, 255, 255]
    assert rgb[1, 0].tolist() == [204, 204, 204]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    palette.info["transparency"] = 0
    assert np.asarray(to_rgb(palette)).tolist() == [[[255, 255, 255]]]
    deep = Image.fromarray(np.array([[65535, 0]], np.uint16))
    assert np.asarray(to_rgb(deep))[..., 0].tolist() == [[255, 0]]


def test_grey():
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    tensor = ImageTransform(8, 8, 2, channels=1)(image)
    assert torch.equal(tensor, torch.arange(64).reshape(1, 8, 8) * 4 / 255 * 2 - 1)
    with pytest.raises(ValueError, match="channels is 4"):
        ImageTransform(8, 8, 2, channels=4)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image .*gone.png does not exist"):
        read_image(tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text.png cannot be decoded"):
        read_image(tmp_path / "text.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut.png cannot be decoded"):
        read_image(tmp_path / "cut.png")


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"image.max_size is 1000; it must be a positive multiple of 16"):
        ImageConfig(min_size=512, max_size=1000, stride=16)
    with pytest.raises(ValueError, match=r"image.max_size is 16; it must be at least min_size"):
        ImageConfig(min_size=32, max_size=16, stride=16)
    with pytest.raises(ValueError, match=r"loader.num_workers is -1; it must be at least 0"):
        LoaderConfig(num_workers=-1)
    with pytest.raises(ValueError, match="teacher_prompt"):
        DataConfig(teacher_prompt="no place for it")
