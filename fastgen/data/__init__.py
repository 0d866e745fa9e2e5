"""Data sets as levels: `load` reads a data set by its spec and returns the `Dataset` of one split."""

from __future__ import annotations

from .dataset import Dataset, load

__all__ = ["Dataset", "load"]
