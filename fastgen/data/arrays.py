"""NumPy files: ``.npy`` holds the images; ``.npz`` holds ``images`` and, if there are any, ``labels`` and ``levels``.

Images are integers 0..255 (or bool) of shape

- [N, H, W]: one channel,
- [N, C, H, W]: if the second axis is 1 or 3 and the last is not,
- [N, H, W, C]: if the last axis is 1 or 3 and the second is not.

Labels are integers >= 0 of shape [N]. ``levels`` is one number. Pickled objects are never loaded.

Files of codes (`read_codes`) hold integers of shape [N, H, W] or [N, 1, H, W] under the name ``codes``, or ``images``.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch

from .source import Source


def read(path: Path) -> Source:
    """Read a ``.npy`` or ``.npz`` file; ValueError naming the file if it is not as the module's docstring says."""
    arrays = _load(path)
    if "images" not in arrays:
        raise ValueError(f"{path}: expected an array named 'images', found {', '.join(arrays) or 'nothing'}")
    images = _channels_first(_levels(arrays["images"], path), path)
    labels, num_classes = None, None
    if "labels" in arrays:
        labels = _labels(arrays["labels"], len(images), path)
        num_classes = int(labels.max()) + 1
    levels = _stated_levels(arrays, images, path)
    return Source(torch.from_numpy(np.ascontiguousarray(images)), labels, num_classes, levels)


def read_codes(path: Path, num_codes: int) -> Source:
    """Read the codes of images, 0..num_codes-1; ValueError naming the file if it holds anything else."""
    arrays = _load(path)
    codes = arrays.get("codes", arrays.get("images"))
    if codes is None:
        raise ValueError(f"{path}: expected an array named 'codes', found {', '.join(arrays) or 'nothing'}")
    if codes.ndim == 4 and codes.shape[1] == 1:
        codes = codes[:, 0]
    if codes.dtype.kind not in "iu" or codes.ndim != 3 or not codes.size:
        raise ValueError(f"{path}: codes must be integers [N, H, W], got {codes.dtype} of shape {list(codes.shape)}")
    stated = arrays.get("levels", np.array(num_codes))
    if codes.min() < 0 or codes.max() >= num_codes or stated.size != 1 or stated.item() != num_codes:
        of_levels = f" of {stated.tolist()} levels" if "levels" in arrays else ""
        raise ValueError(f"{path}: expected codes in 0..{num_codes - 1}, got {codes.min()}..{codes.max()}{of_levels}")
    labels, num_classes = None, None
    if "labels" in arrays:
        labels = _labels(arrays["labels"], len(codes), path)
        num_classes = int(labels.max()) + 1
    dtype = np.uint8 if num_codes <= 256 else np.int64
    return Source(torch.from_numpy(codes[:, None].astype(dtype)), labels, num_classes, num_codes)


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"images": loaded}
        with loaded:
            return {key: loaded[key] for key in loaded.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable NumPy file ({error})") from error


def _levels(images: np.ndarray, path: Path) -> np.ndarray:
    if images.dtype.kind not in "biu":
        raise ValueError(f"{path}: images must be integers 0..255, got {images.dtype}")
    if images.size == 0:
        raise ValueError(f"{path}: holds no images (shape {list(images.shape)})")
    if images.dtype.kind != "b" and (images.min() < 0 or images.max() > 255):
        raise ValueError(f"{path}: images must lie in 0..255, got {images.min()}..{images.max()}")
    return images.astype(np.uint8, copy=False)


def _channels_first(images: np.ndarray, path: Path) -> np.ndarray:
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4:
        first, last = images.shape[1] in (1, 3), images.shape[3] in (1, 3)
        if first and not last:
            return images
        if last and not first:
            return images.transpose(0, 3, 1, 2)
        if first and last:
            raise ValueError(
                f"{path}: images of shape {list(images.shape)}: are the channels the second axis or the last?"
            )
    raise ValueError(
        f"{path}: images must be [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3, got shape {list(images.shape)}"
    )


def _labels(labels: np.ndarray, count: int, path: Path) -> torch.Tensor:
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise ValueError(f"{path}: labels must be {count} integers, got {labels.dtype} of shape {list(labels.shape)}")
    if labels.min() < 0:
        raise ValueError(f"{path}: labels must not be negative, got {labels.min()}")
    return torch.from_numpy(labels.astype(np.int64))


def _stated_levels(arrays: dict[str, np.ndarray], images: np.ndarray, path: Path) -> int | None:
    if arrays["images"].dtype.kind == "b":
        return 2
    if "levels" not in arrays:
        return None
    stated = arrays["levels"]
    if stated.size != 1 or stated.dtype.kind not in "iu" or not 2 <= int(stated.item()) <= 256:
        raise ValueError(f"{path}: levels must be one integer in 2..256, got {stated.tolist()}")
    if images.max() >= stated.item():
        raise ValueError(f"{path}: states {stated.item()} levels, but holds level {images.max()}")
    return int(stated.item())
