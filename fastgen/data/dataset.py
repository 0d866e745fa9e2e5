"""`load`: from a spec such as ``digits`` or ``photos/`` to the levels and labels of one split.

| spec | read by | levels | labels |
|---|---|---|---|
| ``digits`` | `builtin.digits` | 17 | the digit |
| ``patches`` | `builtin.patches` | 256 | none |
| folder of images | `folder.read` | 256 | sub-folders |
| ``x.npy``, ``x.npz`` | `arrays.read` | 256, or as stated | key ``labels`` |
| ``*-images-idx3-ubyte[.gz]``, or a folder with MNIST's files | `idx.read` | 256 | ``*-labels-idx1-ubyte[.gz]`` |
| ``*.bin``, or a folder of them | `cifar.read` | 256 | in the file |

**The split** depends only on the number of images: image i has the key (lane 0, lane 1) of Philox with seed
`SPLIT_SEED`, sample i; the tenth of the images with the smallest keys (at least one image) is the validation set, the
others are the training set, both in the order of the data set. ``patches`` brings its own split (disjoint regions).

**Requantisation** from L to K levels maps level v to floor(v * K / L): so every new level covers an equal share.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .._arguments import integer
from ..ops import philox
from . import arrays, builtin, cifar, folder, idx
from .resize import cover
from .source import Source

SPLITS = ("train", "val", "all")
SPLIT_SEED = 0x5EED
CODE_SUFFIXES = (".npy", ".npz")


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Images as levels, with labels where the source has them.

    Attributes:
        images: uint8 [N, C, H, W], values 0..levels-1; C is 1 or 3. Or codes of images (`fastgen.training.encoded`),
            int64 where there are more than 256 of them.
        labels: int64 [N], values 0..num_classes-1, or None.
        levels: number of levels, 2..256, or of codes.
        num_classes: number of classes, or None without labels.
        name: what was loaded, for messages.
    """

    images: Tensor
    labels: Tensor | None
    levels: int
    num_classes: int | None
    name: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.image_shape))
        return f"Dataset({self.name!r}, {len(self)} images {shape}, {self.levels} levels, {self.num_classes} classes)"


def load(
    spec: str | Path,
    *,
    split: str = "train",
    size: int | tuple[int, int] | None = None,
    levels: int | None = None,
    resize: bool = False,
    progress: bool = False,
) -> Dataset:
    """Load one split of a data set.

    Args:
        spec: ``digits``, ``patches``, or the path of a folder or file; the module's docstring has the formats.
            A folder or file with the name of a built-in set is reached by ``./digits``.
        split: "train" or "val" (fixed, nine to one, see the module's docstring), or "all".
        size: side in pixels, or (height, width). Image folders: every image is scaled so that it covers this size and
            its centre is cut out. ``patches``: side of the patches, default 32. Elsewhere it must be the size of the
            images, unless ``resize``.
        levels: requantise to this number of levels, 2..256; default: as stored.
        resize: images of another size than ``size`` are scaled to it like those of image folders; they then have
            256 levels.
        progress: show a progress bar while image folders are read.

    Returns:
        The `Dataset`, in memory, uint8.

    Raises:
        ValueError: unknown spec; unreadable, truncated or foreign file (named in the text); size or levels out of
            range.
        TypeError: an argument of the wrong type.
    """
    _check_split(split)
    size = _check_size(size)
    if levels is not None:
        levels = integer("levels", levels, 2, 256)
    source = _read(spec, size, progress)
    if size is not None and tuple(source.images.shape[2:]) != size and not resize:
        raise ValueError(
            f"size must be that of the images of {spec}, {_by(source.images.shape[2:])}, got {_by(size)}; "
            "only image folders are resized"
        )
    images, stored = source.images, source.levels
    if size is not None and tuple(images.shape[2:]) != size:
        images, stored = cover(images, stored or 256, size), 256
    source.images, levels = _requantise(images, stored, levels)
    return _part(source, levels, split, str(spec))


