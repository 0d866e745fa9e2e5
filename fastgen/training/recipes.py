"""Ready recipes: model, data and options that are known to work together."""

from __future__ import annotations

import os

import torch

from fastgen import data, models
from fastgen.training.config import TrainConfig
from fastgen.training.trainer import SampleGrid, TrainResult, train


def demo_digits(
    *,
    seconds: float = 60.0,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    sample_grid: SampleGrid | None = None,
) -> TrainResult:
    """Trains a small class-conditional GatedPixelCNN on the 8x8 digits, for some seconds on a CPU.

    Two cores reach about 1.7 held-out bits/dim in a minute; more than a few minutes gain nothing (it overfits, and the
    best weights are kept).  The other arguments are those of `train`.
    """
    config = TrainConfig(
        max_seconds=seconds, batch_size=32, learning_rate=4e-3, ema_decay=0.99, validate_every=50, seed=seed
    )
    train_data, val_data = data.load("digits", split="train"), data.load("digits", split="val")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = models.GatedPixelCNN(
            image_shape=(1, 8, 8), levels=17, num_classes=10, num_filters=32, num_blocks=6, kernel_size=3
        )
    return train(model, train_data, val_data, config, out=out, progress=progress, sample_grid=sample_grid)
