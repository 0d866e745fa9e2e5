from __future__ import annotations

import pytest
import torch

from fastgen import nn, ops


def test_is_the_operation():
    layer = nn.MaskedConv2d(6, 12, (3, 5), mask_type="A", colors=3, splits=2)
    x = torch.randn(2, 6, 4, 5)
    expected = ops.masked_conv2d(x, layer.weight, layer.bias, mask_type="A", colors=3, splits=2)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_state_dicts_load_both_ways(bias):
    layer = nn.MaskedConv2d(3, 6, 3, mask_type="B", bias=bias)
    plain = torch.nn.Conv2d(3, 6, 3, bias=bias)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(plain.weight, layer.weight)
    other = torch.nn.Conv2d(3, 6, 3, bias=bias)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.weight, other.weight)


def test_starts_like_conv2d():
    torch.manual_seed(3)
    layer = nn.MaskedConv2d(3, 6, 3, mask_type="B")
    torch.manual_seed(3)
    assert torch.equal(layer.weight, torch.nn.Conv2d(3, 6, 3).weight)


def test_trains_open_weights_alone():
    layer = nn.MaskedConv2d(3, 6, 3, mask_type="A", colors=3)
    layer(torch.randn(2, 3, 5, 5)).square().sum().backward()
    mask = ops.conv_mask(layer.weight.shape, "A", 3)
    assert (layer.weight.grad[~mask] == 0).all()
    assert (layer.weight.grad[mask] != 0).all()


def test_repr():
    text = repr(nn.MaskedConv2d(3, 6, 3, mask_type="A", colors=3, bias=False))
    assert text == "MaskedConv2d(3, 6, kernel_size=(3, 3), mask_type='A', colors=3, bias=False)"
    assert repr(nn.MaskedConv2d(3, 6, 1, mask_type="B")) == "MaskedConv2d(3, 6, kernel_size=(1, 1), mask_type='B')"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 2}, "odd kernel sizes, got 2 x 2"),
        ({"mask_type": "c"}, "mask_type must be 'A' or 'B', got 'c'"),
        ({"splits": 5}, "splits must divide the 6 output channels, got 5"),
        ({"colors": -1}, "colors must be at least 1, got -1"),
    ],
    ids=["kernel", "mask type", "splits", "colors"],
)
def test_errors(options, message):
    given = {"in_channels": 3, "out_channels": 6, "kernel_size": 3, "mask_type": "A"}
    with pytest.raises(ValueError, match=message):
        nn.MaskedConv2d(**{**given, **options})
