"""Losses: the operations of `fastgen.ops` that models are trained with."""

from __future__ import annotations

from fastgen.ops.logistic_mixture_nll import logistic_mixture_nll

__all__ = ["logistic_mixture_nll"]
