"""Shifted convolution: the causal convolution of PixelCNN++, PixelSNAIL and the vertical stack of gated PixelCNNs.

T. Salimans, A. Karpathy, X. Chen, D. P. Kingma, "PixelCNN++", ICLR 2017, section 2.3, figure 2: its "down-shifted" and
"down-right-shifted" convolutions, which do without a mask.  The window lies above the pixel, and its last row is the
pixel's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from fastgen.ops.causal_conv import Operator, check_weight, register

_MAX_ROWS = 128  # of csrc/cpu/masked_conv2d.h


def shifted_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, left: int) -> Tensor:
    """``conv2d(pad(input, (left, kw - 1 - left, kh - 1, 0)), weight, bias)``, stride 1: the size of the input is kept.

    Args:
        input: [N, Cin, H, W], any strides.
        weight: [Cout, Cin, kh, kw], of the dtype of the input.
        bias: [Cout] or None.
        left: how many of the kernel's columns lie to the left of the pixel, 0..kw - 1: (kw - 1) / 2 for a
            "down-shifted" convolution, kw - 1 for a "down-right-shifted" one.

    Returns:
        [N, Cout, H, W], channels-last in memory where a native kernel computed it.

    float32 and float64 run natively on the CPU; other dtypes and devices, autocast and all within `torch.func` or
    forward-mode differentiation in plain PyTorch; so does a backward pass that is itself to be differentiated
    (``create_graph=True``).

    Raises:
        TypeError: an argument is not a tensor or the dtypes differ.
        ValueError: a shape or left is not as above.
    """
    return _operator(input, weight, bias, left)


def shifted_conv2d_reference(input: Tensor, weight: Tensor, bias: Tensor | None, left: int) -> Tensor:
    """The definition, in plain PyTorch."""
    return F.conv2d(_padded(input, weight.shape[2:], left), weight, bias)


def _padded(input: Tensor, kernel: Sequence[int], left: int) -> Tensor:
    padding = (left, kernel[1] - 1 - left, kernel[0] - 1, 0)
    return F.pad(input, padding) if any(padding) else input


def _input_grad_reference(grad: Tensor, weight: Tensor, left: int) -> Tensor:
    n, _, height, width = grad.shape
    _, channels, rows, columns = weight.shape
    result = conv2d_input((n, channels, height + rows - 1, width + columns - 1), weight, grad)
    return result[:, :, rows - 1 :, left : left + width]


def _weight_grad_reference(grad: Tensor, input: Tensor, kernel: Sequence[int], left: int) -> tuple[Tensor, Tensor]:
    shape = (grad.shape[1], input.shape[1], *kernel)
    return conv2d_weight(_padded(input, kernel, left), shape, grad).contiguous(), grad.sum((0, 2, 3))


def _check_window(weight_shape: Sequence[int], left: int) -> None:
    check_weight(weight_shape)
    if not isinstance(left, int) or not 0 <= left < weight_shape[3]:
        raise ValueError(f"left must be an integer from 0 to {weight_shape[3] - 1}, a column of the kernel, got {left}")


def _native(
    native: Any, input: Sequence[int], out_channels: int, kernel: Sequence[int], threads: int, left: int
) -> Any:
    return native.MaskedConv2d.shifted(input, out_channels, kernel, left, threads)


def _why_not_native(kernel: Sequence[int], left: int) -> str | None:
    return None if kernel[0] <= _MAX_ROWS else f"the kernel has more than {_MAX_ROWS} rows"


_operator = Operator(
    name="shifted_conv2d",
    options="int left",
    check=_check_window,
    reference=shifted_conv2d_reference,
    input_grad=_input_grad_reference,
    weight_grad=_weight_grad_reference,
    native=_native,
    why_not_native=_why_not_native,
)
register(_operator)
