"""The nearest code of every vector: a matrix product of which no element is stored.

`fastgen.ops.nearest_code` is the definition.  A program has some positions, meets the codes tile by tile and keeps, for
each position, the best score so far and its index.  The code of the largest ``x . e - |e|^2 / 2`` is the nearest; only
a larger score replaces another, so that the first of equal ones stays.  Sums are float32, and products of float32 have
its precision, whatever was asked for: TF32 would choose other codes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.launch import device_of, launched_directly, tuned

_FEATURES = {4: 32, 2: 64}  # of a step, by bytes of an element
_NORMS = 16  # codes of a program that finds norms
_INFINITY = tl.constexpr(float("inf"))


def _tiles(*tiles: tuple[int, int, int, int]) -> list[triton.Config]:
    """Of (positions, codes, warps, stages)."""
    return [
        triton.Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps, num_stages=stages)
        for rows, columns, warps, stages in tiles
    ]


_FULL = _tiles((64, 64, 8, 3), (64, 32, 4, 3))
_HALF = _tiles((128, 64, 8, 3), (64, 64, 4, 4))  # 128 codes take 254 registers on sm_80


def _configs(vectors: Tensor, *_: Any, **__: Any) -> list[triton.Config]:
    return _FULL if vectors.dtype == torch.float32 else _HALF


def _kind(vectors: Tensor, codebook: Tensor, *_: Any, **__: Any) -> Any:
    """Calls of a kind share a tile: alike, with at most four times the positions."""
    return vectors.dtype, codebook.shape, vectors.numel().bit_length() // 2


@launched_directly()
@triton.jit
def _half_norms(codebook, out, K, OF_CODE, OF_FEATURE, D: tl.constexpr, CODES: tl.constexpr, FEATURES: tl.constexpr):
    k = tl.program_id(0) * CODES + tl.arange(0, CODES)
    d = tl.arange(0, FEATURES)
    squares = tl.zeros([CODES, FEATURES], tl.float32)
    for first in range(0, D, FEATURES):
        inside = (k < K)[:, None] & (first + d < D)[None, :]
        at = codebook + k.to(tl.int64)[:, None] * OF_CODE + (first + d).to(tl.int64)[None, :] * OF_FEATURE
        e = tl.load(at, inside, 0.0).to(tl.float32)
        squares += e * e
    tl.store(out + k, tl.sum(squares, 1) * 0.5, k < K)


@tuned(_configs, _kind)
@triton.jit
def _nearest(
    vectors, codebook, half_norms, out, COUNT, AREA, K, OF_IMAGE, OF_FEATURE, OF_POSITION, OF_CODE, OF_ELEMENT,
    D: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of ROWS of COUNT positions. Elements of a code are OF_ELEMENT apart."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column, d = tl.arange(0, COLUMNS), tl.arange(0, FEATURES)
    exists = (row < COUNT)[:, None]
    of_vector = vectors + (row // AREA * OF_IMAGE + row % AREA * OF_POSITION)[:, None]
    of_feature = d.to(tl.int64)[None, :] * OF_FEATURE
    of_element = d.to(tl.int64)[:, None] * OF_ELEMENT
    finite = tl.full([ROWS], 1, tl.int32)
    for start in range(0, D, FEATURES):
        far = tl.cast(start, tl.int64)
        x = tl.load(of_vector + (far * OF_FEATURE + of_feature), exists & (d < D - start)[None, :], 0.0)
        finite = tl.minimum(finite, tl.min((tl.abs(x.to(tl.float32)) < _INFINITY).to(tl.int32), 1))
    best = tl.full([ROWS], -_INFINITY, tl.float32)
    index = tl.zeros([ROWS], tl.int32)
    for first in range(0, K, COLUMNS):
        k = first + column
        of_code = codebook + k.to(tl.int64)[None, :] * OF_CODE
        score = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, D, FEATURES):
            rest, far = d < D - start, tl.cast(start, tl.int64)
            x = tl.load(of_vector + (far * OF_FEATURE + of_feature), exists & rest[None, :], 0.0)
            e = tl.load(of_code + (far * OF_ELEMENT + of_element), rest[:, None] & (k < K)[None, :], 0.0)
            score = tl.dot(x, e, score, input_precision="ieee")
        score -= tl.load(half_norms + k, k < K, _INFINITY)[None, :]
        score = tl.where(score == score, score, -_INFINITY)
        most, at = tl.max(score, 1, return_indices=True)  # the first of equal ones
        index = tl.where(most > best, first + at, index)
        best = tl.maximum(most, best)
    tl.store(out + row, tl.where(finite > 0, index, 0).to(tl.int64), row < COUNT)


def nearest_code(input: Tensor, codebook: Tensor) -> Tensor:
    out = torch.empty((input.shape[0], *input.shape[2:]), dtype=torch.int64, device=input.device)
    if out.numel() == 0:
        return out
    vectors = input.flatten(2) if input.dim() > 2 else input.unsqueeze(2)
    count, (codes, depth) = out.numel(), codebook.shape
    half_norms = torch.empty(codes, dtype=torch.float32, device=input.device)
    constants = {"D": depth, "FEATURES": _FEATURES[input.element_size()]}
    with device_of(input):
        _half_norms[lambda _: (-(-codes // _NORMS),)](
            codebook, half_norms, codes, *codebook.stride(), **constants, CODES=_NORMS
        )
        _nearest[lambda options: (-(-count // options["ROWS"]),)](
            vectors, codebook, half_norms, out, count, vectors.shape[2], codes, *vectors.stride(), *codebook.stride(),
            **constants,
        )  # fmt: skip
    return out
