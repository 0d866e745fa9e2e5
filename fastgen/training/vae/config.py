"""The configuration of a variational autoencoder's training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from fastgen.training.config import TrainConfig


@dataclass(frozen=True)
class VAEConfig(TrainConfig):
    """Options of `train_vae`: those of `TrainConfig`, and:

    Attributes:
        beta: weight of the divergence after its warm-up; 1 for the evidence lower bound.
        kl_warmup: fraction of the limit in which the weight grows from zero, linearly, so that latents learn to speak
            before silence pays (Bowman et al. 2016, 1511.06349, section 3.1; Sonderby et al. 2016, 1602.02282).
        num_samples: latents drawn for each image of a step.
        iwae_samples: latents of the importance-weighted bound in validations.
        iwae_images: validation images that it is evaluated on, at most.

    Raises:
        ValueError: no limit, or a value out of range.
    """

    beta: float = 1.0
    kl_warmup: float = 0.1
    num_samples: int = 1
    iwae_samples: int = 50
    iwae_images: int = 100

    FIXED: ClassVar[tuple[str, ...]] = (*TrainConfig.FIXED, "beta", "kl_warmup", "num_samples")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts("num_samples", "iwae_samples", "iwae_images")
        self._check_range("beta", math.inf)
        self._check_range("kl_warmup", 1)

    def beta_at(self, step: int, seconds: float) -> float:
        """The weight of the divergence in a step, from the budget used before it."""
        used = self.budget_used(step, seconds)
        return self.beta * (min(1.0, used / self.kl_warmup) if self.kl_warmup else 1.0)
