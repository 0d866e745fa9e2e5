"""Executors: run a plan for a batch of images. All take a `Batch` and give the same levels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from fastgen.sampling.guidance import Guidance
from fastgen.sampling.truncation import EVERY_LEVEL, Truncation


@dataclass(frozen=True)
class Batch:
    """What one batch of samples is made of.

    count: number of samples, > 0.
    seed, start: sample i of the batch is sample start + i of the sequence of `seed`.
    temperature: divides the logits.
    truncation: which levels may be drawn.
    guidance: None, or how far to lead logits away from others (`fastgen.sampling.guidance`); then each sample is two
        rows of the planes, one behind the other, of which the second has the others, and both the same levels.
    conditions: one float32 tensor [rows, channels, height, width] for each plane of `plan.conditions`.
    known, mask: levels [count, C, H, W] and bool [count, H, W]; where the mask is True the pixel is given.
    on_rows: called with the number of image rows finished since the last call.
    """

    count: int
    seed: int
    start: int
    temperature: float = 1.0
    truncation: Truncation = EVERY_LEVEL
    guidance: Guidance | None = None
    conditions: list[Tensor] = field(default_factory=list)
    known: Tensor | None = None
    mask: Tensor | None = None
    on_rows: Callable[[int], object] = lambda rows: None

    @property
    def streams(self) -> int:
        """Rows of each sample."""
        return 1 if self.guidance is None else 2

    @property
    def rows(self) -> int:
        return self.count * self.streams
