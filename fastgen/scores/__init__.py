"""Scores of generated images: Frechet distance and Inception score, with standard errors, on features of any network.

::

    from fastgen import data, scores

    extractor = scores.classifier("digits")                  # trained once in a few seconds, and then cached
    val, n = data.load("digits", split="val"), 1000
    real = scores.extract(extractor, val.images, val.levels)
    fake = scores.extract(extractor, model.sample(n), model.levels)
    scores.frechet_distance(real.features, fake.features)    # Estimate(value, standard error, bias)
    scores.inception_score(fake.logits)

The values are torchmetrics', ``pip install 'fastgen[scores]'``; the standard errors and biases are jackknife estimates.
Scores on features of different networks cannot be compared: published ones are on those of Inception v3
(`scores.inception`).
"""

from __future__ import annotations

from fastgen.scores.classify import classifier
from fastgen.scores.estimates import Estimate, frechet_distance, inception_score
from fastgen.scores.extractors import Features, extract, inception
from fastgen.scores.scorer import scorer

__all__ = [
    "Estimate",
    "Features",
    "classifier",
    "extract",
    "frechet_distance",
    "inception",
    "inception_score",
    "scorer",
]
