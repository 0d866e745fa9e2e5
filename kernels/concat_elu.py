"""ELU of features and of their negatives with dropout, and the gradient; `fastgen.ops.concat_elu` is the definition.

One of elu(v) and elu(-v) is |v|, the other e^-|v| - 1: one exponential does for both, and in the gradient for both
slopes, 1 and e^-|v|.  A launch serves one of the inputs.  Storage is float32, float16 or bfloat16, arithmetic float32.

Which outputs of a pixel are dropped is drawn in registers, in the forward pass and again in the backward pass.  A draw
of Philox decides about eight features of the F: 4q .. 4q + 3 and, with B = 8 ceil(F / 64), those of quad q + B.  Where
B is half of the quads these are four features and their own negatives ("pairs": F is a multiple of 64); else four
features take a draw, and their negatives another ("quads"), or, where they are not in whole quads, each a draw of its
own ("features").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgen._layouts import arranged, empty, planar
from fastgen.kernels.elementary import decay, expm1_given
from fastgen.kernels.launch import device_of, launched_directly
from fastgen.kernels.philox import philox
from fastgen.kernels.rows import corner, read, tile, tiling, write

_WARPS = 4
_HALVES = 1 << 16
_ANY = ["seed", "dropped", "area", "blocks", "rows", "tiles"]


@triton.jit
def _kept(
    seed, dropped, first_row, feature, negative, area, blocks,
    DRAWN: tl.constexpr, NEGATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Whether the features from `feature` on of this program's pixels are kept, and those from `negative` on."""
    first_sample = first_row // area
    pixel = (first_row - first_sample * area).to(tl.uint32) + tl.arange(0, ROWS)[:, None].to(tl.uint32)
    later = pixel // area.to(tl.uint32)
    pixel -= later * area.to(tl.uint32)
    sample = first_sample + later.to(tl.int64)
    feature, negative = feature.to(tl.int32), negative.to(tl.int32)
    dropped = dropped.to(tl.uint32)
    if DRAWN == "pairs":
        quad = feature // 4 + tl.arange(0, COLUMNS // 4)[None, :]
        b0, b1, b2, b3 = _draw(seed, quad, pixel, sample)
        kept, negative_kept = _halves(b0, b1) >= dropped, _halves(b2, b3) >= dropped
    else:
        kept = _bits(seed, feature, pixel, sample, blocks, DRAWN, COLUMNS) >= dropped
        negative_kept = kept
        if NEGATE:
            negative_kept = _bits(seed, negative, pixel, sample, blocks, DRAWN, COLUMNS) >= dropped
    return kept, negative_kept


@triton.jit
def _bits(seed, feature, pixel, sample, blocks, DRAWN: tl.constexpr, COLUMNS: tl.constexpr):
    """The 16 bits that decide about each of the features from `feature` on."""
    if DRAWN == "quads":
        quad = feature // 4 + tl.arange(0, COLUMNS // 4)[None, :]
    else:
        feature += tl.arange(0, COLUMNS)[None, :]
        quad = feature // 4
    second = quad >= blocks
    b0, b1, b2, b3 = _draw(seed, tl.where(second, quad - blocks, quad), pixel, sample)
    low, high = tl.where(second, b2, b0), tl.where(second, b3, b1)
    if DRAWN == "quads":
        bits = _halves(low, high)
    else:
        word = tl.where((feature & 2) != 0, high, low)
        bits = tl.where((feature & 1) != 0, word >> 16, word & 0xFFFF)
    return bits


@triton.jit
def _draw(seed, block, pixel, sample):
    low, high = sample.to(tl.uint32), (sample >> 32).to(tl.uint32)
    block = block.to(tl.uint32)
    zero = low * 0 + block * 0
    return philox(seed, zero + block, zero + pixel, zero + low, zero + high)


@triton.jit
def _halves(low, high):
    """Two words [..., Q] as four numbers of 16 bits each: [..., 4 * Q]."""
    return tl.interleave(tl.interleave(low & 0xFFFF, high & 0xFFFF), tl.interleave(low >> 16, high >> 16))


