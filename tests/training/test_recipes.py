"""Recipes run and learn; what they reach in their full time is the demo's to show."""

from __future__ import annotations

import torch

from fastgen import data, models
from fastgen.metrics import bits_per_dim
from fastgen.training import TrainConfig, recipes


def test_demo_digits(tmp_path):
    threads = torch.get_num_threads()
    pictures = []
    result = recipes.demo_digits(
        seconds=1.5, out=tmp_path, progress=False, sample_grid=lambda model, path: pictures.append(path.name)
    )
    assert torch.get_num_threads() == threads
    assert pictures == [f"samples-{result.steps:06d}.png"]
    assert (result.model.image_shape, result.model.levels, result.model.num_classes) == ((1, 8, 8), 17, 10)
    held_out = data.load("digits", split="val")
    assert bits_per_dim(result.model, held_out.images, held_out.labels) < 4.0  # below log2(17), the uniform model
    assert result.bits_per_dim < 4.0


def test_options_of_models_are_those_of_training():
    assert set(recipes.OPTIONS) <= set(models.names())
    configs = {name: TrainConfig(max_steps=1, **options) for name, options in recipes.OPTIONS.items()}
    assert configs["pixelcnnpp"].ema_decay == configs["pixelsnail"].ema_decay == 0.9995
