"""`accelerate`: any module, with convolution, norm and activation fused, and a report of what was done and what not."""

from __future__ import annotations

from fastgen.acceleration.report import Entry, Report
from fastgen.acceleration.rewrite import accelerate

__all__ = ["Entry", "Report", "accelerate"]
