"""Data sets as levels: `load` reads a data set by its spec and returns the `Dataset` of one split; `load_codes` reads
codes of images.
"""

from __future__ import annotations

from .dataset import Dataset, load, load_codes

__all__ = ["Dataset", "load", "load_codes"]
