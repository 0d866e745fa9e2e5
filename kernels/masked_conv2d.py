"""Masked convolution as tap-GEMMs over its open taps; `fastgen.ops.masked_conv2d` is the definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen.kernels.tap_gemm import Mask, Taps, channels_last, packed, tap_gemm, weight_gradient


def forward(input: Tensor, weight: Tensor, bias: Tensor | None, mask_type: str, colors: int, splits: int) -> Tensor:
    taps, mask = _taps(weight.shape, mask_type, colors, splits)
    out = channels_last((input.shape[0], weight.shape[0], *input.shape[2:]), input)
    image = input.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()
    tap_gemm(image, packed(weight, taps, by_first=False, mask=mask), taps, out, transposed=False, bias=bias)
    return out


def input_gradient(grad: Tensor, weight: Tensor, mask_type: str, colors: int, splits: int) -> Tensor:
    taps, mask = _taps(weight.shape, mask_type, colors, splits)
    out = channels_last((grad.shape[0], weight.shape[1], *grad.shape[2:]), grad)
    grad = grad.contiguous(memory_format=torch.channels_last)
    tap_gemm(grad, packed(weight, taps, by_first=True, mask=mask), taps, out, transposed=True)
    return out


def weight_gradients(
    grad: Tensor, input: Tensor, kernel: Sequence[int], mask_type: str, colors: int, splits: int
) -> tuple[Tensor, Tensor]:
    """Of weight and bias."""
    shape = (grad.shape[1], input.shape[1], *kernel)
    taps, mask = _taps(shape, mask_type, colors, splits)
    grad, input = (image.contiguous(memory_format=torch.channels_last) for image in (grad, input))
    return weight_gradient(grad, input, taps, mask=mask), grad.sum((0, 2, 3))


def _taps(weight: Sequence[int], mask_type: str, colors: int, splits: int) -> tuple[Taps, Mask | None]:
    """The open taps, and the mask of the last one, the centre, where it is neither closed nor open as a whole."""
    height, width = weight[2:]
    strict = mask_type == "A"
    before = height * width // 2
    taps = Taps((height, width), (1, 1), (height // 2, width // 2), before + (colors > 1 or not strict))
    return taps, Mask(colors, weight[0] // splits, strict) if colors > 1 else None
