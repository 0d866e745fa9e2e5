"""A long short-term memory that runs down the rows of a feature map, all positions of a row at once.

A. van den Oord, N. Kalchbrenner, K. Kavukcuoglu, "Pixel Recurrent Neural Networks", ICML 2016, section 3.1, equation 3.

Plain PyTorch on every device, a row after the other.  The sampler does not run it: it draws with the recurrence itself
(`fastgen.sampling.recurrent`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def row_lstm(gates: Tensor, weight: Tensor) -> Tensor:
    """Outputs of the recurrence

        i, f, g, o = gates[:, :, y] + weight * output[y - 1]      (a convolution along the row)
        cell[y] = sigmoid(f) cell[y - 1] + sigmoid(i) tanh(g)
        output[y] = sigmoid(o) tanh(cell[y])

    with cells and outputs of zeros above the first row.

    Args:
        gates: [N, 4h, H, W], floating point: what the input adds to the gates, each of h channels, in the order of
            `torch.nn.LSTM`: input, forget, cell, output.
        weight: [4h, h, k], k odd, of the same dtype and device.

    Returns:
        [N, h, H, W].

    Raises:
        TypeError: `gates` is not floating point, or `weight` of another dtype.
        ValueError: a shape is not as above, or the devices differ.
    """
    _check(gates, weight)  # first: the sampler, which takes the call below, relies on it
    if has_torch_function((gates, weight)):
        return handle_torch_function(row_lstm, (gates, weight), gates, weight)
    batch, _, height, width = gates.shape
    channels = weight.shape[1]
    output = cell = gates.new_zeros(batch, channels, width)
    rows = []
    for y in range(height):
        new = gates[:, :, y]
        if y > 0:
            new = new + F.conv1d(output, weight, padding=weight.shape[2] // 2)
        i, f, g, o = new.chunk(4, dim=1)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        output = torch.sigmoid(o) * torch.tanh(cell)
        rows.append(output)
    return torch.stack(rows, dim=2) if rows else gates.new_zeros(batch, channels, 0, width)


def _check(gates: Tensor, weight: Tensor) -> None:
    if not gates.is_floating_point():
        raise TypeError(f"gates must be floating point, got {gates.dtype}")
    if weight.dtype != gates.dtype:
        raise TypeError(f"weight must be {gates.dtype} like gates, got {weight.dtype}")
    if gates.dim() != 4 or gates.shape[1] % 4:
        raise ValueError(f"gates must be [N, 4h, H, W], got shape {tuple(gates.shape)}")
    channels = gates.shape[1] // 4
    if weight.dim() != 3 or weight.shape[:2] != (4 * channels, channels) or weight.shape[2] % 2 == 0:
        expected = f"[{4 * channels}, {channels}, k] with odd k"
        raise ValueError(
            f"weight must be {expected} for gates of shape {tuple(gates.shape)}, got {tuple(weight.shape)}"
        )
    if weight.device != gates.device:
        raise ValueError(f"weight is on {weight.device}, gates on {gates.device}")
