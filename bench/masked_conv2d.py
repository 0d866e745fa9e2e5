"""masked_conv2d against a convolution with masked weights, as PyTorch users write it.

A masked weight still multiplies by its zeros; the floor counts the taps that the mask leaves open and that fall inside
the image (3x3 type B: 5 of 9, less at the border), each multiplied: minimal filtering can go below it. The memory
format of inputs, weights and incoming gradients is in the name of the provider; plain "fastgen" and "compile" get
channels_last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.case import Case, Provider, Work

TESTS = ("tests/ops/test_masked_conv2d.py",)


@dataclass(frozen=True)
class Size:
    """One layer: batch, channels, image, kernel, mask."""

    batch: int
    inputs: int
    outputs: int
    height: int
    width: int
    kernel: int
    mask_type: str
    colors: int = 1

    @property
    def name(self) -> str:
        colors = f" {self.colors} colours" if self.colors > 1 else ""
        return (
            f"{self.kernel}x{self.kernel} {self.mask_type}{colors} {self.inputs}->{self.outputs} "
            f"{self.batch}x{self.height}x{self.width}"
        )


SIZES = [
    Size(16, 128, 128, 32, 32, 3, "B"),  # the bar of the project
    Size(1, 128, 128, 32, 32, 3, "B"),
    Size(64, 128, 128, 28, 28, 3, "B"),
    Size(16, 3, 128, 32, 32, 7, "A", colors=3),
    Size(16, 256, 128, 32, 32, 1, "B"),
    Size(16, 128, 128, 32, 32, 3, "B", colors=3),
    Size(16, 64, 128, 28, 28, 5, "B"),
    Size(16, 32, 32, 8, 8, 3, "B"),
]
QUICK_SIZES = [Size(2, 8, 8, 8, 8, 3, "B"), Size(2, 3, 6, 7, 5, 5, "A", colors=3)]


def useful_flops(mask: Tensor, batch: int, height: int, width: int) -> int:
    """2 per image, open weight [Cout, Cin, kh, kw] and position at which its tap falls inside the image."""
    _, _, kh, kw = mask.shape
    open_weights = mask.sum(dim=(0, 1)).tolist()
    per_image = sum(
        open_weights[y][x] * max(0, height - abs(y - kh // 2)) * max(0, width - abs(x - kw // 2))
        for y in range(kh)
        for x in range(kw)
    )
    return 2 * batch * per_image


def masked_weights(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """What `masked_conv2d` replaces."""
    return F.conv2d(x, weight * mask, bias, padding=(mask.shape[2] // 2, mask.shape[3] // 2))


def backward(forward: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """Forward pass and the gradients of all inputs that want one."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    return torch.autograd.grad(forward(*inputs), wanted, grad)


def build(size: Size, train: bool, with_compile: bool) -> Work:
    """Inputs and providers of one size; `train` adds the backward pass."""
    from fastgen import ops

    torch.manual_seed(0)
    x = torch.randn(size.batch, size.inputs, size.height, size.width)
    weight = torch.randn(size.outputs, size.inputs, size.kernel, size.kernel) * 0.05
    bias = torch.randn(size.outputs)
    grad = torch.randn(size.batch, size.outputs, size.height, size.width)
    mask = ops.conv_mask(weight.shape, size.mask_type, size.colors, 1)
    input_grad = size.inputs > 3  # the first layer reads the image, which needs no gradient

    def provider(forward: Callable[..., Tensor], memory_format: torch.memory_format, baseline: bool) -> Provider:
        layout = partial(torch.Tensor.contiguous, memory_format=memory_format)
        inputs = (layout(x).clone(), layout(weight).clone(), bias.clone())
        if not train:
            return Provider(partial(without_grad, forward, inputs), baseline)
        for tensor in inputs[0 if input_grad else 1 :]:
            tensor.requires_grad_()
        return Provider(partial(backward, forward, inputs, layout(grad)), baseline)

    dense = partial(masked_weights, mask=mask)
    fast = partial(ops.masked_conv2d, mask_type=size.mask_type, colors=size.colors)
    skipped = {}
    providers = {
        "contiguous": provider(dense, torch.contiguous_format, True),
        "channels_last": provider(dense, torch.channels_last, True),
    }
    if with_compile:
        try:
            providers["compile"] = provider(torch.compile(dense, dynamic=False), torch.channels_last, True)
            providers["compile"].call()
        except Exception as error:  # whatever the compiler's stack raises: it is not what is measured
            providers.pop("compile", None)
            skipped["compile"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    providers["fastgen"] = provider(fast, torch.channels_last, False)
    providers["fastgen contiguous"] = provider(fast, torch.contiguous_format, False)

    products = (2 + input_grad) if train else 1
    tensors = x.numel() + grad.numel() + int(mask.sum()) + bias.numel()
    if train:  # forward as above; then read x, weight and the output's gradient, write the gradients
        tensors += x.numel() * (1 + input_grad) + grad.numel() + 2 * int(mask.sum()) + bias.numel()
    return Work(providers, products * useful_flops(mask, size.batch, size.height, size.width), 4 * tensors, skipped)


def without_grad(forward: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return forward(*inputs)


def cases(quick: bool) -> list[Case]:
    """Forward, and forward with backward, of every size."""
    result = []
    for size in QUICK_SIZES if quick else SIZES:
        shapes = {
            "x": [size.batch, size.inputs, size.height, size.width],
            "weight": [size.outputs, size.inputs, size.kernel, size.kernel],
        }
        for train in (False, True):
            name = f"{size.name} {'forward+backward' if train else 'forward'}"
            with_compile = not quick and size is SIZES[0]
            result.append(Case(name, shapes, partial(build, size, train, with_compile)))
    return result
