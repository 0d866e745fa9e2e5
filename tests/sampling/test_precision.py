"""Weights in bfloat16: what is sampled is exactly the model with rounded weights."""

from __future__ import annotations

import pytest
import torch

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
