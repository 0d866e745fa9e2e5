"""Samples of a seed are the same on every processor, and in every version.

The checksums are of AVX2, AVX-512 and ARM. Processors without multiply-adds have other last bits, which change no
level here. A change that alters these numbers on purpose is listed under "Numbers" in CHANGELOG.md.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fastgen import Sampler, models, ops
from tests.instruction_sets import ISAS, chosen

MODELS: dict[str, Callable[[], nn.Module]] = {
    "gated": lambda: models.GatedPixelCNN(image_shape=(1, 6, 7), num_filters=16, num_blocks=3),
    "pixelcnn++": lambda: models.PixelCNNpp(image_shape=(3, 6, 7), num_filters=8, num_blocks=1),
    "pixelrnn": lambda: models.PixelRNN(image_shape=(3, 4, 5), num_filters=8, num_blocks=2, num_features=16),
    "transformer": lambda: models.ImageGPT(image_shape=(1, 5, 6), levels=32, num_filters=32, num_blocks=2, num_heads=4),
}
CHECKSUMS = {
    ("gated", "fp32"): 0x5C107E43,
    ("gated", "int8"): 0x7750A8AE,
    ("pixelcnn++", "fp32"): 0x071C68C9,
    ("pixelcnn++", "int8"): 0x863374C6,
    ("pixelrnn", "fp32"): 0x66C6A71A,
    ("pixelrnn", "int8"): 0xDDEA9A3A,
    ("transformer", "fp32"): 0x8132AC98,
    ("transformer", "int8"): 0x6F399115,
}


def with_known_weights(model: nn.Module) -> nn.Module:
    """From fastgen's own random numbers, for PyTorch's are its own business."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            values = ops.normal(1, (parameter.numel(),), seed=i).view(parameter.shape)
            parameter.copy_(values * 0.25 if parameter.dim() > 1 else 1 + values * 0.25)
    return model.eval()


@pytest.mark.parametrize(("name", "precision"), CHECKSUMS)
def test_samples_are_those_of_their_seed(name: str, precision: str) -> None:
    model = with_known_weights(MODELS[name]())
    for isa in ISAS:
        with chosen(isa):
            images = Sampler(model, precision=precision, backend="cpu").sample(5, seed=11)
        assert len(images.unique()) > 20
        assert zlib.crc32(images.numpy().tobytes()) == CHECKSUMS[name, precision], isa
