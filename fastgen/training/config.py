"""The configuration objects of training: what every run has, and what a likelihood model's has."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from fastgen._arguments import positive


@dataclass(frozen=True)
class RunConfig:
    """Options of every training run; one of the two limits is needed, and the first one that is reached counts.

    Attributes:
        max_steps: limit in steps.
        max_seconds: limit in seconds of training, whatever is done between steps included.
        batch_size: images per step; the remainder of an epoch is left out (another one in each epoch).
        learning_rate: of the optimiser.
        ema_decay: of the moving average of the weights; smaller in the first steps, (1 + step) / (10 + step).
        sample_every: steps between sample grids.
        checkpoint_every: steps between checkpoints.
        checkpoint_seconds: seconds after which a checkpoint is written even before that.
        seed: of the order of the data and of the random numbers of the steps.

    Raises:
        ValueError: no limit, or a value out of range.
    """

    max_steps: int | None = None
    max_seconds: float | None = None
    batch_size: int = 64
    learning_rate: float = 1e-3
    ema_decay: float = 0.999
    sample_every: int = 1000
    checkpoint_every: int = 1000
    checkpoint_seconds: float = 300.0
    seed: int = 0

    # What must stay as it was for a resumed run to be the same run; limits and intervals may change.
    FIXED: ClassVar[tuple[str, ...]] = ("batch_size", "learning_rate", "ema_decay", "seed")

    def __post_init__(self) -> None:
        if self.max_steps is None and self.max_seconds is None:
            raise ValueError(f"{type(self).__name__}: expected max_steps, max_seconds or both, got neither")
        if self.max_steps is not None:
            self._check_counts("max_steps")
        self._check_counts("batch_size", "sample_every", "checkpoint_every")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed: expected an integer, got {self.seed!r}")
        for name in ("max_seconds", "learning_rate", "checkpoint_seconds"):
            self._check_above_0(name)
        self._check_range("ema_decay", 1)

    def _check_counts(self, *names: str) -> None:
        for name in names:
            positive(name, getattr(self, name))

    def _check_above_0(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected a number above 0, got {value!r}")

    def _check_range(self, name: str, top: float) -> None:
        value = getattr(self, name)
        if not 0 <= value < top:
            raise ValueError(f"{name}: expected a number of at least 0 and below {top}, got {value!r}")

    def budget_used(self, step: float, seconds: float) -> float:
        """The fraction of the limits that is used up; the run ends at 1."""
        by_steps = 0.0 if self.max_steps is None else step / self.max_steps
        by_seconds = 0.0 if self.max_seconds is None else seconds / self.max_seconds
        return max(by_steps, by_seconds)

    def ema_decay_at(self, step: int) -> float:
        """The decay of the moving average in a step."""
        return min(self.ema_decay, (1 + step) / (10 + step))

    def as_dict(self) -> dict[str, Any]:
        """The options, JSON-able."""
        return asdict(self)


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Options of `train`; those of `RunConfig`, and:

    Attributes:
        learning_rate: of AdamW, before the schedule: a linear warm-up times a half cosine down to zero at the limit.
        warmup: fraction of the limit that the warm-up takes.
        weight_decay: decoupled weight decay, per step ``learning_rate * weight_decay``.
        clip_norm: gradients (of bits per dimension) are scaled down to this norm.
        label_dropout: the share of labels that are replaced by the last class, which then stands for none, so that the
            model can be drawn from with classifier-free guidance: Ho and Salimans 2022, algorithm 1, p_uncond.
        validate_every: steps between validations, each with a line in the log.

    Raises:
        ValueError: no limit, or a value out of range.
    """

    warmup: float = 0.03
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    label_dropout: float = 0.0
    validate_every: int = 250

    FIXED: ClassVar[tuple[str, ...]] = (*RunConfig.FIXED, "warmup", "weight_decay", "clip_norm", "label_dropout")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts("validate_every")
        self._check_above_0("clip_norm")
        self._check_range("warmup", 1)
        self._check_range("label_dropout", 1)
        self._check_range("weight_decay", math.inf)

    def learning_rate_at(self, step: int, seconds: float) -> float:
        """The learning rate of a step, from the budget used in the middle of it."""
        used = min(1.0, self.budget_used(step + 0.5, seconds))
        warmth = min(1.0, used / self.warmup) if self.warmup else 1.0
        return self.learning_rate * warmth * 0.5 * (1.0 + math.cos(math.pi * used))
