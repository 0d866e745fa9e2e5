"""What is sampled: a module together with the image shape and head that give its output a meaning."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgen.sampling.heads import Head

MAX_CHANNELS = 256  # of an image: what the schedule's keys have room for


@dataclass(frozen=True)
class Subject:
    module: nn.Module
    image_shape: tuple[int, int, int]
    head: Head
    num_classes: int | None

    def params(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Head parameters [N, C*K, H, W] of levels [N, C, H, W], in the dtype and on the device of the module."""
        x = self.encode(images)
        return self.module(x) if labels is None else self.module(x, labels.to(self.like.device))

    def encode(self, images: Tensor) -> Tensor:
        """What the module reads for levels [N, C, H, W], on its device and, unless it reads integers, in its dtype."""
        x = self.head.encode(images)
        return x.to(self.like) if x.is_floating_point() else x.to(self.like.device)

    @property
    def like(self) -> Tensor:
        """A floating point parameter: its dtype and device are the module's."""
        tensors = (*self.module.parameters(), *self.module.buffers())
        return next((t for t in tensors if t.is_floating_point()), torch.zeros(()))


def make_subject(
    module: nn.Module,
    image_shape: tuple[int, int, int] | None,
    head: Head | None,
    num_classes: int | None,
) -> Subject:
    """Take what is not given from the module's attributes `image_shape`, `head` and `num_classes`.

    Raises:
        TypeError, ValueError: the argument, what was expected and what came.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(module).__name__}")
    image_shape = image_shape if image_shape is not None else getattr(module, "image_shape", None)
    head = head if head is not None else getattr(module, "head", None)
    num_classes = num_classes if num_classes is not None else getattr(module, "num_classes", None)
    if not isinstance(image_shape, Sequence) or len(image_shape) != 3 or not all(map(_positive, image_shape)):
        raise ValueError(f"image_shape must be (C, H, W) with positive integers, got {image_shape!r}")
    channels, height, width = image_shape
    if channels > MAX_CHANNELS:
        raise ValueError(f"image_shape must have at most {MAX_CHANNELS} channels, got {channels}")
    if not isinstance(head, Head):
        raise TypeError(f"head must be a fastgen.sampling.heads.Head, e.g. Categorical(256), got {type(head).__name__}")
    if num_classes is not None and not _positive(num_classes):
        raise ValueError(f"num_classes must be a positive integer or None, got {num_classes!r}")
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        raise ValueError("the model is on the meta device: its weights have no values")
    return Subject(module, (channels, height, width), head, num_classes)


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@contextlib.contextmanager
def host_defaults() -> Iterator[None]:
    """New tensors are float32 on the CPU, whatever the user's defaults."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    # As a context, a device costs microseconds at each call of a torch function.
    device = contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """No gradients, and eval mode for all submodules; each gets its own mode back."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, training in modes:
            m.training = training
