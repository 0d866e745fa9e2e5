"""A folder of images in any format that Pillow reads.

Images lie either directly in the folder (no labels), or in sub-folders: each sub-folder that holds images, at any
depth, is a class, numbered in the order of the names. Files of other kinds and hidden files are skipped. Images are in
the order of their paths. If all are greyscale there is one channel, else three. Transparent pixels are laid over white,
camera orientation is applied, of an animation the first frame is taken, 16-bit images keep their upper 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from .source import Source

if TYPE_CHECKING:
    from PIL import Image

Result = TypeVar("Result")

GREYSCALE_MODES = ("1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N", "I")
TRANSPARENT_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
NEEDS_OTHER_PROGRAMS = ("EPS", "WMF")  # Pillow would start Ghostscript or the like on a file that came from anywhere


def read(path: Path, size: tuple[int, int] | None, progress: bool = False) -> Source:
    """Read all the images of a folder.

    Args:
        size: (height, width): the images are scaled to cover it and cut about the centre; None: they must be equal.

    Raises:
        ValueError: no images, an unreadable image (named), different sizes where ``size`` is None.
    """
    from tqdm import tqdm

    paths, labels, classes = _find(path)
    channels = 1 if all(_mode(p) in GREYSCALE_MODES for p in paths) else 3
    images = None
    for i, file in enumerate(tqdm(paths, desc=f"reading {path}", unit="image", disable=not progress, leave=False)):
        pixels = _pixels(file, channels, size)  # [H, W, C]
        if images is None:
            images = np.empty((len(paths), channels, *pixels.shape[:2]), np.uint8)
        if pixels.shape[:2] != images.shape[2:]:
            first, this = ("x".join(map(str, shape)) for shape in (images.shape[2:], pixels.shape[:2]))
            raise ValueError(f"{file}: is {this} but {paths[0].name} is {first} (height x width); give a size")
        images[i] = pixels.transpose(2, 0, 1)
    return Source(torch.from_numpy(images), labels, classes)


def _find(path: Path) -> tuple[list[Path], torch.Tensor | None, int | None]:
    """Image paths, labels and number of classes of a folder."""
    from PIL import Image

    formats = Image.registered_extensions()  # also loads the plugins that fill Image.OPEN
    suffixes = {s for s, name in formats.items() if name in Image.OPEN and name not in NEEDS_OTHER_PROGRAMS}

    def images(found: Iterable[Path]) -> list[Path]:
        visible = (p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts))
        return sorted(p for p in visible if p.suffix.lower() in suffixes and p.is_file())

    flat = images(path.iterdir())
    by_class = [files for sub in sorted(path.iterdir()) if sub.is_dir() and (files := images(sub.rglob("*")))]
    if flat and by_class:
        class_name = by_class[0][0].relative_to(path).parts[0]
        raise ValueError(
            f"{path}: holds images both directly ({flat[0].name}, ...) and in sub-folders ({class_name}, ...)"
        )
    if flat:
        return flat, None, None
    if not by_class:
        raise ValueError(f"{path}: holds no images that Pillow can read")
    labels = torch.cat([torch.full((len(files),), k) for k, files in enumerate(by_class)])
    return [p for files in by_class for p in files], labels, len(by_class)


def _open(path: Path, use: Callable[[Image.Image], Result]) -> Result:
    """``use(image)`` of an opened image; whatever Pillow raises becomes a ValueError naming the file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return use(image)
    except Exception as error:  # the plugins raise anything from OSError to SyntaxError and struct.error
        raise ValueError(f"{path}: not a readable image ({type(error).__name__}: {error})") from error


def _mode(path: Path) -> str:
    return _open(path, lambda image: image.mode)


def _pixels(path: Path, channels: int, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 [H, W, C] of one file."""
    from PIL import Image, ImageOps

    def decode(image: Image.Image) -> np.ndarray:
        image = _flatten(ImageOps.exif_transpose(image)).convert("L" if channels == 1 else "RGB")
        if size is not None and image.size != size[::-1]:
            image = ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS)
        return np.asarray(image).reshape(image.height, image.width, channels)

    return _open(path, decode)


def _flatten(image: Image.Image) -> Image.Image:
    """An image without transparency and with 8 bits per channel."""
    from PIL import Image

    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode in TRANSPARENT_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image
