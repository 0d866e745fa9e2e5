"""Philox4x32-10: known answers of the Random123 distribution, and the same bits from every implementation."""

from __future__ import annotations

import pytest
import torch

import fastgen
from fastgen import backends
from fastgen.ops import philox

ONES = 0xFFFFFFFF

# Random123, tests/kat_vectors, philox4x32 10: counter words, key words, result.
KNOWN_ANSWERS = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_known_answers(name, backend):
    (block, position, low, high), (key_low, key_high), expected = KNOWN_ANSWERS[name]
    sample = low | high << 32
    if sample >= 2**63:  # beyond the public range, within that of the generator
        sample -= 2**64
    counter = [torch.tensor([word]) for word in (block, position, sample)]
    with fastgen.backend(backend):
        function = backends.select("philox", 0, *counter)
    assert function(key_low | key_high << 32, *counter).tolist() == [list(expected)]


def counters():
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 2**32, (2, 5, 7, 1), generator=generator)
    return words[0], words[1], torch.randint(0, 2**62, (3,), generator=generator)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1], ids=hex)
def test_implementations_agree(seed):
    with fastgen.backend("reference"):
        expected = philox.uint32(seed, *counters())
    with fastgen.backend("cpu"):
        actual = philox.uint32(seed, *counters())
    assert expected.shape == (5, 7, 3, 4)
    assert expected.min() >= 0
    assert expected.max() < 2**32
    assert torch.equal(actual, expected)


def test_uniforms_of_python_and_cpp_are_equal():
    bits = philox.uint32(3, *counters()).flatten()
    uniforms = philox.uniform(3, *counters())
    assert uniforms.dtype == torch.float32
    assert uniforms.flatten().tolist() == [backends.native_cpu().philox_uniform(word) for word in bits.tolist()]


@pytest.mark.parametrize("bits", [0, 1, 255, 256, 2**31 - 1, 2**31, 2**32 - 256, 2**32 - 1], ids=hex)
def test_uniforms_stay_inside_the_open_interval(bits, monkeypatch):
    monkeypatch.setattr(philox, "uint32", lambda *_: torch.tensor([bits]))
    value = philox.uniform(0, 0, 0, 0).item()
    assert 0 < value < 1
    assert value * 2**24 % 2 == 1
    assert value == backends.native_cpu().philox_uniform(bits)


def test_uniforms_are_uniform():
    values = philox.uniform(7, 0, torch.arange(20000), 0).flatten().double()
    assert abs(values.mean() - 0.5) < 0.005
    assert abs(values.var() - 1 / 12) < 0.002


def test_integers_broadcast():
    grid = philox.uint32(5, 0, torch.arange(4), torch.arange(3)[:, None])
    assert grid.shape == (3, 4, 4)
    assert torch.equal(grid[2, 1], philox.uint32(5, 0, 1, 2))
    assert philox.uint32(5, 0, torch.arange(0), 0).shape == (0, 4)


def test_compiles():
    compiled = torch.compile(philox.uint32, fullgraph=True, backend="eager")
    assert torch.equal(compiled(5, 0, torch.arange(6), 1), philox.uint32(5, 0, torch.arange(6), 1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0.5, 0, 0, 0), TypeError, "seed must be an int, got float"),
        ((-1, 0, 0, 0), ValueError, "seed must be in 0..2\\^64-1, got -1"),
        ((2**64, 0, 0, 0), ValueError, "seed must be in"),
        ((0, 0, 2**32, 0), ValueError, "position must be in 0..4294967295, got 4294967296"),
        ((0, torch.tensor([3, -2]), 0, 0), ValueError, "block must be in 0..4294967295, got values in -2..3"),
        ((0, 0, 0, torch.tensor([0.5])), TypeError, "sample must be an int or an integer tensor, got torch.float32"),
        ((0, torch.arange(2), torch.arange(3), 0), ValueError, "must broadcast"),
    ],
    ids=["float seed", "negative seed", "large seed", "large position", "negative block", "float sample", "shapes"],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        philox.uint32(*arguments)
