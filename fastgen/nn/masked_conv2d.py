from __future__ import annotations

import torch
from torch import Tensor

from fastgen import ops


class MaskedConv2d(torch.nn.Conv2d):
    """`ops.masked_conv2d` as a layer: [N, in_channels, H, W] -> [N, out_channels, H, W].

    Stride 1, zero-padded to the size of the input, odd kernel sizes.  Parameters, their shapes and their initialisation
    are those of `torch.nn.Conv2d`, so state dicts load both ways.  Closed weights exist, but are neither read nor
    trained.

    Args:
        in_channels, out_channels, bias: as in `torch.nn.Conv2d`.
        kernel_size: an odd number, or a pair of them (height, width).
        mask_type: "A" hides the pixel itself (the first layer), "B" shows it.
        colors: colour groups in sequence within a pixel, see `ops.conv_mask`.
        splits: parts of the output that hold all the colours each; 2 for gated units.

    Raises:
        ValueError: the kernel size is even, or mask_type, colors or splits is not as above.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        mask_type: str,
        colors: int = 1,
        splits: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_channels, out_channels, kernel_size, padding="same", bias=bias, device=device, dtype=dtype)
        ops.conv_mask(self.weight.shape, mask_type, colors, splits, device="meta")  # checks the options
        self.mask_type = mask_type
        self.colors = colors
        self.splits = splits

    def forward(self, input: Tensor) -> Tensor:
        return ops.masked_conv2d(
            input, self.weight, self.bias, mask_type=self.mask_type, colors=self.colors, splits=self.splits
        )

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, mask_type={self.mask_type!r}"
        options = {"colors": (self.colors, 1), "splits": (self.splits, 1), "bias": (self.bias is not None, True)}
        return text + "".join(f", {name}={value}" for name, (value, default) in options.items() if value != default)
