"""What a step of training reads: batches in an order, and seeds, that are functions of (seed, number of the step)."""

from __future__ import annotations

import functools
import zlib
from typing import Protocol

import torch
from torch import Tensor


class Data(Protocol):
    """Images [N, C, H, W], uint8 or codes, and labels int64 [N] or None, as in `fastgen.data.Dataset`."""

    @property
    def images(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor | None: ...


def batch(model: torch.nn.Module, data: Data, number: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """Images and labels of a batch, on the model's device."""
    device = next(model.parameters()).device
    indices = batch_indices(number, len(data.images), batch_size, seed)
    labels = labels_for(model, data)
    return data.images[indices].to(device), None if labels is None else labels[indices].to(device)


def batch_indices(number: int, count: int, batch_size: int, seed: int) -> Tensor:
    """The images of a batch: int64 [min(batch_size, count)]; within an epoch no image comes twice."""
    per_epoch = max(1, count // batch_size)
    epoch, index = divmod(number, per_epoch)
    return _epoch_order(count, epoch, seed)[index * batch_size : (index + 1) * batch_size]


@functools.lru_cache(maxsize=1)
def _epoch_order(count: int, epoch: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(subseed(seed, "epoch", epoch)))


def subseed(seed: int, purpose: str, number: int) -> int:
    """A seed for each purpose and number, in the 32 bits of a seed that torch's CPU generator reads."""
    return zlib.crc32(f"{seed} {purpose} {number}".encode())


def labels_for(model: torch.nn.Module, data: Data) -> Tensor | None:
    """The labels, for a model that is conditional on them."""
    return None if getattr(model, "num_classes", None) is None else data.labels


def drop_labels(labels: Tensor, nothing: int, share: float, seed: int, number: int) -> Tensor:
    """The labels of a batch, a share of them replaced by the class that stands for none."""
    generator = torch.Generator().manual_seed(subseed(seed, "label dropout", number))
    dropped = torch.rand(len(labels), generator=generator) < share
    return labels.masked_fill(dropped.to(labels.device), nothing)


def check_kind(model: torch.nn.Module, kind: type, function: str) -> None:
    """
    Raises:
        TypeError: the model is not of the kind that the function takes.
    """
    if not isinstance(model, kind):
        raise TypeError(f"model: {function} takes a {kind.__name__}, got a {type(model).__name__}")


def check_data(model: torch.nn.Module, data: Data, name: str) -> None:
    """
    Raises:
        ValueError: there are no images, or labels that the model needs are missing, or of more classes.
    """
    if len(data.images) == 0:
        raise ValueError(f"{name}: holds no images")
    num_classes: int | None = getattr(model, "num_classes", None)
    if num_classes is None:
        return
    if data.labels is None:
        raise ValueError(f"{name}: the model is conditional on {num_classes} classes, the data have no labels")
    low, high = (int(label) for label in data.labels.aminmax())
    if low < 0 or high >= num_classes:
        raise ValueError(f"{name}: expected labels in 0..{num_classes - 1}, got {low}..{high}")
