"""Reparameterised samples and their divergence in one pass; `fastgen.ops.reparameterize` is the definition.

    z[s, n, d] = mu[n, d] + sigma[n, d] eps[s, n, d],   sigma = exp(logvar / 2),
    kl[n] = 1/2 sum over d of (mu^2 + exp(logvar) - 1 - logvar),

a logvar above 80 counting as that.  The noise eps is made in registers, in the forward pass and again in the backward
pass.  A program has a tile of rows and columns; rows of several tiles give several partial sums of kl.  Storage is
float32, float16 or bfloat16, arithmetic float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.elementary import exp_beyond_tangent, exp_bounded
from fastgen.kernels.launch import device_of, launched_directly
from fastgen.kernels.philox import normals

_TILE = 1024  # elements of a program
_WARPS = 4
_MAX_LOGVAR = tl.constexpr(80.0)


@triton.jit
def _tile(N, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr):
    """Rows [ROWS, 1] and columns [1, COLUMNS] of this program, which of them exist: all of WHOLE tiles; and the number
    of its part of these rows.
    """
    parts = (D + COLUMNS - 1) // COLUMNS  # on one axis of the grid with the rows: others end at 65,535
    part = tl.program_id(0) % parts
    row = (tl.program_id(0) // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = part * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = tl.full([ROWS, COLUMNS], True, tl.int1) if WHOLE else (row < N) & (column < D)
    return row, column, inside, part


@triton.jit
def _noise(seed, start, draw, row, part, COLUMNS: tl.constexpr):
    """Noise of this program's tile: [ROWS, COLUMNS]."""
    position = part * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)[None, :]
    return normals(seed, draw, position, start + row)


