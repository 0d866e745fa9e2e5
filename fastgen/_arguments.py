"""Arguments that models and samplers share, checked once."""

from __future__ import annotations

import torch
from torch import Tensor


def signed(seed: int) -> int:
    """The int64 with the bits of a seed in 0..2^64-1, as operators and kernels take it."""
    return seed - 2**64 if seed >= 2**63 else seed


def check_labels(labels: Tensor | int | None, n: int, num_classes: int | None) -> Tensor | None:
    """The labels of n samples, one for all or one for each, as int64 [n] on the CPU; None for a model without classes.

    Raises:
        ValueError, TypeError: what was expected and what came.
    """
    if num_classes is None:
        if labels is not None:
            raise ValueError("labels were given, but the model has no classes")
        return None
    if labels is None:
        raise ValueError(f"the model is conditional: labels [n] in 0..{num_classes - 1} are needed")
    try:
        labels = torch.as_tensor(labels, device=labels.device if isinstance(labels, Tensor) else "cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"labels must be an integer or a tensor of {n} integers, got {labels!r:.80}") from None
    if labels.dtype.is_floating_point or labels.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    labels = labels.to("cpu", torch.int64)
    if labels.dim() == 0:
        labels = labels.expand(n)
    if tuple(labels.shape) != (n,):
        raise ValueError(f"labels must have shape ({n},), got {tuple(labels.shape)}")
    if n and not (0 <= int(labels.min()) and int(labels.max()) < num_classes):
        raise ValueError(f"labels must be in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}")
    return labels
