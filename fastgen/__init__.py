"""Kernel-optimised generation for PyTorch.

Everything here is imported on first use, so that `import fastgen` costs little more than `import torch`::

    sampler = fastgen.Sampler(model)
    images = sampler.sample(64, seed=0)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgen import data, latent, losses, metrics, models, nn, ops, sampling, scores, training
    from fastgen._memory import empty_cache
    from fastgen.acceleration import accelerate
    from fastgen.backends import backend
    from fastgen.checkpoint import load, sample, save
    from fastgen.metrics import bits_per_dim
    from fastgen.sampling import Sampler, audit

__version__ = "0.1.0"

__all__ = [
    "Sampler",
    "accelerate",
    "audit",
    "backend",
    "bits_per_dim",
    "data",
    "empty_cache",
    "latent",
    "load",
    "losses",
    "metrics",
    "models",
    "nn",
    "ops",
    "sample",
    "sampling",
    "save",
    "scores",
    "training",
]
_HOMES = {
    "Sampler": "sampling",
    "accelerate": "acceleration",
    "audit": "sampling",
    "backend": "backends",
    "bits_per_dim": "metrics",
    "empty_cache": "_memory",
    "load": "checkpoint",
    "sample": "checkpoint",
    "save": "checkpoint",
}  # what is not a module itself


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fastgen' has no attribute {name!r}")
    module = importlib.import_module(f"fastgen.{_HOMES.get(name, name)}")
    value = getattr(module, name) if name in _HOMES else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
