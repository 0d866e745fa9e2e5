from __future__ import annotations

import torch
from torch import Tensor

from fastgen import ops


class ShiftedConv2d(torch.nn.Conv2d):
    """`ops.shifted_conv2d` as a layer: [N, in_channels, H, W] -> [N, out_channels, H, W].

    Stride 1, zero-padded to the size of the input; the window's last row is the pixel's own.  Parameters, their shapes
    and their initialisation are those of `torch.nn.Conv2d`, so state dicts load both ways; its attribute ``padding`` is
    zero, for it has no word for zeros that are not the same on all sides.

    Args:
        in_channels, out_channels, bias: as in `torch.nn.Conv2d`.
        kernel_size: a number, or two of them (height, width).
        left: how many columns of the window lie to the left of the pixel, 0..width - 1: (width - 1) / 2 sees as far to
            the right, width - 1 nothing there.

    Raises:
        ValueError: left is not as above.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        left: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_channels, out_channels, kernel_size, bias=bias, device=device, dtype=dtype)
        if not isinstance(left, int) or not 0 <= left < self.kernel_size[1]:
            raise ValueError(f"left must be an integer from 0 to {self.kernel_size[1] - 1}, got {left}")
        self.left = left

    def forward(self, input: Tensor) -> Tensor:
        return ops.shifted_conv2d(input, self.weight, self.bias, left=self.left)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, left={self.left}"
        return text if self.bias is not None else f"{text}, bias=False"
