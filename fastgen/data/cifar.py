"""CIFAR-10 and CIFAR-100, binary version (Krizhevsky 2009, "Learning multiple layers of features from tiny images").

A record is one label byte (CIFAR-10: 0..9) or two (CIFAR-100: coarse 0..19, fine 0..99) and 3*32*32 bytes: the red,
green and blue planes, row by row. The size of the file tells which. CIFAR-100 gives the fine labels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .source import Source

PIXELS = 3 * 32 * 32


def files(folder: Path) -> list[Path]:
    """The ``.bin`` files of a folder; test files (``test*.bin``) are left out where there are others."""
    found = sorted(path for path in folder.glob("*.bin") if path.is_file())
    return [path for path in found if not path.name.startswith("test")] or found


def read(paths: list[Path]) -> Source:
    """Read files of one kind, in the given order; ValueError naming the file if its size or a label is wrong."""
    parts = [_records(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if part.shape[1] != parts[0].shape[1]:
            raise ValueError(f"{path}: CIFAR-10 and CIFAR-100 cannot be mixed ({paths[0].name} is of the other kind)")
    records = np.concatenate(parts)
    label_bytes = records.shape[1] - PIXELS
    images = torch.from_numpy(np.ascontiguousarray(records[:, label_bytes:])).view(-1, 3, 32, 32)
    labels = torch.from_numpy(records[:, label_bytes - 1].astype(np.int64))
    return Source(images, labels, num_classes=_classes(label_bytes))


def _records(path: Path) -> np.ndarray:
    """uint8 [N, label bytes + 3072]."""
    data = np.fromfile(path, np.uint8)
    if data.size == 0:
        raise ValueError(f"{path}: holds no images (0 bytes)")
    fitting = [data.reshape(-1, n + PIXELS) for n in (1, 2) if data.size % (n + PIXELS) == 0]
    if not fitting:
        raise ValueError(
            f"{path}: truncated or not a CIFAR file: {data.size} bytes is a multiple neither of "
            f"{1 + PIXELS} (CIFAR-10) nor of {2 + PIXELS} (CIFAR-100)"
        )
    for records in fitting:
        label_bytes = records.shape[1] - PIXELS
        if records[:, label_bytes - 1].max() < _classes(label_bytes):
            return records
    label = records[:, label_bytes - 1].max()
    raise ValueError(f"{path}: not a CIFAR file: label {label} is not below {_classes(label_bytes)}")


def _classes(label_bytes: int) -> int:
    return 10 if label_bytes == 1 else 100
