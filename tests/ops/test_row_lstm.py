"""The Row LSTM: the equations by loops over numbers, `torch.nn.LSTM` for kernels of one position, gradients, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastgen import nn, ops


def by_loops(gates: Tensor, weight: Tensor) -> Tensor:
    """Equation 3, number by number."""
    batch, _, height, width = gates.shape
    columns, channels, size = weight.shape
    output = torch.zeros(batch, channels, height, width, dtype=gates.dtype)
    cell = torch.zeros_like(output)

    def sigmoid(v: float) -> float:
        return 1 / (1 + math.exp(-v))

    for n in range(batch):
        for y in range(height):
            for x in range(width):
                sums = gates[n, :, y, x].tolist()
                for m in range(columns):
                    for k in range(channels):
                        for t in range(size):
                            at = x + t - size // 2
                            if y > 0 and 0 <= at < width:
                                sums[m] += (weight[m, k, t] * output[n, k, y - 1, at]).item()
                for c in range(channels):
                    i, f, g, o = sums[c::channels]
                    before = cell[n, c, y - 1, x].item() if y > 0 else 0.0
                    cell[n, c, y, x] = sigmoid(f) * before + sigmoid(i) * math.tanh(g)
                    output[n, c, y, x] = sigmoid(o) * math.tanh(cell[n, c, y, x])
    return output


@pytest.mark.parametrize(("height", "width", "size"), [(3, 4, 3), (1, 2, 1), (4, 1, 3), (2, 3, 5)])
def test_equals_the_equations(height, width, size):
    torch.manual_seed(0)
    gates, weight = torch.randn(2, 8, height, width).double(), torch.randn(8, 2, size).double()
    torch.testing.assert_close(ops.row_lstm(gates, weight), by_loops(gates, weight))


def test_kernels_of_one_position_are_an_lstm_down_each_column():
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(3, 5, batch_first=True).double()
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    gates = torch.einsum("nkyx,mk->nmyx", x, lstm.weight_ih_l0) + (lstm.bias_ih_l0 + lstm.bias_hh_l0)[:, None, None]
    columns = x.permute(0, 3, 2, 1).flatten(0, 1)  # [N * W, H, K]
    expected = lstm(columns)[0].unflatten(0, (2, 4)).permute(0, 3, 2, 1)
    torch.testing.assert_close(ops.row_lstm(gates, lstm.weight_hh_l0[:, :, None]), expected)


def test_gradients():
    torch.manual_seed(0)
    gates = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.row_lstm, (gates, weight))


def test_compiles_and_takes_empty_batches():
    gates, weight = torch.randn(2, 8, 3, 2), torch.randn(8, 2, 3)
    compiled = torch.compile(ops.row_lstm, fullgraph=True, backend="eager")
    assert torch.equal(compiled(gates, weight), ops.row_lstm(gates, weight))
    assert ops.row_lstm(gates[:0], weight).shape == (0, 2, 3, 2)
    assert ops.row_lstm(gates[:, :, :0], weight).shape == (2, 2, 0, 2)


GATES, WEIGHT = torch.zeros(2, 8, 3, 4), torch.zeros(8, 2, 3)


@pytest.mark.parametrize(
    ("gates", "weight", "error", "text"),
    [
        (GATES.long(), WEIGHT, TypeError, "gates must be floating point, got torch.int64"),
        (GATES, WEIGHT.double(), TypeError, "weight must be torch.float32 like gates, got torch.float64"),
        (GATES[0], WEIGHT, ValueError, r"gates must be \[N, 4h, H, W\], got shape \(8, 3, 4\)"),
        (GATES[:, :7], WEIGHT, ValueError, r"gates must be \[N, 4h, H, W\], got shape \(2, 7, 3, 4\)"),
        (GATES, WEIGHT[:, :, :2], ValueError, r"weight must be \[8, 2, k\] with odd k .* got \(8, 2, 2\)"),
        (GATES, WEIGHT[:4], ValueError, r"got \(4, 2, 3\)"),
        (GATES, WEIGHT.to("meta"), ValueError, "weight is on meta, gates on cpu"),
    ],
)
def test_bad_input(gates, weight, error, text):
    with pytest.raises(error, match=text):
        ops.row_lstm(gates, weight)


def test_layer_masks_its_input():
    torch.manual_seed(0)
    layer = nn.RowLSTM(6, 3, mask_type="A", colors=3)
    x = torch.randn(1, 6, 4, 5, requires_grad=True)
    layer(x)[0, 1, 2, 2].backward()  # a green channel
    seen = x.grad[0] != 0
    assert seen[:2, 2, 2].all() and not seen[2:, 2, 2].any()  # of its own pixel red alone
    assert not seen[:, 2, 3:].any() and not seen[:, 3].any()
    assert seen[:, 1, 1:3].all()  # all colours of the row above
    with pytest.raises(ValueError, match="mask_type"):
        nn.RowLSTM(6, 3, mask_type="C")


def test_layer_in_double():
    layer = nn.RowLSTM(2, 3, dtype=torch.float64)
    assert layer(torch.zeros(1, 2, 3, 4, dtype=torch.float64)).dtype == torch.float64
