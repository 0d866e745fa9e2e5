"""How kernels are launched: on the device of their tensors, on its current stream, with tiles that were timed."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

Configs = Callable[..., Sequence[triton.Config]]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton itself reads it, when a kernel is defined


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one; Triton launches on that device's current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


class Tuned:
    """A kernel whose tile is timed at the first call of a kind: make it before a CUDA graph is captured.

    A capture that nothing was timed for takes the first configuration.  `triton.autotune` looks at every argument at
    every call; this one asks `kind` and launches.
    """

    def __init__(self, kernel: Any, configs: Configs, kind: Callable[..., Any], zero: Sequence[str]):
        self.fn, self.configs, self.kind, self.zero = kernel, configs, kind, zero
        self.chosen: dict[Any, dict[str, Any]] = {}

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return functools.partial(self.run, grid)

    def run(self, grid: Any, *args: Any, **kwargs: Any) -> None:
        kind = self.kind(*args)
        options = self.chosen.get(kind)
        if options is None:
            options = self.chosen[kind] = self.choose(grid, args, kwargs)
        self.fn[grid](*args, **kwargs, **options)

    def choose(self, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Options of the fastest configuration."""
        configs = list(self.configs(*args, **kwargs))
        if INTERPRETED:  # tiles are small, so that small tensors have several
            return dict.fromkeys(configs[0].kwargs, 16)
        if len(configs) == 1 or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return configs[0].all_kwargs()
        tuner = triton.autotune(configs, [], pre_hook=self._clear)(self.fn)
        tuner[grid](*args, **kwargs)
        return tuner.best_config.all_kwargs()

    def _clear(self, args: dict[str, Any], reset_only: bool = False) -> None:
        for name in self.zero:
            if args[name] is not None:
                args[name].zero_()


def tuned(configs: Configs, kind: Callable[..., Any], zero: Sequence[str] = ()) -> Callable[[Any], Tuned]:
    """Makes a kernel a `Tuned` one.

    `configs` gets the arguments of the kernel, `kind` the positional ones.  A kernel's configurations must sum in the
    same order, so that the choice changes no bit of a result.  `zero` names results, which may be None, that not every
    configuration writes in full.
    """
    return lambda kernel: Tuned(kernel, configs, kind, zero)
