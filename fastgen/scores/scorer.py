"""Scores of a model during its training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastgen import checkpoint
from fastgen.scores.estimates import frechet_distance, inception_score, torchmetrics_image
from fastgen.scores.extractors import Extractor, extract


def scorer(
    extractor: Extractor, images: Tensor, levels: int, *, n: int = 1000, seed: int = 0
) -> Callable[[Any], dict[str, float]]:
    """What `training.train_gan` takes as ``score``: model -> scores of always the same samples, with standard errors.

    Args:
        extractor: as for `extract`.
        images: uint8 levels [N, C, H, W], what the samples are compared with.
        levels: of the images.
        n: number of samples.
        seed: of the samples.

    Returns:
        A function that gives ``frechet_distance``, ``frechet_distance_error``, ``inception_score`` and
        ``inception_score_error``.

    Raises:
        RuntimeError: torchmetrics is missing.
    """
    torchmetrics_image()
    real = extract(extractor, images, levels).features

    def score(model: Any) -> dict[str, float]:
        found = extract(extractor, checkpoint.sample(model, n, seed=seed), model.levels)
        estimates = {
            "frechet_distance": frechet_distance(real, found.features),
            "inception_score": inception_score(found.logits),
        }
        values = {name: estimate.value for name, estimate in estimates.items()}
        return values | {f"{name}_error": estimate.error for name, estimate in estimates.items()}

    return score
