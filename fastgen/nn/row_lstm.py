from __future__ import annotations

import math

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

    Raises:
        ValueError: the kernel size is even, or mask_type or colors is not as above.
    """

    def __init__(
        self, in_channels: int, hidden_channels: int, kernel_size: int = 3, *, mask_type: str = "B", colors: int = 1
    ):
        super().__init__()
        h, k = hidden_channels, kernel_size
        self.input_to_state = MaskedConv2d(in_channels, 4 * h, (1, k), mask_type=mask_type, colors=colors, splits=4)
        self.state_to_state = torch.nn.Parameter(torch.empty(4 * h, h, k))
        torch.nn.init.uniform_(self.state_to_state, -1 / math.sqrt(h * k), 1 / math.sqrt(h * k))

    def forward(self, x: Tensor) -> Tensor:
        return ops.row_lstm(self.input_to_state(x), self.state_to_state)
