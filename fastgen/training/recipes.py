"""Ready recipes: model, data and options that are known to work together."""

from __future__ import annotations

import os
from typing import Any

import torch

from fastgen import data, models
from fastgen.training.config import TrainConfig
from fastgen.training.run import SampleGrid
from fastgen.training.trainer import TrainResult, train

# What a model is trained with where `TrainConfig` has other defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "pixelcnnpp": {"batch_size": 16, "ema_decay": 0.9995},  # Salimans et al. 2017, appendix and published code
    "pixelsnail": {"batch_size": 8, "ema_decay": 0.9995},  # published code, for CIFAR-10 on each GPU
    "vqvae": {"batch_size": 128, "learning_rate": 2e-4},  # van den Oord et al. 2017, section 4
}


def demo_digits(
    *,
    seconds: float = 60.0,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    sample_grid: SampleGrid | None = None,
) -> TrainResult:
    """Trains a small class-conditional GatedPixelCNN on the 8x8 digits, for some seconds on one core.

    One thread, because the barriers of more wait for each other where other processes use the cores as well: with three
    times as many running threads as cores, a minute held 42 steps with two threads and 1,081 with one.  About 1,000
    steps reach 1.65 held-out bits/dim, 300 reach 1.78.  The other arguments are those of `train`.
    """
    config = TrainConfig(
        max_seconds=seconds,
        batch_size=32,
        learning_rate=1e-2,
        weight_decay=0.5,  # without it the model overfits within a minute
        ema_decay=0.99,
        validate_every=50,
        seed=seed,
    )
    train_data, val_data = data.load("digits", split="train"), data.load("digits", split="val")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.GatedPixelCNN(
            image_shape=(1, 8, 8), levels=17, num_classes=10, num_filters=32, num_blocks=6, kernel_size=3
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train(model, train_data, val_data, config, out=out, progress=progress, sample_grid=sample_grid)
    finally:
        torch.set_num_threads(threads)
