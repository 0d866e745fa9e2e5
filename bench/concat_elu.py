"""concat_elu against ELU of a concatenation and dropout in PyTorch.

The activation of PixelCNN++: the first of a layer, that of a skip connection of two feature maps, and the second of a
layer, with dropout. Providers are those of masked_conv2d.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.case import Case, Work
from bench.harness.layers import competitors

TESTS = ("tests/ops/test_concat_elu.py",)
# Of an input: an exponential (16), a difference and two choices; of an output with dropout: a product and a comparison.
# Backwards a difference and two products more. Random bits are not counted.
ELU_FLOPS, DROPOUT_FLOPS, BACKWARD_FLOPS = 19, 2, 3

CASES = {  # batch, channels of the inputs, side, dropout
    "160 16x32x32": (16, (160,), 32, 0.0),
    "160 16x32x32 dropout": (16, (160,), 32, 0.5),
    "160+160 16x32x32": (16, (160, 160), 32, 0.0),
    "160 16x8x8 dropout": (16, (160,), 8, 0.5),
}
QUICK_CASES = {"5+3 2x4x4 dropout": (2, (5, 3), 4, 0.5)}


def plain(*inputs: Tensor, dropout: float) -> Tensor:
    return F.dropout(F.elu(torch.cat([*inputs, *(-x for x in inputs)], dim=1)), dropout)


def build(batch: int, channels: tuple[int, ...], side: int, dropout: float, train: bool, with_compile: bool) -> Work:
    from fastgen import ops

    torch.manual_seed(0)
    inputs = [torch.randn(batch, count, side, side) for count in channels]
    grad = torch.randn(batch, 2 * sum(channels), side, side)
    layers = partial(plain, dropout=dropout), partial(ops.concat_elu, dropout=dropout)
    providers, skipped = competitors(*layers, inputs, [True] * len(inputs), grad if train else None, with_compile)
    size = grad.numel() // 2
    forward = ELU_FLOPS + (2 * DROPOUT_FLOPS if dropout else 0)
    flops = size * (2 * forward + BACKWARD_FLOPS if train else forward)
    return Work(providers, flops, 4 * size * (7 if train else 3), skipped)


def cases(quick: bool) -> list[Case]:
    """Forward, and forward with backward."""
    return [
        Case(
            f"{name} {'forward+backward' if train else 'forward'}",
            {"batch": size[0], "channels": list(size[1]), "side": size[2], "dropout": size[3]},
            partial(build, *size, train, not quick),
        )
        for name, size in (QUICK_CASES if quick else CASES).items()
        for train in (False, True)
    ]
