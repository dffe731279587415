"""Image files of every odd kind. ``GOOD``: name → (write, expected RGB pixels, tolerance); ``BAD``: name → (write,
what the error must say). ``write(path)`` makes the file.
"""

import os
import struct
import zlib

import numpy as np
from PIL import Image

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
EDGES = np.array([[0, 32896, 65535]], np.uint16)  # 32896 = 128 · 257
GREYS = [[(0,) * 3, (128,) * 3, (255,) * 3]]
ORIENTATION = 0x0112
# How the file of each orientation stores what is seen.
STORED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: np.rot90,
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}
UPRIGHT = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 14


def saving(image, **options):
    return lambda path: image.save(path, **options)


def array(values, dtype):
    return Image.fromarray(np.array(values, dtype))


def png(width, height, depth, colour, rows):
    """The bytes of a PNG from its rows' bytes, for what Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def writing(content):
    return lambda path: path.write_bytes(content)


def palette(**options):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    return saving(image, **options)


def animated(**options):
    red, blue = (Image.new("RGB", (4, 3), colour) for colour in (RED, BLUE))
    return saving(red, save_all=True, append_images=[blue], duration=100, **options)


def oriented(value):
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return saving(Image.fromarray(np.ascontiguousarray(STORED[value](UPRIGHT))), exif=exif)


def filled(colour, width, height):
    return np.full((height, width, 3), colour, np.uint8)


def cut(format_name):
    def write(path):
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path, format_name)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])

    return write


GOOD = {
    "grey16.png": (saving(array(EDGES, np.uint16)), GREYS, 0),
    "grey16-big-endian.tif": (saving(array(EDGES, ">u2")), GREYS, 0),
    "rgb16.png": (writing(png(1, 1, 16, 2, [bytes([0x80, 0xFF, 0x00, 0x10, 0xFF, 0x00])])), [[(128, 0, 255)]], 0),
    "float-to-1.tif": (saving(array(EDGES / 65535, np.float32)), GREYS, 0),
    "float-to-255.tif": (saving(array([[0, 128, 254.7]], np.float32)), GREYS, 0),
    "float-to-65535.tif": (saving(array(EDGES, np.float32)), GREYS, 0),
    "integers-to-255.tif": (saving(array([[0, 128, 255]], np.int32)), GREYS, 0),
    "integers-to-65535.tif": (saving(array(EDGES, np.int32)), GREYS, 0),
    "grey16-transparent.png": (saving(array(EDGES, np.uint16), transparency=0), [[WHITE, *GREYS[0][1:]]], 0),
    "bits.png": (saving(Image.new("1", (2, 1), 1)), [[WHITE, WHITE]], 0),
    "cmyk.jpg": (saving(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=95), filled(RED, 8, 8), 3),
    "cmyk.tif": (saving(Image.new("CMYK", (2, 2), (0, 255, 255, 0))), filled(RED, 2, 2), 0),
    "palette.png": (palette(), [[RED, BLUE]], 0),
    "palette-transparent.png": (palette(transparency=1), [[RED, WHITE]], 0),
    "palette-half.png": (palette(transparency=bytes([255, 51])), [[RED, (204, 204, 255)]], 0),
    "palette-transparent.gif": (palette(transparency=1), [[RED, WHITE]], 0),
    "rgba.png": (saving(array([[(*RED, 255), (*BLUE, 0)]], np.uint8)), [[RED, WHITE]], 0),
    "rgb-transparent.png": (saving(array([[RED, BLUE]], np.uint8), transparency=BLUE), [[RED, WHITE]], 0),
    "grey-alpha.png": (saving(array([[(0, 51), (0, 255)]], np.uint8)), [[(204,) * 3, (0,) * 3]], 0),
    "animated.gif": (animated(), filled(RED, 4, 3), 0),
    "animated.webp": (animated(lossless=True), filled(RED, 4, 3), 0),
    "animated.png": (animated(), filled(RED, 4, 3), 0),
    **{f"orientation-{n}.png": (oriented(n), UPRIGHT, 0) for n in STORED},
    "damaged-exif.png": (saving(Image.fromarray(UPRIGHT), exif=b"Exif\0\0MM\0"), UPRIGHT, 0),
    "one-pixel.png": (saving(Image.new("RGB", (1, 1), RED)), [[RED]], 0),
    "tall.png": (saving(Image.new("RGB", (1, 10000), BLUE)), filled(BLUE, 1, 10000), 0),
    "wide.png": (saving(Image.new("RGB", (10000, 1), BLUE)), filled(BLUE, 10000, 1), 0),
}

BAD = {
    "missing.png": (lambda path: None, "does not exist; check the name"),
    "dangling.png": (lambda path: path.symlink_to("nowhere.png"), "does not exist; check the name"),
    "circle.png": (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links; check"),
    "folder.png": (lambda path: path.mkdir(), "is a folder; name the images in it"),
    "pipe.png": (lambda path: os.mkfifo(path), "is a pipe or a device; save it to a file"),
    "empty.png": (writing(b""), "is empty (0 bytes); copy or download it again"),
    "text.png": (writing(b"no picture at all"), "cannot be decoded: it has no format that Pillow knows"),
    "cut.png": (cut("PNG"), "cannot be decoded: "),
    "cut.jpg": (cut("JPEG"), "cut short: copy or save it anew"),
    "bomb.png": (writing(png(30000, 30000, 8, 2, [])), "has too many pixels to be opened safely"),
    "nan.tif": (saving(array([[0, np.nan]], np.float32)), "holds 32-bit values from nan to nan; they must be"),
    "negative.tif": (saving(array([[-1, 5]], np.int32)), "holds 32-bit values from -1 to 5; they must be from 0"),
    "beyond.tif": (saving(array([[0, 65536]], np.float32)), "to 65536; they must be from 0 to 1, 255 or 65535: save"),
}
