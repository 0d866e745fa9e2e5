"""Where `make gpu` measures, and what it checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where to measure, and how much.

    compile: torch.compile takes part.
    """

    device: str = "cuda"
    tiny: bool = False
    compile: bool = False

    @property
    def modes(self) -> Sequence[str]:
        return ("compile",) if self.compile else ("eager", "graph")

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """By torch.compile, at the first call."""
        if self.device == "cuda":
            return torch.compile(function, mode="max-autotune", dynamic=False)
        return torch.compile(function, backend="eager", dynamic=False)


@dataclass(frozen=True)
class Check:
    """Something that is true or not; `run` returns what was found, JSON values."""

    name: str
    run: Callable[[], Row]


def reason(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}".strip()[:400]
