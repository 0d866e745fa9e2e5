"""Operations: one module for each, with the plain PyTorch reference beside the public function."""

from __future__ import annotations

from fastgen.ops import philox

__all__ = ["philox"]
