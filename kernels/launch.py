"""How kernels are launched: on the device of their tensors, on its current stream, with tiles that were timed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton itself reads it, when a kernel is defined
_NOTHING = nullcontext()


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one; Triton launches on that device's current stream."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(tensor.device)


def tuned(
    configs: Sequence[triton.Config],
    key: Sequence[str],
    prune: Callable[..., list[triton.Config]],
    zero: Sequence[str] = (),
) -> Callable[[Any], Any]:
    """`triton.autotune` of few configurations, at the first call for a key: make it before a CUDA graph is captured.

    A kernel's configurations must sum in the same order, so that the choice changes no bit of a result.  `zero` names
    results, which may be None, that not every configuration writes in full.  The interpreter times nothing; there tiles
    are small, so that small tensors have several.
    """
    if INTERPRETED:
        return triton.autotune([triton.Config(dict.fromkeys(configs[0].kwargs, 16))], list(key))

    def clear(args: dict[str, Any], reset_only: bool = False) -> None:
        for name in zero:
            if args[name] is not None:
                args[name].zero_()

    return triton.autotune(list(configs), list(key), prune_configs_by={"early_config_prune": prune}, pre_hook=clear)
