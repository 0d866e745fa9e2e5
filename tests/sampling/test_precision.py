"""Weights in bfloat16: what is sampled is exactly the model with rounded weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastgen
from fastgen import models
from fastgen.sampling import Sampler, naive_sample
from fastgen.sampling.precision import weights_in


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    net = models.PixelCNNpp(image_shape=(3, 5, 4), levels=16, num_filters=7, num_blocks=1, num_mixtures=2)
    net.initialize(torch.randint(16, (16, 3, 5, 4), dtype=torch.uint8))
    return net.eval()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_samples_are_those_of_rounded_weights(model: torch.nn.Module, backend: str) -> None:
    drawn = Sampler(model, precision="bf16", backend=backend).sample(5, seed=3)
    with weights_in("bf16"):
        assert torch.equal(drawn, naive_sample(model, 5, seed=3))


def test_audit_knows_the_precision(model: torch.nn.Module) -> None:
    drawn = Sampler(model, precision="bf16").sample(64)
    assert not torch.equal(drawn, Sampler(model).sample(64))
    assert fastgen.audit(model, drawn, precision="bf16").ok
    assert not fastgen.audit(model, drawn).ok


def test_bits_per_dim_of_rounded_weights(model: torch.nn.Module) -> None:
    images = Sampler(model).sample(8)
    plain = fastgen.bits_per_dim(model, images)
    rounded = fastgen.bits_per_dim(model, images, precision="bf16")
    assert rounded == pytest.approx(plain, abs=0.02) and rounded != plain


def test_weights_take_half_the_bytes(model: torch.nn.Module) -> None:
    assert 2 * Sampler(model, precision="bf16").plan.weight_bytes == Sampler(model).plan.weight_bytes


def test_unknown_precision(model: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="precision must be 'fp32' or 'bf16', got 'int8'"):
        Sampler(model, precision="int8")


class Written(torch.nn.Module):
    """Attention of one head, as products of what depends on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(5, 15), torch.nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=2)
        return self.out(torch.softmax(q @ k.transpose(1, 2), 2) @ v)


@pytest.mark.parametrize(
    "network",
    [
        Written(),
        torch.nn.TransformerEncoderLayer(5, 1, 8, batch_first=True),
        torch.nn.LSTM(5, 6, num_layers=2, batch_first=True),
        torch.nn.GRU(5, 6, batch_first=True),
        torch.nn.Sequential(torch.nn.Unflatten(2, (1, 5)), torch.nn.Conv2d(7, 12, 1), fastgen.nn.RowLSTM(12, 4)),
    ],
    ids=lambda network: type(network).__name__,
)
@torch.no_grad()
def test_weights_alone_are_rounded(network: torch.nn.Module) -> None:
    """Not what attention multiplies, were it of one sample and one head; and those of recurrent layers are."""
    torch.manual_seed(0)
    x, rounded = torch.randn(1, 7, 5), copy.deepcopy(network.eval())
    for parameter in rounded.parameters():
        if parameter.dim() > 1:
            parameter.copy_(parameter.bfloat16())
    with weights_in("bf16"):
        found = network(x)
    for a, b, plain in zip(tree_leaves(found), tree_leaves(rounded(x)), tree_leaves(network(x)), strict=True):
        torch.testing.assert_close(a, b)
        assert (a - plain).abs().max() > 1e-5  # float32 alone differs by 1e-7
