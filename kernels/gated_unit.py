"""The gated activation unit and its gradient, in one pass each; `fastgen.ops.gated_unit` is the definition.

With z = e^-|b| and r = 1 / (1 + z) the gate is r where b is positive, else z r, and its slope z r^2: nothing cancels.
The same of 2a gives tanh and its slope 4 z r^2.  Storage is float32, float16 or bfloat16, arithmetic float32.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgen._layouts import arranged, empty, planar
from fastgen.kernels.elementary import decay, reciprocal, tanh_given
from fastgen.kernels.launch import device_of, launched_directly
from fastgen.kernels.rows import corner, read, tile, tiling, write

_WARPS = 4
_ANY = ["rows", "tiles"]


@triton.jit
def _gate(b):
    """Sigmoid and its slope."""
    z = decay(b)
    r = reciprocal(1.0 + z)
    small = z * r
    return tl.where(b < 0, small, r), small * r


@triton.jit
def _act(a, TANH: tl.constexpr):
    """The activation and its slope."""
    if TANH:
        z = decay(2.0 * a)
        r = reciprocal(1.0 + z)
        value, slope = tanh_given(a, z), 4.0 * (z * r) * r
    else:
        value, slope = a, 1.0
    return value, slope


@launched_directly(_WARPS, any_value=_ANY)
@triton.jit(do_not_specialize=_ANY)
def _forward(
    input, residual, out, rows: tl.int64, columns, tiles: tl.int32,
    TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A row of `input` has the columns of a twice, those of b after those of a."""
    first_row, first_column = corner(tiles, ROWS, COLUMNS)
    row, column, inside = tile(first_row, first_column, rows, columns, ROWS, COLUMNS)
    at = row * columns + column
    a, b = read(input, at + row * columns, inside), read(input, at + row * columns + columns, inside)
    y = _act(a, TANH)[0] * _gate(b)[0]
    if residual is not None:
        y += read(residual, at, inside)
    write(out, at, y, inside)


@launched_directly(_WARPS, any_value=_ANY)
@triton.jit(do_not_specialize=_ANY)
def _backward(
    grad, input, out, rows: tl.int64, columns, tiles: tl.int32,
    TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first_row, first_column = corner(tiles, ROWS, COLUMNS)
    row, column, inside = tile(first_row, first_column, rows, columns, ROWS, COLUMNS)
    at = row * columns + column
    of_a = at + row * columns
    g, a, b = read(grad, at, inside), read(input, of_a, inside), read(input, of_a + columns, inside)
    act, act_slope = _act(a, TANH)
    gate, gate_slope = _gate(b)
    write(out, of_a, g * gate * act_slope, inside)
    write(out, of_a + columns, g * act * gate_slope, inside)


def forward(input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    planes = planar(input)
    input = arranged(input, planes)
    count, channels, *size = input.shape
    out = empty(input, (count, channels // 2, *size), planes)
    _launch(_forward, out, planes, activation, input, None if residual is None else arranged(residual, planes), out)
    return out


def backward(grad: Tensor, input: Tensor, activation: str) -> Tensor:
    planes = planar(input)
    grad, input = arranged(grad, planes), arranged(input, planes)
    out = empty(input, input.shape, planes)
    _launch(_backward, grad, planes, activation, grad, input, out)
    return out


def _launch(kernel: Any, half: Tensor, planes: bool, activation: str, *tensors: Tensor | None) -> None:
    """`half`: a tensor of the output's shape."""
    if half.numel() == 0:
        return
    columns = math.prod(half.shape[1:]) if planes else half.shape[1]
    grid, sizes = tiling(half.numel() // columns, columns)
    with device_of(half):
        kernel[lambda _: grid](*tensors, **sizes, TANH=activation == "tanh")
