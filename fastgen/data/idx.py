"""IDX files, the format of MNIST (Y. LeCun, "The MNIST database of handwritten digits"), plain or gzipped.

Big-endian: two zero bytes, the element type (8 = unsigned byte), the number of axes, the sizes as 32-bit integers, the
elements.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from .source import Source

IMAGES_MAGIC = 0x00000803
LABELS_MAGIC = 0x00000801
MAGIC_OF = {1: LABELS_MAGIC, 3: IMAGES_MAGIC}


def is_idx_name(name: str) -> bool:
    return name.endswith((".gz", "ubyte", ".idx", ".idx3")) or "idx" in name


def training_images(folder: Path) -> Path | None:
    """MNIST's training images in a folder, or None: the test images are reached by their own name."""
    endings = ("idx3-ubyte", "idx3-ubyte.gz")
    return next((path for path in sorted(folder.glob("*train-images*")) if path.name.endswith(endings)), None)


def read(path: Path) -> Source:
    """Read an image file, and the labels if ``images -> labels, idx3 -> idx1`` turns its name into that of a file."""
    images = torch.from_numpy(_array(path, 3)[:, None])
    labels = None
    if (beside := _label_file(path)) is not None:
        labels = torch.from_numpy(_array(beside, 1)).long()
        if len(labels) != len(images):
            raise ValueError(f"{beside}: has {len(labels)} labels for the {len(images)} images of {path.name}")
    return Source(images, labels, None if labels is None else int(labels.max()) + 1)


def _label_file(path: Path) -> Path | None:
    stem = path.name.removesuffix(".gz")
    name = stem.replace("images", "labels").replace("idx3", "idx1")
    if name == stem:
        return None
    return next((p for p in (path.with_name(name), path.with_name(name + ".gz")) if p.exists()), None)


def _array(path: Path, axes: int) -> np.ndarray:
    """uint8 array with ``axes`` axes; ValueError naming the file if magic or size is wrong."""
    data = _bytes(path)
    header = 4 + 4 * axes
    if len(data) < header:
        raise ValueError(f"{path}: truncated IDX file: {len(data)} bytes, the header alone has {header}")
    magic, *shape = struct.unpack(f">{1 + axes}I", data[:header])
    if magic != MAGIC_OF[axes]:
        hint = "; this is a label file, give the image file" if magic == LABELS_MAGIC else ""
        raise ValueError(f"{path}: IDX magic number must be 0x{MAGIC_OF[axes]:08x}, got 0x{magic:08x}{hint}")
    count = 1
    for length in shape:
        count *= length
    if count == 0:
        raise ValueError(f"{path}: holds no images (shape {shape})")
    if len(data) - header != count:
        problem = "truncated" if len(data) - header < count else "too long"
        raise ValueError(f"{path}: {problem} IDX file: shape {shape} needs {count} bytes, got {len(data) - header}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()


def _bytes(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a readable gzip file ({error})") from error
