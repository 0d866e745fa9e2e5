from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastgen import ops
from fastgen.nn.masked_conv2d import MaskedConv2d


class RowLSTM(torch.nn.Module):
    """The Row LSTM of `ops.row_lstm` with its masked input: [N, in_channels, H, W] -> [N, hidden_channels, H, W].

    Args:
        in_channels, hidden_channels: as in `torch.nn.LSTM`; with colours the hidden channels are in as many groups.
        kernel_size: width of both kernels, odd: of the masked convolution from input to state, and of the one from the
            state of the row above.
        mask_type, colors: of the input, as in `MaskedConv2d`.
        device, dtype: of the parameters.

    Raises:
        ValueError: the kernel size is even, or mask_type or colors is not as above.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int = 3,
        *,
        mask_type: str = "B",
        colors: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        h, k = hidden_channels, kernel_size
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        masks: dict[str, Any] = {"mask_type": mask_type, "colors": colors, "splits": 4}
        self.input_to_state = MaskedConv2d(in_channels, 4 * h, (1, k), **masks, **options)
        self.state_to_state = torch.nn.Parameter(torch.empty(4 * h, h, k, **options))
        torch.nn.init.uniform_(self.state_to_state, -1 / math.sqrt(h * k), 1 / math.sqrt(h * k))

    def forward(self, x: Tensor) -> Tensor:
        return ops.row_lstm(self.input_to_state(x), self.state_to_state)