@launched_directly(_WARPS, any_value=_ANY)
@triton.jit(do_not_specialize=_ANY)
def _forward(
    input, out, seed: tl.int64, dropped: tl.int32, scale, area: tl.int64, blocks: tl.int32,
    first, width, rows: tl.int64, columns, tiles: tl.int32,
    DRAWN: tl.constexpr, NEGATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A row of `out` has `width` columns, then as many for the negatives; those of this input begin at `first`."""
    first_row, first_column = corner(tiles, ROWS, COLUMNS)
    row, column, inside = tile(first_row, first_column, rows, columns, ROWS, COLUMNS)
    x = read(input, row * columns + column, inside)
    feature = first_column + first
    if DRAWN != "nothing":  # while it is loaded
        kept, negative_kept = _kept(
            seed, dropped, first_row, feature, feature + width, area, blocks, DRAWN, NEGATE, ROWS, COLUMNS
        )
    below = expm1_given(-tl.abs(x), decay(x))
    to = row * width + (column + first)
    if NEGATE:
        to += row * width
        z = tl.where(x < 0, -x, below)
        if DRAWN != "nothing":
            z = tl.where(negative_kept, z * scale, 0.0)
        write(out, to + width, z, inside)
    y = tl.where(x > 0, x, below)
    if DRAWN != "nothing":
        y = tl.where(kept, y * scale, 0.0)
    write(out, to, y, inside)


@launched_directly(_WARPS, any_value=_ANY)
@triton.jit(do_not_specialize=_ANY)
def _backward(
    grad, input, out, seed: tl.int64, dropped: tl.int32, scale, area: tl.int64, blocks: tl.int32,
    first, width, rows: tl.int64, columns, tiles: tl.int32,
    DRAWN: tl.constexpr, NEGATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`grad` as the result of the forward pass."""
    first_row, first_column = corner(tiles, ROWS, COLUMNS)
    row, column, inside = tile(first_row, first_column, rows, columns, ROWS, COLUMNS)
    at = row * columns + column
    of = row * width + (column + first)
    if NEGATE:
        of += row * width
    x, g = read(input, at, inside), read(grad, of, inside)
    if NEGATE:
        h = read(grad, of + width, inside)
    feature = first_column + first
    if DRAWN != "nothing":
        kept, negative_kept = _kept(
            seed, dropped, first_row, feature, feature + width, area, blocks, DRAWN, NEGATE, ROWS, COLUMNS
        )
        g = tl.where(kept, g * scale, 0.0)
        if NEGATE:
            h = tl.where(negative_kept, h * scale, 0.0)
    slope = decay(x)
    result = g * tl.where(x > 0, 1.0, slope)
    if NEGATE:
        result -= h * tl.where(x < 0, 1.0, slope)
    write(out, at, result, inside)


def forward(inputs: Sequence[Tensor], negate: bool, dropout: float, seed: int) -> Tensor:
    planes, inputs = _arranged(inputs, dropout)
    count, _, *size = inputs[0].shape
    channels = sum(x.shape[1] for x in inputs) * (2 if negate else 1)
    out = empty(inputs[0], (count, channels, *size), planes)
    _launch(_forward, [(x, out) for x in inputs], inputs, planes, negate, dropout, seed)
    return out


def backward(grad: Tensor, inputs: Sequence[Tensor], negate: bool, dropout: float, seed: int) -> list[Tensor]:
    planes, inputs = _arranged(inputs, dropout)
    grad = arranged(grad, planes)
    outs = [empty(x, x.shape, planes) for x in inputs]
    tensors = [(grad, x, out) for x, out in zip(inputs, outs, strict=True)]
    _launch(_backward, tensors, inputs, planes, negate, dropout, seed)
    return outs


def _arranged(inputs: Sequence[Tensor], dropout: float) -> tuple[bool, list[Tensor]]:
    """With dropout all is channels-last, as random numbers are drawn."""
    planes = not dropout and planar(*inputs)
    return planes, [arranged(x, planes) for x in inputs]


def _launch(
    kernel: Any, tensors: Sequence[tuple[Tensor, ...]], inputs: Sequence[Tensor], planes: bool,
    negate: bool, dropout: float, seed: int,
) -> None:  # fmt: skip
    """Of an input after the other, with its tensors."""
    if inputs[0].numel() == 0:
        return
    area = math.prod(inputs[0].shape[2:])
    channels = sum(x.shape[1] for x in inputs)
    dropped = round(dropout * _HALVES)
    blocks = 8 * -(-channels * (2 if negate else 1) // 64)
    along = area if planes else 1  # columns of a channel
    first = 0
    with device_of(inputs[0]):
        for x, of_x in zip(inputs, tensors, strict=True):
            columns = x.shape[1] * along
            grid, sizes = tiling(x.numel() // columns, columns)
            kernel[lambda _, grid=grid: grid](
                *of_x, seed, dropped, _HALVES / (_HALVES - dropped), area, blocks, first * along, channels * along,
                **sizes, DRAWN=_drawn(dropped, first, channels, blocks, negate), NEGATE=negate,
            )  # fmt: skip
            first += x.shape[1]


def _drawn(dropped: int, first: int, channels: int, blocks: int, negate: bool) -> str:
    """What a draw serves of an input whose features begin at `first`."""
    if not dropped:
        return "nothing"
    if first % 4 or (negate and channels % 4):
        return "features"
    return "pairs" if negate and channels == 4 * blocks else "quads"
