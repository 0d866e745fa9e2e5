"""The one configuration object of training."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

# What must stay as it was for a resumed run to be the same run; limits and intervals may change.
FIXED = ("batch_size", "learning_rate", "warmup", "weight_decay", "clip_norm", "ema_decay", "seed")


@dataclass(frozen=True)
class TrainConfig:
    """Options of `train`; one of the two limits is needed, and the first one that is reached counts.

    Attributes:
        max_steps: limit in steps.
        max_seconds: limit in seconds of training, validation included.
        batch_size: images per step; the remainder of an epoch is left out (another one in each epoch).
        learning_rate: of AdamW, before the schedule: a linear warm-up times a half cosine down to zero at the limit.
        warmup: fraction of the limit that the warm-up takes.
        weight_decay: decoupled weight decay, per step ``learning_rate * weight_decay``.
        clip_norm: gradients (of bits per dimension) are scaled down to this norm.
        ema_decay: of the moving average of the weights; smaller in the first steps, (1 + step) / (10 + step).
        validate_every: steps between validations, each with a line in the log.
        sample_every: steps between sample grids.
        checkpoint_every: steps between checkpoints.
        checkpoint_seconds: seconds after which a checkpoint is written even before that.
        seed: of the order of the data and of dropout.

    Raises:
        ValueError: no limit, or a value out of range.
    """

    max_steps: int | None = None
    max_seconds: float | None = None
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    validate_every: int = 250
    sample_every: int = 1000
    checkpoint_every: int = 1000
    checkpoint_seconds: float = 300.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_steps is None and self.max_seconds is None:
            raise ValueError("TrainConfig: expected max_steps, max_seconds or both, got neither")
        for name in ("max_steps", "batch_size", "validate_every", "sample_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed: expected an integer, got {self.seed!r}")
        for name in ("max_seconds", "learning_rate", "clip_norm", "checkpoint_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a number above 0, got {value!r}")
        for name, top in (("warmup", 1), ("ema_decay", 1), ("weight_decay", math.inf)):
            value = getattr(self, name)
            if not 0 <= value < top:
                raise ValueError(f"{name}: expected a number of at least 0 and below {top}, got {value!r}")

    def budget_used(self, step: float, seconds: float) -> float:
        """The fraction of the limits that is used up; the run ends at 1."""
        by_steps = 0.0 if self.max_steps is None else step / self.max_steps
        by_seconds = 0.0 if self.max_seconds is None else seconds / self.max_seconds
        return max(by_steps, by_seconds)

    def learning_rate_at(self, step: int, seconds: float) -> float:
        """The learning rate of a step, from the budget used in the middle of it."""
        used = min(1.0, self.budget_used(step + 0.5, seconds))
        warmth = min(1.0, used / self.warmup) if self.warmup else 1.0
        return self.learning_rate * warmth * 0.5 * (1.0 + math.cos(math.pi * used))

    def ema_decay_at(self, step: int) -> float:
        """The decay of the moving average in a step."""
        return min(self.ema_decay, (1 + step) / (10 + step))

    def as_dict(self) -> dict[str, Any]:
        """The options, JSON-able."""
        return asdict(self)
