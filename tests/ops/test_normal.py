"""Standard normal numbers: exhaustively over their uniforms, statistically at ten million, and the same everywhere."""

from __future__ import annotations

import importlib
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

import fastgen
from fastgen import backends, ops
from fastgen.ops import philox

module = importlib.import_module("fastgen.ops.normal")
DRAWS = 10_000_000
ULPS = 1.0  # as csrc/cpu/vec_normal.h says


def radius(k):
    result = np.empty(k.size, np.float32)
    backends.native_cpu().normal_radius(k.ctypes.data, result.ctypes.data, k.size)
    return result


def cos_sin(k):
    cosine, sine = np.empty(k.size, np.float32), np.empty(k.size, np.float32)
    backends.native_cpu().normal_cos_sin(k.ctypes.data, cosine.ctypes.data, sine.ctypes.data, k.size)
    return cosine, sine


def ulps(values, exact):
    return (np.abs(values - exact) / np.spacing(np.abs(exact).astype(np.float32))).max()


def test_errors_in_units_in_the_last_place_over_every_uniform():
    k = np.arange(1, 2**24, 2, dtype=np.int32)
    assert ulps(radius(k), np.sqrt(-2 * np.log(k * 2.0**-24))) <= ULPS
    quarter = (k + 2**21) >> 22
    angle = 2 * np.pi * (k - (quarter << 22)) * 2.0**-24  # the rest of the angle: libm sees no cancellation
    c, s = np.cos(angle), np.sin(angle)
    cosine, sine = cos_sin(k)
    assert ulps(cosine, np.choose(quarter % 4, [c, -s, -c, s])) <= ULPS
    assert ulps(sine, np.choose(quarter % 4, [s, c, -s, -c])) <= ULPS


def test_every_instruction_set_and_the_definition_give_the_same_bits(isa):
    generator = np.random.default_rng(0)
    edges = [1, 3, 2**21 - 1, 2**21 + 1, 2**22 + 1, 3 * 2**21 - 1, 2**23 - 1, 2**23 + 1, 2**24 - 1]
    k = np.concatenate([edges, 2 * generator.integers(0, 2**23, 100_000) + 1]).astype(np.int32)
    wide = torch.from_numpy(k).long()
    assert np.array_equal(radius(k), module.normal_radius(wide).numpy())
    for values, expected in zip(cos_sin(k), module.cos_sin(wide), strict=True):
        assert np.array_equal(values, expected.numpy())


@pytest.mark.parametrize(
    ("n", "count"), [(1, 1), (3, 20), (7, 13), (2, 5000), (5, 64), (100, 4), (3, 4096), (33, 127), (2, 1025)]
)
@pytest.mark.parametrize(
    ("seed", "start", "draw"), [(0, 0, 0), (2**64 - 1, 2**32 - 2, 0), (5, 2**61, 2**32 - 1)], ids=str
)
def test_implementations_agree(isa, n, count, seed, start, draw):
    expected = module.normals_reference(n, count, seed, start, draw)
    with fastgen.backend("cpu"):
        assert torch.equal(module.normals(n, count, seed=seed, start=start, draw=draw), expected)


def test_opcheck():
    for args in ((3, 5, 7, 2, 1), (0, 4, -1, 0, 0), (2, 0, 0, 2**40, 3)):
        opcheck(torch.ops.fastgen.normal.default, args)


def test_compiles_as_one_graph_for_many_seeds():
    counter = CompileCounter()
    compiled = torch.compile(lambda n, seed: ops.normal(n, (2, 3), seed=seed, start=n), backend=counter, fullgraph=True)
    for seed in (*range(2, 14), 2**63 - 1):
        assert torch.equal(
            compiled(seed % 5 + 2, seed), ops.normal(seed % 5 + 2, (2, 3), seed=seed, start=seed % 5 + 2)
        )
    assert counter.frame_count <= 2  # the first with numbers written in
    for seed in (0, 1, 2**63, 2**64 - 1):
        assert torch.equal(compiled(2, seed), ops.normal(2, (2, 3), seed=seed, start=2))


