"""What several commands need."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from fastgen.data import Dataset

DATA_HELP = (
    "digits (8x8 handwritten digits), patches (32x32 colour patches of two photographs), a folder of images, "
    "a .npy or .npz file, an IDX file or folder (MNIST), a CIFAR .bin file or folder"
)


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, metavar="SPEC", help=DATA_HELP)


def add_vqvae(parser: Any, text: str) -> None:
    parser.add_argument("--vqvae", metavar="CKPT", help=text)


def check_range(flag: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{flag} must be in {low}..{high}, got {value}")


def check_seed(seed: int) -> None:
    check_range("--seed", seed, 0, 2**64 - 1)


def check_output(path: Path, suffixes: Sequence[str]) -> None:
    """What can be known before anything is drawn of whether it can be written.

    Raises:
        ValueError: it cannot.
    """
    if path.suffix not in suffixes:
        raise ValueError(f"-o: the file's name must end in {', '.join(suffixes)}, got {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"-o: {str(path)!r} is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"-o: there is no folder {str(path.parent)!r}")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"-o: the folder {str(path.parent)!r} cannot be written to")


def load_for(model: Any, spec: str, split: str) -> Dataset:
    """A data set in the size and levels of a model.

    Raises:
        ValueError: the images have another shape.
    """
    from fastgen import data

    found = data.load(spec, split=split, size=tuple(model.image_shape[1:]), levels=model.levels, progress=True)
    if found.image_shape != tuple(model.image_shape):
        raise ValueError(f"the images of {spec} are {found.image_shape}, the model's are {tuple(model.image_shape)}")
    return found


def labels_for(model: Any, data: Dataset) -> Tensor | None:
    """The labels that a model takes with a data set.

    Raises:
        ValueError: a conditional model, and data without labels or with more classes.
    """
    if model.num_classes is None:
        return None
    if data.labels is None or (data.num_classes or 0) > model.num_classes:
        raise ValueError(f"the model has {model.num_classes} classes, {data.name} has {data.num_classes or 'none'}")
    return data.labels
