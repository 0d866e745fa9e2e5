"""Kernel-optimised generation for PyTorch.

Everything here is imported on first use, so that `import fastgen` costs little more than `import torch`::

    sampler = fastgen.Sampler(model)
    images = sampler.sample(64, seed=0)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgen import data, losses, metrics, models, nn, ops, sampling, training
    from fastgen.backends import backend
    from fastgen.checkpoint import load, sample, save
    from fastgen.metrics import bits_per_dim
    from fastgen.sampling import Sampler, audit

__version__ = "0.1.0"

_MODULES = ("data", "losses", "metrics", "models", "nn", "ops", "sampling", "training")
_HOMES = {
    "Sampler": "fastgen.sampling",
    "audit": "fastgen.sampling",
    "backend": "fastgen.backends",
    "bits_per_dim": "fastgen.metrics",
    "load": "fastgen.checkpoint",
    "sample": "fastgen.checkpoint",
    "save": "fastgen.checkpoint",
}
__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fastgen.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fastgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
