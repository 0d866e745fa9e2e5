"""What the readers of the data formats return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Source:
    """What a reader returns: the whole data set, before splitting.

    Attributes:
        images, labels, num_classes: as in `Dataset`, of all the images.
        levels: number of levels, or None where the file does not say (then 256, see `dataset._requantise`).
        validation: bool [N] where the source brings its own split, else None.
    """

    images: Tensor
    labels: Tensor | None = None
    num_classes: int | None = None
    levels: int | None = 256
    validation: Tensor | None = None
