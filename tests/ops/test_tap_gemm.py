"""The matrix product under every operation, against numpy and against itself in other pieces."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fastgen import backends
from tests.instruction_sets import FUSED, chosen

WEIGHTS = ["float32", "float64", "bfloat16", "int8"]  # everything else is float32 where the weights are of fewer bits
PANEL = {"float32": 16, "float64": 8, "bfloat16": 16, "int8": 16}
ATOL = {"float32": 2e-5, "float64": 1e-13, "bfloat16": 2e-5, "int8": 2e-5}


def pairs(panels, counts):
    """float32 [panels, K, 16] -> int32 [panels, words, 16]: two k of a tap, rounded to bfloat16, in each word."""
    taps = torch.as_tensor(panels).split(list(counts), 1)
    padded = torch.cat([torch.nn.functional.pad(t, (0, 0, 0, t.shape[1] % 2), value=torch.nan) for t in taps], 1)
    bits = padded.bfloat16().view(torch.int16)
    return torch.stack((bits[:, ::2], bits[:, 1::2]), -1).view(torch.int32).squeeze(-1)


def scaled_bytes(panels, powers, counts):
    """Integers [panels, K, 16] and powers of two [panels, taps, 16] -> uint8 [panels, bytes]: 16 powers of a tap, then
    its integers.
    """
    taps = np.split(panels, np.cumsum(counts)[:-1], 1)
    parts = [(powers[:, i].astype("float32"), tap.astype("int8")) for i, tap in enumerate(taps)]
    return np.concatenate([p.reshape(len(p), -1).view("uint8") for pair in parts for p in map(np.array, pair)], 1)


class Problem:
    """Random taps over one array, weights in panels, and the product in float64."""

    def __init__(self, weights, rows, cols, ks, *, row_stride=7, k_stride=1, packed=True, init=None, seed=0):
        generator = np.random.default_rng(seed)
        self.weights, self.dtype = weights, "float64" if weights == "float64" else "float32"
        packed = packed or weights == "int8"  # which has no other form
        self.rows, self.cols, self.ks, self.packed, self.init = rows, cols, ks, packed, init
        self.row_stride, self.k_stride = row_stride, k_stride
        self.offsets = [5 * t for t in range(len(ks))]
        size = (rows - 1) * row_stride + max((k - 1) * k_stride + o + 1 for k, o in zip(ks, self.offsets, strict=True))
        self.a = generator.standard_normal(max(size, 64)).astype(self.dtype)
        self.b = generator.standard_normal((sum(ks), cols)).astype(self.dtype)
        self.c0 = generator.standard_normal((rows, cols)).astype(self.dtype)
        if weights == "bfloat16":
            self.b = torch.from_numpy(self.b).bfloat16().float().numpy()
        if weights == "int8":
            self.integers = generator.integers(-128, 128, (sum(ks), cols))
            self.powers = 2.0 ** generator.integers(-20, -6, (len(ks), cols))
            self.b = (self.integers * self.powers.repeat(ks, 0)).astype("float32")
        self.pack()

    def pack(self):
        panel = PANEL[self.weights]

        def in_panels(b):
            return np.ascontiguousarray(b.reshape(len(b), b.shape[1] // panel, panel).swapaxes(0, 1))

        def padded(b):
            return np.pad(b, ((0, 0), (0, -self.cols % panel)), constant_values=1)

        wide = padded(self.b)
        self.words = self.ks  # rows of packed weights that a tap has
        if self.weights == "int8":
            self.words = [4 + k for k in self.ks]
            self.packed_b = scaled_bytes(in_panels(padded(self.integers)), in_panels(padded(self.powers)), self.ks)
            self.b_strides = (self.packed_b.shape[1], panel)
            return
        if self.packed:
            wide = in_panels(wide)
        if self.weights == "bfloat16":
            wide = pairs(wide if self.packed else wide[None], self.ks).numpy()
            self.words = [(k + 1) // 2 for k in self.ks]
        self.packed_b = wide
        self.b_strides = (sum(self.words) * panel, panel) if self.packed else (panel, wide.shape[-1])

    def run(self, rows=None, cols=None, col0=0):
        """The product of the given rows and columns (whole panels from col0), in place in a poisoned matrix."""
        rows = range(self.rows) if rows is None else rows
        cols = self.cols if cols is None else cols
        item, stride = self.a.itemsize, self.cols + 3
        out = np.full((self.rows, stride), np.nan, self.dtype)
        init_at, init_stride = 0, 0
        if self.init == "bias":
            init_at = self.c0[0].ctypes.data + col0 * item
        elif self.init == "accumulate":
            out[:, : self.cols] = self.c0
            init_at, init_stride = out[rows[0], col0:].ctypes.data, stride
        b_panel_stride, b_k_stride = self.b_strides
        taps, word = [], 0
        for k, words, offset in zip(self.ks, self.words, self.offsets, strict=True):
            a = self.a.ctypes.data + (offset + rows[0] * self.row_stride) * item
            first = col0 // PANEL[self.weights] * b_panel_stride + word * b_k_stride
            taps.append(
                (a, self.row_stride, self.k_stride, k, self.packed_b.ctypes.data + first * self.packed_b.itemsize)
            )
            word += words
        function = getattr(backends.native_cpu(), f"tap_gemm_{self.weights}")
        c = out[rows[0], col0:].ctypes.data
        function(taps, b_panel_stride, b_k_stride, init_at, init_stride, c, stride, len(rows), cols)
        return out

    def expected(self):
        columns = []
        for k, offset in zip(self.ks, self.offsets, strict=True):
            at = offset + np.arange(self.rows)[:, None] * self.row_stride + np.arange(k) * self.k_stride
            columns.append(self.a[at.astype(int)])
        product = np.concatenate(columns, axis=1).astype("float64") @ self.b.astype("float64")
        start = {None: 0, "bias": self.c0[:1], "accumulate": self.c0}[self.init]
        return product + start


CASES = {
    "one": {"rows": 1, "cols": 1, "ks": [1]},
    "one row, wide": {"rows": 1, "cols": 200, "ks": [9, 4]},
    "exact tiles": {"rows": 12, "cols": 32, "ks": [16]},
    "primes": {"rows": 13, "cols": 37, "ks": [7, 11, 3]},
    "just over tiles": {"rows": 15, "cols": 129, "ks": [5]},
    "many rows": {"rows": 61, "cols": 17, "ks": [3, 0, 2]},
    "no taps reach": {"rows": 3, "cols": 5, "ks": [0, 0]},
    "bias": {"rows": 5, "cols": 21, "ks": [6, 6], "init": "bias"},
    "accumulate": {"rows": 9, "cols": 50, "ks": [4], "init": "accumulate"},
    "strided": {
        "rows": 10,
        "cols": 40,
        "ks": [8, 8],
        "row_stride": 1,
        "k_stride": 10,
        "packed": False,
    },
    "several chunks": {"rows": 6, "cols": 70, "ks": [101, 200, 33], "init": "bias"},
    "rows that coincide": {"rows": 4, "cols": 8, "ks": [3], "row_stride": 0},
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("case", CASES)
def test_against_numpy(case, weights, isa):
    problem = Problem(weights, **CASES[case])
    out, cols = problem.run(), problem.cols
    np.testing.assert_allclose(out[:, :cols], problem.expected(), rtol=0, atol=ATOL[weights])
    assert np.isnan(out[:, cols:]).all(), "wrote beyond the last column"


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("rows", range(1, 17))
def test_every_tile_shape(rows, weights, isa):
    for panels in range(1, 10):
        problem = Problem(weights, rows=rows, cols=panels * PANEL[weights] - 3, ks=[3, 2], init="bias")
        out = problem.run()[:, : problem.cols]
        np.testing.assert_allclose(out, problem.expected(), rtol=0, atol=ATOL[weights])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("init", [None, "bias", "accumulate"])
def test_bits_do_not_depend_on_the_split(init, weights, isa):
    problem = Problem(weights, rows=31, cols=75, ks=[33, 20], init=init)
    whole, panel = problem.run(), PANEL[weights]
    for row, count in [(0, 1), (3, 2), (5, 7), (12, 19), (30, 1)]:
        for col, width in [(0, 75), (0, 5), (panel, 2 * panel), (3 * panel, 75 - 3 * panel)]:
            piece = problem.run(range(row, row + count), width, col)
            region = np.s_[row : row + count, col : col + width]
            np.testing.assert_array_equal(piece[region], whole[region])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_bits_are_the_same_on_every_fused_instruction_set(weights):
    results = []
    for isa, case in itertools.product(FUSED, CASES.values()):
        with chosen(isa):
            problem = Problem(weights, **case)
            results.append((isa, problem.run()[:, : problem.cols]))
    for i, (isa, result) in enumerate(results):
        np.testing.assert_array_equal(result, results[i % len(CASES)][1], err_msg=isa)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_weights_are_the_floats_they_stand_for(case, weights, isa):
    few_bits, float32 = Problem(weights, **CASES[case]), Problem("float32", **CASES[case])
    float32.b = few_bits.b
    float32.pack()
    np.testing.assert_array_equal(few_bits.run(), float32.run())


def test_set_isa_refuses_unknown_names():
    with pytest.raises(ValueError, match="isa must be one of baseline"):
        backends.native_cpu().set_isa("sse9")
