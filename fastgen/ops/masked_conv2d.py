"""Masked convolution: the causal convolution of autoregressive pixel models.

A. van den Oord, N. Kalchbrenner, K. Kavukcuoglu, "Pixel Recurrent Neural Networks", ICML 2016, section 3.4, figure 4.

A pixel sees the pixels above it and to its left.  Within the pixel the colours are in sequence: mask type A, for the
first layer, lets a colour see the earlier colours alone; type B lets it see itself as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from fastgen.ops.causal_conv import Operator, check_weight, register

_MAX_TAPS = 128  # of csrc/cpu/masked_conv2d.h


def masked_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, mask_type: str, colors: int = 1, splits: int = 1
) -> Tensor:
    """``conv2d(input, weight * conv_mask(...), bias)``, stride 1, zero-padded to the size of the input.

    Args:
        input: [N, Cin, H, W], any strides.
        weight: [Cout, Cin, kh, kw] with odd kh, kw, of the dtype of the input.
        bias: [Cout] or None.
        mask_type: "A" or "B", see `conv_mask`; so are colors and splits.

    Returns:
        [N, Cout, H, W], channels-last in memory where a native kernel computed it.

    Only open taps are computed, in both directions; the gradient of a closed weight is zero.  float32 and float64 run
    natively on the CPU, float32, float16 and bfloat16 on the GPU (Triton; TF32 only where
    ``torch.set_float32_matmul_precision`` asks for it), other dtypes, autocast and all within `torch.func` or
    forward-mode differentiation through plain PyTorch; so does a backward pass that is itself to be differentiated
    (``create_graph=True``).

    Raises:
        TypeError: an argument is not a tensor or the dtypes differ.
        ValueError: a shape, the mask type, colors or splits is not as above.
    """
    return _operator(input, weight, bias, mask_type, colors, splits)


def masked_conv2d_reference(
    input: Tensor, weight: Tensor, bias: Tensor | None, mask_type: str, colors: int, splits: int
) -> Tensor:
    """The definition, in plain PyTorch."""
    mask = conv_mask(weight.shape, mask_type, colors, splits, device=weight.device)
    return F.conv2d(input, weight * mask, bias, padding=_padding(weight.shape[2:]))


def conv_mask(
    weight_shape: Sequence[int],
    mask_type: str,
    colors: int = 1,
    splits: int = 1,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which weights of a masked convolution are open: bool [Cout, Cin, kh, kw].

    Open are the taps above the centre row, those left of the centre, and of the centre tap the connections from input
    colour a to output colour b with a < b (type A) or a <= b (type B).  Channels are cut into `colors` groups: input
    channel i has colour ``i * colors // Cin``.  Output channels are `splits` equal parts that hold all the colours each
    (two for gated units, whose halves are then aligned): with ``part = Cout // splits``, output channel o has colour
    ``o % part * colors // part``.

    Raises:
        ValueError: the shape is not that of a kernel of odd size, or an option is unknown or does not fit.
    """
    _check_mask(weight_shape, mask_type, colors, splits)
    out_channels, in_channels, height, width = weight_shape
    part = out_channels // splits
    reader = torch.arange(out_channels, device=device)[:, None] % part * colors // part
    source = torch.arange(in_channels, device=device)[None, :] * colors // in_channels
    within = source < reader if mask_type == "A" else source <= reader
    tap = torch.arange(height * width, device=device).view(height, width)
    centre = height * width // 2
    return (tap < centre) | (tap == centre) & within[:, :, None, None]


def _check_mask(weight_shape: Sequence[int], mask_type: str, colors: int, splits: int) -> None:
    check_weight(weight_shape)
    if weight_shape[2] % 2 == 0 or weight_shape[3] % 2 == 0:
        raise ValueError(f"weight must have odd kernel sizes, got {weight_shape[2]} x {weight_shape[3]}")
    if mask_type not in ("A", "B"):
        raise ValueError(f"mask_type must be 'A' or 'B', got {mask_type!r}")
    if colors < 1:
        raise ValueError(f"colors must be at least 1, got {colors}")
    if splits < 1 or weight_shape[0] % splits:
        raise ValueError(f"splits must divide the {weight_shape[0]} output channels, got {splits}")


def _input_grad_reference(grad: Tensor, weight: Tensor, mask_type: str, colors: int, splits: int) -> Tensor:
    mask = conv_mask(weight.shape, mask_type, colors, splits, device=weight.device)
    shape = (grad.shape[0], weight.shape[1], *grad.shape[2:])
    return conv2d_input(shape, weight * mask, grad, padding=_padding(weight.shape[2:]))


def _weight_grad_reference(
    grad: Tensor, input: Tensor, kernel: Sequence[int], mask_type: str, colors: int, splits: int
) -> tuple[Tensor, Tensor]:
    shape = (grad.shape[1], input.shape[1], *kernel)
    mask = conv_mask(shape, mask_type, colors, splits, device=grad.device)
    result = conv2d_weight(input, shape, grad, padding=_padding(kernel))
    return (result * mask).contiguous(), grad.sum((0, 2, 3))


def _padding(kernel: Any) -> tuple[int, int]:
    return kernel[0] // 2, kernel[1] // 2


def _native(
    native: Any,
    input: Sequence[int],
    out_channels: int,
    kernel: Sequence[int],
    threads: int,
    mask_type: str,
    colors: int,
    splits: int,
) -> Any:
    return native.MaskedConv2d(input, out_channels, kernel, mask_type == "B", colors, splits, threads)


def _why_not_native(kernel: Sequence[int], mask_type: str, colors: int, splits: int) -> str | None:
    fits = kernel[0] // 2 + splits <= _MAX_TAPS
    return None if fits else f"kernel height / 2 + splits is above {_MAX_TAPS}"


_operator = Operator(
    name="masked_conv2d",
    options="str mask_type, int colors, int splits",
    check=_check_mask,
    reference=masked_conv2d_reference,
    input_grad=_input_grad_reference,
    weight_grad=_weight_grad_reference,
    native=_native,
    why_not_native=_why_not_native,
    triton=("forward", "input_gradient", "weight_gradients"),
)
register(_operator)
