"""gated_unit against its formula in PyTorch: the gates of gated PixelCNNs, and those of PixelCNN++ with their residual.

Providers are those of masked_conv2d.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.harness.case import Case, Work
from bench.harness.layers import competitors

TESTS = ("tests/ops/test_gated_unit.py",)
# Of an output: an exponential (16) for each function, their quotient and product; backwards that again, and the slopes.
FUNCTION_FLOPS, BACKWARD_FLOPS = 19, 8

CASES = {  # batch, channels of the input, side, activation, whether there is a residual
    "tanh 128 16x28x28": (16, 128, 28, "tanh", False),
    "residual 320 16x32x32": (16, 320, 32, "none", True),
    "tanh 64 64x8x8": (64, 64, 8, "tanh", False),
}
QUICK_CASES = {"tanh 6 2x4x4": (2, 6, 4, "tanh", False), "residual 6 2x4x4": (2, 6, 4, "none", True)}


def plain(input: Tensor, *residual: Tensor, activation: str) -> Tensor:
    a, b = input.chunk(2, dim=1)
    y = (torch.tanh(a) if activation == "tanh" else a) * torch.sigmoid(b)
    return residual[0] + y if residual else y


def build(
    batch: int, channels: int, side: int, activation: str, residual: bool, train: bool, with_compile: bool
) -> Work:
    from fastgen import ops

    torch.manual_seed(0)
    half = (batch, channels // 2, side, side)
    inputs = [torch.randn(batch, channels, side, side), *([torch.randn(half)] if residual else [])]
    grad = torch.randn(half)
    layers = (partial(function, activation=activation) for function in (plain, ops.gated_unit))
    providers, skipped = competitors(*layers, inputs, [True] * len(inputs), grad if train else None, with_compile)
    forward = FUNCTION_FLOPS * (1 + (activation == "tanh"))
    flops = grad.numel() * (2 * forward + BACKWARD_FLOPS if train else forward)
    # The gradient of the residual is that of the output.
    return Work(providers, flops, 4 * grad.numel() * (3 + residual + (5 if train else 0)), skipped)


def cases(quick: bool) -> list[Case]:
    """Forward, and forward with backward."""
    return [
        Case(
            f"{name} {'forward+backward' if train else 'forward'}",
            {"batch": size[0], "channels": size[1], "side": size[2], "activation": size[3], "residual": size[4]},
            partial(build, *size, train, not quick),
        )
        for name, size in (QUICK_CASES if quick else CASES).items()
        for train in (False, True)
    ]
