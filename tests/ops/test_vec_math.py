"""The vectorised elementary functions of the native kernels, against numpy in higher precision."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastgen import backends
from tests.instruction_sets import FUSED, ISAS, chosen

EXACT = {
    "exp": np.exp,
    "exp_flushed": np.exp,
    "lack": lambda x: -np.expm1(x),
    "log": np.log,
    "sigmoid": lambda x: np.where(x < 0, np.exp(np.minimum(x, 0)), 1) / (1 + np.exp(-np.abs(x))),
    "tanh": np.tanh,
    "erf": np.vectorize(math.erf),
}
ULPS = {
    "exp": 1.1,
    "exp_flushed": 1.1,
    "lack": 1.5,
    "log": 0.9,
    "sigmoid": 2.4,
    "tanh": 1.4,
    "erf": 1.4,
}  # as csrc/cpu/vec_math.h says
functions = pytest.mark.parametrize("name", EXACT)


def call(name, x):
    y = np.full(x.size + 1, np.nan, x.dtype)
    getattr(backends.native_cpu(), f"{name}_{x.dtype}")(x.ctypes.data, y.ctypes.data, x.size)
    assert np.isnan(y[-1]), "wrote beyond the end"
    return y[:-1]


def arguments(name):
    """Floats of every size, and plenty where the functions bend."""
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, 20001, dtype=np.uint64).astype(np.uint32).view(np.float32)
    parts = (bits[np.isfinite(bits)], generator.normal(0, 4, 20001), generator.uniform(-110, 95, 20001))
    if name == "log":
        parts = (*map(np.abs, parts), 1 + generator.normal(0, 1e-3, 20001), generator.uniform(0.5, 2, 20001))
    x = np.concatenate(parts).astype(np.float32)
    return np.minimum(x, 88) if name in ("exp_flushed", "lack") else x


@functions
def test_errors_in_units_in_the_last_place(name, isa):
    x = arguments(name)
    with np.errstate(over="ignore", under="ignore"):
        exact = EXACT[name](x.astype(np.float64))
        largest = float(np.finfo(np.float32).max)
        overflow = exact > largest
        y = call(name, x)
    if name == "exp_flushed":
        tiny = exact < 2.0**-126
        assert (np.abs(y[tiny]) < 2.0**-126).all()
        exact[tiny] = y[tiny]
    assert np.isinf(y[overflow & (exact > 1.0001 * largest)]).all()
    unit = np.spacing(np.abs(exact[~overflow]).astype(np.float32)).astype(np.float64)
    assert (np.abs(y[~overflow] - exact[~overflow]) / unit).max() <= ULPS[name]


@functions
def test_float64(name, isa):
    x = arguments(name).astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        np.testing.assert_allclose(call(name, x), EXACT[name](x), rtol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_special_values(dtype, isa):
    x = np.array([-np.inf, -1e30, -0.0, 0.0, 1e30, np.inf, np.nan], dtype)
    assert call("exp_flushed", x)[[0, 1]].tolist() == [0, 0]
    assert call("lack", x)[[0, 1]].tolist() == [1, 1]
    for name, expected in {
        "exp": [0, 0, 1, 1, np.inf, np.inf, np.nan],
        "log": [np.nan, np.nan, -np.inf, -np.inf, np.log(np.asarray(1e30, dtype)), np.inf, np.nan],
        "sigmoid": [0, 0, 0.5, 0.5, 1, 1, np.nan],
        "tanh": [-1, -1, -0.0, 0, 1, 1, np.nan],
        "erf": [-1, -1, -0.0, 0, 1, 1, np.nan],
    }.items():
        y = call(name, x)
        np.testing.assert_array_equal(y, np.array(expected, dtype))
        assert np.signbit(y[2]) == (name in ("log", "tanh", "erf"))


@functions
def test_bits_depend_on_the_value_alone(name):
    x = arguments(name)[:1003]
    for isas in (ISAS[:1], FUSED):
        with chosen(isas[0]):
            whole = call(name, x)
        for isa in isas:
            with chosen(isa):
                for start, count in [(0, 1003), (1, 1), (3, 8), (7, 15), (500, 33), (5, 0)]:
                    np.testing.assert_array_equal(call(name, x[start : start + count]), whole[start : start + count])
