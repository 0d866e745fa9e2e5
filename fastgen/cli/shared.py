"""What several commands need."""

from __future__ import annotations

import argparse
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
