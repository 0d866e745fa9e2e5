"""What is sampled: a module together with the image shape and head that give its output a meaning."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgen.sampling.heads import Head


@dataclass(frozen=True)
class Subject:
    module: nn.Module
    image_shape: tuple[int, int, int]
    head: Head
    num_classes: int | None

    def params(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Head parameters [N, C*K, H, W] of levels [N, C, H, W], in the dtype and on the device of the module."""
        x = self.head.encode(images).to(self.like)
        return self.module(x) if labels is None else self.module(x, labels.to(self.like.device))

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
    if image_shape is None or len(image_shape) != 3 or any(not isinstance(s, int) or s < 1 for s in image_shape):
        raise ValueError(f"image_shape must be (C, H, W) with positive integers, got {image_shape!r}")
    if not isinstance(head, Head):
        raise TypeError(f"head must be a fastgen.sampling.heads.Head, e.g. Categorical(256), got {type(head).__name__}")
    channels, height, width = image_shape
    return Subject(module, (channels, height, width), head, num_classes)


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