@launched_directly(_WARPS, any_value=("seed", "start"))
@triton.jit(do_not_specialize=["seed", "start"])
def _forward(
    mu, logvar, z, kl, seed: tl.int64, start: tl.int64, N, D, mu_row, logvar_row, draws,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row, column, inside, part = _tile(N, D, ROWS, COLUMNS, WHOLE)
    m = tl.load(mu + row * mu_row + column, inside, 0.0).to(tl.float32)
    lv = tl.load(logvar + row * logvar_row + column, inside, 0.0).to(tl.float32)
    eps = _noise(seed, start, 0, row, part, COLUMNS)  # while they are loaded
    lv = tl.minimum(lv, _MAX_LOGVAR, propagate_nan=tl.PropagateNan.ALL)
    sigma = exp_bounded(0.5 * lv)
    to = z + row * D + column
    tl.store(to, tl.fma(sigma, eps, m).to(z.dtype.element_ty), inside)
    for draw in range(1, draws):
        eps = _noise(seed, start, draw, row, part, COLUMNS)
        tl.store(to + tl.cast(draw, tl.int64) * N * D, tl.fma(sigma, eps, m).to(z.dtype.element_ty), inside)
    share = 0.5 * tl.sum(m * m + exp_beyond_tangent(lv, sigma * sigma), 1)  # 0 where there is no element
    rows = tl.reshape(row, [ROWS])
    tl.store(kl + part.to(tl.int64) * N + rows, share, rows < N)


@launched_directly(_WARPS, any_value=("seed", "start"))
@triton.jit(do_not_specialize=["seed", "start"])
def _backward(
    grad_z, grad_kl, mu, logvar, grad_mu, grad_logvar, seed: tl.int64, start: tl.int64,
    N, D, mu_row, logvar_row, grad_kl_row, draws,
    HAS_Z: tl.constexpr, HAS_KL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row, column, inside, part = _tile(N, D, ROWS, COLUMNS, WHOLE)
    m = tl.load(mu + row * mu_row + column, inside, 0.0).to(tl.float32)
    given = tl.load(logvar + row * logvar_row + column, inside, 0.0).to(tl.float32)
    lv = tl.minimum(given, _MAX_LOGVAR, propagate_nan=tl.PropagateNan.ALL)
    sigma = exp_bounded(0.5 * lv)
    by_mu = tl.zeros([ROWS, COLUMNS], tl.float32)
    by_logvar = tl.zeros([ROWS, COLUMNS], tl.float32)
    if HAS_Z:
        for draw in range(draws):
            eps = _noise(seed, start, draw, row, part, COLUMNS)
            g = tl.load(grad_z + (tl.cast(draw, tl.int64) * N + row) * D + column, inside, 0.0).to(tl.float32)
            by_mu += g
            by_logvar += g * eps
        by_logvar *= sigma
    if HAS_KL:
        g = tl.load(grad_kl + row * grad_kl_row, row < N, 0.0).to(tl.float32)
        by_mu += g * m
        by_logvar += g * (exp_beyond_tangent(lv, sigma * sigma) + lv)
    by_logvar = tl.where(given > _MAX_LOGVAR, 0.0, 0.5 * by_logvar)
    at = row * D + column
    tl.store(grad_mu + at, by_mu.to(grad_mu.dtype.element_ty), inside)
    tl.store(grad_logvar + at, by_logvar.to(grad_logvar.dtype.element_ty), inside)


def forward(mu: Tensor, logvar: Tensor, seed: int, start: int, draws: int) -> tuple[Tensor, Tensor]:
    """z and kl, float32, of mu and logvar [N, ...]; draws = 0 is one draw without a dimension of its own."""
    count, size = mu.shape[0], math.prod(mu.shape[1:])
    options = {"dtype": torch.float32, "device": mu.device}
    z = torch.empty((*([draws] if draws else []), *mu.shape), **options)
    if mu.numel() == 0:
        return z, torch.zeros(count, **options)
    mu, mu_row = _dense_rows(mu, size)
    logvar, logvar_row = _dense_rows(logvar, size)
    programs, parts, tile = _tiling(count, size)
    shares = torch.empty(parts, count, **options)
    with device_of(mu):
        _forward[lambda _: (programs,)](
            mu, logvar, z, shares, seed, start, count, size, mu_row, logvar_row, max(1, draws), **tile
        )
    return z, shares[0] if parts == 1 else shares.sum(0)


def backward(
    grad_z: Tensor | None, grad_kl: Tensor | None, mu: Tensor, logvar: Tensor, seed: int, start: int, draws: int
) -> tuple[Tensor, Tensor]:
    """Gradients of mu and logvar, dense and in their dtype."""
    count, size = mu.shape[0], math.prod(mu.shape[1:])
    grads = [torch.empty(mu.shape, dtype=mu.dtype, device=mu.device) for _ in range(2)]
    if mu.numel() == 0:
        return grads[0], grads[1]
    mu, mu_row = _dense_rows(mu, size)
    logvar, logvar_row = _dense_rows(logvar, size)
    programs, _, tile = _tiling(count, size)
    grad_z_or_any = mu if grad_z is None else grad_z.contiguous()
    grad_kl_or_any, grad_kl_row = (mu, 0) if grad_kl is None else (grad_kl, grad_kl.stride(0))
    with device_of(mu):
        _backward[lambda _: (programs,)](
            grad_z_or_any, grad_kl_or_any, mu, logvar, *grads, seed, start,
            count, size, mu_row, logvar_row, grad_kl_row, max(1, draws),
            HAS_Z=grad_z is not None, HAS_KL=grad_kl is not None, **tile,
        )  # fmt: skip
    return grads[0], grads[1]


def _tiling(count: int, size: int) -> tuple[int, int, dict[str, Any]]:
    """Programs, parts of a row and the tile: a program has whole rows where they are short, else a part of one."""
    columns = min(_TILE, max(4, 1 << (size - 1).bit_length()))
    rows = _TILE // columns
    whole = count % rows == 0 and size % columns == 0
    tile = {"ROWS": rows, "COLUMNS": columns, "WHOLE": whole}
    parts = -(-size // columns)
    return -(-count // rows) * parts, parts, tile


def _dense_rows(tensor: Tensor, size: int) -> tuple[Tensor, int]:
    """A tensor whose rows are dense, and the elements from one row to the next; halves of a batch need no copy."""
    if not (tensor.is_contiguous() or tensor[0].is_contiguous()):
        tensor = tensor.contiguous()
    return tensor, tensor.stride(0) if tensor.shape[0] > 1 else size