def test_by_hand_in_exact_arithmetic_from_the_draw_table():
    values = ops.normal(2, (3, 3), seed=9, start=4)
    assert values.dtype == torch.float32 and values.shape == (2, 3, 3)
    for sample, numbers in enumerate(values.flatten(1).tolist(), start=4):
        for element, value in enumerate(numbers):
            lanes = philox.uniform(9, 0, element // 4, sample).tolist()
            u, v = lanes[2 * (element % 4 // 2) :][:2]
            trigonometric = math.sin if element % 2 else math.cos
            expected = math.sqrt(-2 * math.log(u)) * trigonometric(2 * math.pi * v)
            assert abs(value - expected) <= 3 * np.spacing(np.float32(abs(expected)))


def test_emulated_fma_rounds_once():
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 3000, generator=generator)
    c = torch.where(torch.arange(3000) % 2 == 0, c, -(a * b) * (1 + 2.0**-20))  # cancelling
    for x, y, z, value in zip(a.tolist(), b.tolist(), c.tolist(), module._fma(a, b, c).tolist(), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        neighbours = [float(np.nextafter(np.float32(value), np.float32(side))) for side in (-np.inf, np.inf)]
        assert abs(Fraction(value) - exact) <= min(abs(Fraction(other) - exact) for other in neighbours)


def test_a_number_depends_on_seed_sample_and_element_alone():
    every = ops.normal(50, (13,), seed=1)
    for n, start in ((1, 0), (1, 49), (7, 20), (0, 3)):
        assert torch.equal(ops.normal(n, (13,), seed=1, start=start), every[start : start + n])
    assert torch.equal(ops.normal(50, (3, 2), seed=1).flatten(1), every[:, :6])
    assert torch.equal(ops.normal(50, (), seed=1), every[:, 0])
    assert ops.normal(2, (0,), seed=1).shape == (2, 0)
    assert ops.normal(0, (3,), seed=1).shape == (0, 3)
    assert not torch.equal(ops.normal(50, (13,), seed=2), every)


def test_threads_and_batch_splits_change_no_bit():
    whole = ops.normal(301, (259,), seed=3, start=7)
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            parts = [ops.normal(n, (259,), seed=3, start=7 + first) for first, n in ((0, 100), (100, 1), (101, 200))]
            assert torch.equal(torch.cat(parts), whole)
            assert torch.equal(ops.normal(301, (259,), seed=3, start=7), whole)
    finally:
        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def draws():
    return ops.normal(DRAWS // 1000, (1000,), seed=2)


def test_moments(draws):
    values = draws.double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(values.pow(power).mean() - moment) < 4 * math.sqrt(variance / DRAWS), power


def test_kolmogorov_smirnov(draws):
    expected = torch.special.ndtr(draws.flatten().sort().values.double())
    steps = torch.arange(DRAWS + 1) / DRAWS
    distance = torch.maximum((expected - steps[:-1]).max(), (steps[1:] - expected).max())
    assert distance * math.sqrt(DRAWS) < 1.63  # one run in a hundred is further away


@pytest.mark.parametrize("limit", [2.0, 3.0, 4.0, 4.5, 5.0])
def test_tails(draws, limit):
    """Counts beyond a limit are Poisson; beyond 5, 2.9 are expected on each side."""
    for tail in (draws > limit, draws < -limit):
        expected = DRAWS * 0.5 * math.erfc(limit / math.sqrt(2))
        assert abs(int(tail.sum()) - expected) < 4 * math.sqrt(expected) + 1


def test_neighbours_are_not_correlated(draws):
    """Elements of one Philox draw, of neighbouring draws, and of neighbouring samples."""
    for x, y in [(draws[:, :-lag], draws[:, lag:]) for lag in (1, 2, 3, 4)] + [(draws[:-1], draws[1:])]:
        for power, mean in ((1, 0.0), (2, 1.0)):
            a, b = (v.double().pow(power) - mean for v in (x, y))
            assert abs((a * b).mean()) < 4 * power / math.sqrt(x.numel()), power


def test_the_smallest_uniform_gives_the_largest_number():
    assert 5.76 < radius(np.array([1], np.int32))[0] < 5.78


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n": -1}, ValueError, "n must be in 0"),
        ({"n": 1.0}, TypeError, "n must be an integer, got float"),
        ({"shape": (2, -1)}, ValueError, "shape must be in 0"),
        ({"start": 2**62}, ValueError, "start must be in 0"),
        ({"seed": -1}, ValueError, "seed must be in 0"),
    ],
    ids=str,
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.normal(**{"n": 1, "shape": (2,), **arguments})
