"""Image files below a folder. Knows the standard library alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# What counts as an image inside a folder. Formats that Pillow may lack (HEIC, AVIF) are listed too: an error that
# names the file is better than a photograph that is passed over.
IMAGE_SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png",
     ".ppm", ".tif", ".tiff", ".webp"}
)  # fmt: skip


def list_images(folder: str | Path) -> list[Path]:
    """The images anywhere below ``folder``, each folder's files before its sub-folders', both sorted by name.

    An image is a file with one of ``IMAGE_SUFFIXES``, in any case; hidden files and folders (``.name``) are passed
    over. Links are followed, except those to a folder that they lie in. A folder that may not be listed takes the place
    of its images, so that whoever reads the paths meets the error.

    Raises:
        FileNotFoundError, NotADirectoryError: ``folder`` does not exist or is no folder.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"folder {folder} does not exist")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")
    return list(_below(folder, ()))


def _below(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    """``above``: the real paths of the folders that ``folder`` was reached through."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        yield folder
        return
    paths = [folder / name for name in names]
    is_folder = [os.path.isdir(path) for path in paths]  # False where that cannot be found out
    # A link that leads nowhere is no folder and stays, to be met as a missing file.
    yield from (p for p, inner in zip(paths, is_folder, strict=True) if not inner and is_image_name(p))
    for path, inner in zip(paths, is_folder, strict=True):
        if inner:
            yield from _below(path, (*above, real))


def is_image_name(path: Path) -> bool:
    """Whether the name ends as an image's does."""
    return path.suffix.lower() in IMAGE_SUFFIXES
