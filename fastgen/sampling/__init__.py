"""The incremental sampling engine: a causal network is traced, proved causal, scheduled and packed into a plan, and the
plan is run.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = [
    "AuditReport",
    "Bernoulli",
    "Categorical",
    "Head",
    "LogisticMixture",
    "NextToken",
    "NotCausal",
    "Sampler",
    "UnsupportedModel",
    "audit",
    "naive_sample",
]

if TYPE_CHECKING:
    from fastgen.sampling.auditing import AuditReport, audit
    from fastgen.sampling.graph import NotCausal, UnsupportedModel
    from fastgen.sampling.heads import Bernoulli, Categorical, Head, LogisticMixture
    from fastgen.sampling.naive import naive_sample
    from fastgen.sampling.next_token import NextToken
    from fastgen.sampling.sampler import Sampler

# Resolved on first use: models import `heads` from here, and the sampler is not needed to train.
_HOMES = {
    "AuditReport": "auditing",
    "Bernoulli": "heads",
    "Categorical": "heads",
    "Head": "heads",
    "LogisticMixture": "heads",
    "NextToken": "next_token",
    "NotCausal": "graph",
    "Sampler": "sampler",
    "UnsupportedModel": "graph",
    "audit": "auditing",
    "naive_sample": "naive",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastgen.sampling' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastgen.sampling.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
