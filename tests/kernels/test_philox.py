"""Philox and normal numbers of the Triton kernels: the bits of the reference."""

from __future__ import annotations

import pytest
import torch

from fastgen.kernels import philox as kernel
from fastgen.ops import philox
from fastgen.ops.philox import philox_reference
from tests.ops.test_philox import KNOWN_ANSWERS, counters

SEEDS = pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32, 2**63, 2**64 - 1], ids=hex)


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_known_answers(name, device):
    (block, position, low, high), (key_low, key_high), expected = KNOWN_ANSWERS[name]
    sample = low | high << 32
    counter = [torch.tensor([word], device=device) for word in (block, position, kernel.signed(sample))]
    assert kernel.uint32(key_low | key_high << 32, *counter).tolist() == [list(expected)]


@SEEDS
def test_bits_are_those_of_the_reference(seed, device, triton_backend):
    expected = philox_reference(seed, *torch.broadcast_tensors(*counters()))
    assert torch.equal(philox.uint32(seed, *(words.to(device) for words in counters())).cpu(), expected)


def test_nothing_to_draw(device):
    empty = torch.empty(0, 3, dtype=torch.int64, device=device)
    assert kernel.uint32(0, empty, empty, empty).shape == (0, 3, 4)