def load_codes(path: str | Path, num_codes: int, *, split: str = "train") -> Dataset:
    """Load one split of the codes that an autoencoder, of whatever kind, has for images.

    Args:
        path: a ``.npy`` file of integers [N, H, W], or an ``.npz`` file of them, named ``codes``, and ``labels`` if
            there are any.
        num_codes: the codes are 0..num_codes-1, at least 2.
        split: "train" or "val" (fixed, nine to one, see the module's docstring), or "all".

    Returns:
        The `Dataset`, whose images are the codes [N, 1, H, W], uint8 or, of more than 256 codes, int64.

    Raises:
        ValueError: unreadable file, or one that holds anything else (named in the text); bad arguments.
    """
    _check_split(split)
    num_codes = integer("num_codes", num_codes, 2, 2**31 - 1)
    path = Path(path)
    if not path.is_file() or path.suffix.lower() not in CODE_SUFFIXES:
        raise ValueError(f"{path}: expected a file of codes ({', '.join(CODE_SUFFIXES)})")
    return _part(arrays.read_codes(path, num_codes), num_codes, split, str(path))


def _part(source: Source, levels: int, split: str, name: str) -> Dataset:
    """One split of what was read."""
    images, labels = source.images, source.labels
    if split != "all":
        validation = source.validation if source.validation is not None else validation_mask(len(images), name)
        chosen = validation if split == "val" else ~validation
        images = images[chosen]
        labels = labels[chosen] if labels is not None else None
    return Dataset(images, labels, levels, source.num_classes, name)


def validation_mask(count: int, name: str = "the data set") -> Tensor:
    """The fixed split of ``count`` images (rule in the module's docstring): bool [count], True = validation image."""
    if count < 2:
        raise ValueError(f"{name} has {count} image; a train/validation split needs at least 2 (or split='all')")
    bits = philox.uint32(SPLIT_SEED, 0, 0, torch.arange(count))
    keys = (bits[:, 0] << 31) + (bits[:, 1] >> 1)  # 63 bits: int64 has no sign to spare
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.argsort(keys, stable=True)[: max(1, round(count / 10))]] = True
    return mask


def _read(spec: str | Path, size: tuple[int, int] | None, progress: bool) -> Source:
    if not isinstance(spec, (str, Path)):
        raise TypeError(f"spec must be a string or a path, got {type(spec).__name__}")
    if spec == "digits":
        return builtin.digits()
    if spec == "patches":
        return builtin.patches(size)
    path = Path(spec)
    if path.is_dir():
        if binaries := cifar.files(path):
            return cifar.read(binaries)
        if images := idx.training_images(path):
            return idx.read(images)
        return folder.read(path, size, progress)
    if not path.exists():
        raise ValueError(f"data {str(spec)!r} is neither 'digits', 'patches' nor an existing file or folder")
    if path.suffix.lower() in (".npy", ".npz"):
        return arrays.read(path)
    if path.suffix.lower() == ".bin":
        return cifar.read([path])
    if idx.is_idx_name(path.name):
        return idx.read(path)
    raise ValueError(
        f"{path}: unknown kind of data; expected a folder, .npy, .npz, an IDX file (*-ubyte[.gz]) or a CIFAR .bin file"
    )


def _requantise(images: Tensor, stored: int | None, wanted: int | None) -> tuple[Tensor, int]:
    """Levels 0..stored-1 -> 0..wanted-1.

    Arrays that do not state their number of levels count as 256 levels, except where ``wanted`` is given and no value
    reaches it: those have already been quantised.
    """
    if stored is None:
        stored = wanted if wanted is not None and int(images.max()) < wanted else 256
    if wanted is None or wanted == stored:
        return images, stored
    if wanted > stored:
        raise ValueError(f"levels must be at most the {stored} that are stored, got {wanted}")
    table = (torch.arange(stored) * wanted // stored).to(torch.uint8)
    return torch.cat([table[part.int()] for part in images.split(4096)]), wanted


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")


def _check_size(size: object) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"size must be an integer or (height, width), got {size!r}")
    height, width = (integer("size", side, 1, 4096) for side in pair)
    return height, width


def _by(size: Iterable[int]) -> str:
    return "x".join(map(str, size))
