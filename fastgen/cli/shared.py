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


def add_precision(parser: Any) -> None:
    choices = ("fp32", "bf16", "int8")  # fastgen.sampling.precision.PRECISIONS, without importing torch
    parser.add_argument("--precision", choices=choices, default="fp32", help="of the weights (default: fp32)")


def check_range(flag: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{flag} must be in {low}..{high}, got {value}")


def check_above_0(flag: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{flag}: expected a number above 0, got {value}")


def check_seed(seed: int) -> None:
    check_range("--seed", seed, 0, 2**64 - 1)


def check_folder(path: Path) -> None:
    """What can be known of a folder of `--out` before there is anything to write, whether it exists or not.

    Raises:
        ValueError: it cannot be made, or not be written to.
    """
    found = next((part for part in (path, *path.parents) if part.exists()), path)
    if not found.is_dir():
        raise ValueError(f"--out: {str(found)!r} is a file, not a folder")
    if not os.access(found, os.W_OK):
        raise ValueError(f"--out: the folder {str(found)!r} cannot be written to")


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


def draws_codes(model: Any) -> bool:
    """Whether what a model draws are codes, such as those of a vqvae, rather than levels of pixels."""
    return getattr(model, "embedding", None) is not None


def load_for(model: Any, spec: str, split: str, progress: bool) -> Dataset:
    """A data set in the size and levels of a model; for one that draws codes, maps of these from a NumPy file.

    Raises:
        ValueError: the images have another shape; or the model draws codes, and the data are images.
    """
    from fastgen import data

    if draws_codes(model):
        try:
            found = data.load_codes(spec, model.levels, split=split)
        except ValueError as error:
            raise ValueError(
                f"{error}: the model draws codes; of images, give the vqvae as well (--vqvae CKPT)"
            ) from None
    else:
        size = tuple(model.image_shape[1:])
        found = data.load(spec, split=split, size=size, levels=model.levels, progress=progress)
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
