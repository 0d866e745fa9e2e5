"""The tap-GEMM: convolutions as matrix products over the few positions that a kernel really reads, channels last.

    conv:        out[n, y, x, m] = sum over i, j, k of  image[n, s y + i - p, s x + j - p, k] weight[i, j, k, m]
    transposed:  out[n, s y + i - p, s x + j - p, m] = sum over them of  image[n, y, x, k] weight[i, j, k, m]

The transposed one is computed per output phase (y mod s, x mod s): a phase reads every s-th tap, so no zero is ever
multiplied.  Of stride 1, taps may be left out from the end (raster order): those that a mask closes.  Rows of the
product are output positions, its sum runs over taps and blocks of channels in one loop.  All programs sum in that
order, whatever their tile.

`weight_gradient` is the third product of a convolution, that of its two images; rows are then what is summed over.

Images and results are float32, float16 or bfloat16 [N, C, H, W] in channels-last memory; sums are float32.  A float32
product has the precision of float32, unless TF32 was asked for by ``torch.set_float32_matmul_precision``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.elementary import exp, expm1, tanh
from fastgen.kernels.launch import INTERPRETED, device_of, tuned

_MAX_ROWS = 2**31 - 2**10
_MIN_TILE = 16 if INTERPRETED else 64  # rows; of the configurations below
_PACK = 1024  # elements of a program that packs
_SPLIT_PROGRAMS = 512  # how many a weight gradient is split into: a few for each multiprocessor of a large GPU
_SPLIT_ROWS = 512  # that a split has at least


class Taps(NamedTuple):
    """Geometry of a convolution, or of the transposed one."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    open: int  # taps that are read, in raster order


class Mask(NamedTuple):
    """Which channels the last open tap connects: source colour < (strict) or <= reader colour."""

    colors: int
    part: int  # reader channels that hold all the colours once
    strict: bool


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, parameter):
    if ACTIVATION == "relu":
        x = tl.where(x > 0, x, 0.0)
    elif ACTIVATION == "leaky_relu":
        x = tl.where(x > 0, x, x * parameter)
    elif ACTIVATION == "elu":
        x = tl.where(x > 0, x, parameter * expm1(x))
    elif ACTIVATION == "tanh":
        x = tanh(x)
    elif ACTIVATION == "sigmoid":
        x = 1.0 / (1.0 + exp(-x))
    return x


@triton.jit
def normalise(x, mean, var, gamma, beta, eps, m, inside):
    """BatchNorm of [rows, channels] by given statistics, of the channels m."""
    scale = 1.0 / tl.sqrt_rn(tl.load(var + m, inside, 1.0).to(tl.float32) + eps)
    if gamma is not None:
        scale *= tl.load(gamma + m, inside, 0.0).to(tl.float32)
    x = (x - tl.load(mean + m, inside, 0.0).to(tl.float32)[None, :]) * scale[None, :]
    if beta is not None:
        x += tl.load(beta + m, inside, 0.0).to(tl.float32)[None, :]
    return x


def _tiles(*tiles: tuple[int, int, int, int]) -> list[triton.Config]:
    """Of (rows, columns, warps, stages)."""
    return [
        triton.Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps, num_stages=stages)
        for rows, columns, warps, stages in tiles
    ]


_HALF = _tiles((128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 4), (64, 16, 4, 3))
_FULL = _tiles((64, 64, 8, 2), (64, 32, 8, 2), (64, 16, 4, 2))
_GRADIENT = _tiles((64, 64, 4, 3), (64, 32, 4, 3), (64, 16, 4, 3))


def _fitting(configs: list[triton.Config], columns: int) -> list[triton.Config]:
    """Without tiles that are mostly beyond the columns: at most three, wide ones first."""
    most = max(16, triton.next_power_of_2(columns))
    return [config for config in configs if config.kwargs["COLUMNS"] <= most][:3]


def _prune(configs: list[triton.Config], args: dict[str, Any], **_: Any) -> list[triton.Config]:
    return _fitting(_FULL if args["image"].dtype == torch.float32 else _HALF, args["CO"])


def _prune_gradient(configs: list[triton.Config], args: dict[str, Any], **_: Any) -> list[triton.Config]:
    return _fitting(_GRADIENT, args["CB"])


@tuned(_HALF + _FULL, ["CI", "CO", "OH"], _prune, zero=["sums", "squares", "counts"])
@triton.jit
def _tap_gemm(
    image, weight, out, bias, mean, var, gamma, beta, sums, squares, counts, parameter, eps,
    N, IH, IW, OH, OW, CI, CO, GH, GW, OPEN,
    TRANSPOSED: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[row, m] of one tile; weight is [taps, CI, CO]. Rows are positions of the grid [N, GH, GW] of a phase."""
    tiles = tl.cdiv(CO, COLUMNS)
    block = tl.program_id(0) // tiles
    row = block * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    gx = row % GW
    gy = row // GW % GH
    n = row // (GW * GH)
    if TRANSPOSED:
        ry = tl.program_id(1) // SW
        rx = tl.program_id(1) % SW
        ky, kx = (ry + PH) % SH, (rx + PW) % SW  # the first tap of the phase
        across = (KW - kx + SW - 1) // SW  # 0 where the stride is wider than the kernel
        taps = tl.minimum((KH - ky + SH - 1) // SH * across, OPEN)
        y, x = gy + (ry + PH) // SH, gx + (rx + PW) // SW
        oy, ox = gy * SH + ry, gx * SW + rx
    else:
        ky, kx = 0, 0
        across = KW
        taps = OPEN
        y, x = gy * SH - PH, gx * SW - PW
        oy, ox = gy, gx
    exists = (n < N) & (oy < OH) & (ox < OW)
    from_row = image + ((n.to(tl.int64) * IH + y) * IW + x) * CI
    blocks = tl.cdiv(CI, CHANNELS)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(taps * blocks):
        tap = step // blocks
        k = step % blocks * CHANNELS + tl.arange(0, CHANNELS)
        dy, dx = tap // tl.maximum(across, 1), tap % tl.maximum(across, 1)
        if TRANSPOSED:
            t = (ky + dy * SH) * KW + kx + dx * SW
            dy, dx = -dy, -dx
        else:
            t = tap
        inside = exists & (y + dy >= 0) & (y + dy < IH) & (x + dx >= 0) & (x + dx < IW)
        shift = (dy * IW + dx).to(tl.int64) * CI
        of_image = inside[:, None] if EVEN else inside[:, None] & (k < CI)[None, :]
        of_weight = (m < CO)[None, :] if EVEN else (k < CI)[:, None] & (m < CO)[None, :]
        a = tl.load(from_row[:, None] + (shift + k[None, :]), of_image, 0.0)
        b = tl.load(weight + (t * CI + k)[:, None] * CO + m[None, :], of_weight, 0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    if bias is not None:
        acc += tl.load(bias + m, m < CO, 0.0).to(tl.float32)[None, :]
    if sums is not None:  # of what is stored; the merging needs them per block: sum, sum of squares about its mean
        acc = acc.to(out.dtype.element_ty).to(tl.float32)
        count = tl.sum(exists.to(tl.float32))
        total = tl.sum(tl.where(exists[:, None], acc, 0.0), 0)
        apart = tl.where(exists[:, None], acc - (total / tl.maximum(count, 1.0))[None, :], 0.0)
        at = tl.program_id(1) * (tl.num_programs(0) // tiles) + block
        tl.store(sums + at.to(tl.int64) * CO + m, total, m < CO)
        tl.store(squares + at.to(tl.int64) * CO + m, tl.sum(apart * apart, 0), m < CO)
        tl.store(counts + at, count)
    if mean is not None:
        acc = normalise(acc, mean, var, gamma, beta, eps, m, m < CO)
    acc = activate(acc, ACTIVATION, parameter)
    to = out + ((n.to(tl.int64) * OH + oy) * OW + ox)[:, None] * CO + m[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), exists[:, None] & (m < CO)[None, :])


@tuned(_GRADIENT, ["CA", "CB"], _prune_gradient)
@triton.jit
def _weight_gradient(
    dense, shifted, out, N, DH, DW, BH, BW, CA, CB, OPEN, LENGTH,
    KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    PRECISION: tl.constexpr, POSITIONS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[split, tap, a, b]: sum over LENGTH positions of dense[n, y, x, a] shifted[n, s y + i - p, s x + j - p, b]."""
    wide, tall = tl.cdiv(CB, COLUMNS), tl.cdiv(CA, ROWS)
    tile = tl.program_id(0)
    b = tile % wide * COLUMNS + tl.arange(0, COLUMNS)
    a = tile // wide % tall * ROWS + tl.arange(0, ROWS)
    tap = tile // (wide * tall)
    i, j = tap // KW - PH, tap % KW - PW
    first = tl.program_id(1) * LENGTH
    last = tl.minimum(first + LENGTH, N * DH * DW)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, last, POSITIONS):
        p = start + tl.arange(0, POSITIONS)
        y, x = p // DW % DH * SH + i, p % DW * SW + j
        inside = (p < last) & (y >= 0) & (y < BH) & (x >= 0) & (x < BW)
        at = ((p // (DW * DH)).to(tl.int64) * BH + y) * BW + x
        u = tl.load(dense + p.to(tl.int64)[None, :] * CA + a[:, None], inside[None, :] & (a < CA)[:, None], 0.0)
        v = tl.load(shifted + at[:, None] * CB + b[None, :], inside[:, None] & (b < CB)[None, :], 0.0)
        acc = tl.dot(u, v, acc, input_precision=PRECISION)
    to = out + ((tl.program_id(1).to(tl.int64) * OPEN + tap) * CA + a)[:, None] * CB + b[None, :]
    tl.store(to, acc, (a < CA)[:, None] & (b < CB)[None, :])


@triton.jit
def _connected(source, reader, CI, part, COLORS: tl.constexpr, STRICT: tl.constexpr):
    """Whether a colour mask connects the channels."""
    of_source, of_reader = source * COLORS // CI, reader % part * COLORS // part
    return of_source < of_reader if STRICT else of_source <= of_reader


@triton.jit
def _pack(
    weight, out, A, B, OPEN, TAPS, part,
    BY_A: tl.constexpr, COLORS: tl.constexpr, STRICT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """weight [A, B, TAPS] -> out [OPEN, A, B] (BY_A) or [OPEN, B, A], masked; A are the readers of a mask."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    if BY_A:
        b, a = i % B, i // B % A
    else:
        a, b = i % A, i // A % B
    t = i // (A * B)
    value = tl.load(weight + (a * B + b) * TAPS + t, t < OPEN, 0.0)
    if COLORS > 1:
        value = tl.where((t < OPEN - 1) | _connected(b, a, B, part, COLORS, STRICT), value, 0.0)
    tl.store(out + i, value, t < OPEN)


@triton.jit
def _unpack(parts, out, A, B, OPEN, TAPS, splits, part, COLORS: tl.constexpr, STRICT: tl.constexpr, SIZE: tl.constexpr):
    """Sum over splits of parts [splits, OPEN, A, B] -> out [A, B, TAPS], masked, 0 for taps that are not open."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    b, a, t = i % B, i // B % A, i // (A * B)
    total = tl.zeros([SIZE], tl.float32)
    for split in range(splits):
        total += tl.load(parts + split * OPEN * A * B + i, t < OPEN, 0.0)
    if COLORS > 1:
        total = tl.where((t < OPEN - 1) | _connected(b, a, B, part, COLORS, STRICT), total, 0.0)
    tl.store(out + (a * B + b) * TAPS + t, total.to(out.dtype.element_ty), t < TAPS)


class Norm(NamedTuple):
    """BatchNorm by given statistics, each of one value per channel."""

    mean: Tensor
    var: Tensor
    gamma: Tensor | None
    beta: Tensor | None


class Sums(NamedTuple):
    """Of blocks of rows: each channel's sum, and sum of squares about the block's mean, [blocks, C]; count [blocks]."""

    sums: Tensor
    squares: Tensor
    counts: Tensor


def packed(weight: Tensor, taps: Taps, *, by_first: bool, mask: Mask | None = None) -> Tensor:
    """weight [A, B, kh, kw] as [open taps, A, B] (`by_first`) or [open taps, B, A]; A are the readers of a mask."""
    weight = weight.contiguous()
    a, b = weight.shape[:2]
    out = torch.empty(taps.open * a * b, dtype=weight.dtype, device=weight.device)
    if out.numel():
        with device_of(weight):
            _pack[(triton.cdiv(out.numel(), _PACK),)](
                weight, out, a, b, taps.open, taps.kernel[0] * taps.kernel[1], **_mask(mask), BY_A=by_first, SIZE=_PACK
            )
    return out


def tap_gemm(
    image: Tensor, weight: Tensor, taps: Taps, out: Tensor, *, transposed: bool, bias: Tensor | None = None,
    norm: Norm | None = None, activation: str = "none", parameter: float = 0.0, eps: float = 0.0,
    sums: Sums | None = None,
) -> None:  # fmt: skip
    """Convolution of a channels-last image by a packed weight into a channels-last result, with what follows it."""
    if out.numel() == 0:
        return
    count, channels, *size = out.shape
    stride = taps.stride if transposed else (1, 1)
    grid_size = [-(-s // step) for s, step in zip(size, stride, strict=True)]
    rows = _check_rows(count * grid_size[0] * grid_size[1])
    block = channels_of_step(image)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(rows, meta["ROWS"]) * triton.cdiv(channels, meta["COLUMNS"]), stride[0] * stride[1]

    with device_of(image):
        _tap_gemm[grid](
            image, weight, out, bias, *(norm or (None,) * 4), *(sums or (None,) * 3), parameter, eps,
            count, *image.shape[2:], *size, image.shape[1], channels, *grid_size, taps.open,
            TRANSPOSED=transposed, **_geometry(taps), KH=taps.kernel[0], ACTIVATION=activation,
            PRECISION=_precision(), EVEN=image.shape[1] % block == 0, CHANNELS=block,
        )  # fmt: skip


def empty_sums(out: Tensor, stride: Sequence[int]) -> Sums:
    """For `tap_gemm` into `out`, with blocks of the smallest size; those of larger ones leave some empty."""
    count, channels, height, width = out.shape
    rows = count * -(-height // stride[0]) * -(-width // stride[1])
    blocks = stride[0] * stride[1] * -(-rows // _MIN_TILE)
    options = {"dtype": torch.float32, "device": out.device}
    return Sums(*(torch.zeros(*shape, **options) for shape in ((blocks, channels), (blocks, channels), (blocks,))))


def weight_gradient(dense: Tensor, shifted: Tensor, taps: Taps, *, mask: Mask | None = None) -> Tensor:
    """[A, B, kh, kw] from channels-last images of A and B channels; `shifted` is the one that a tap moves."""
    (count, a, *dense_size), b, all_taps = dense.shape, shifted.shape[1], taps.kernel[0] * taps.kernel[1]
    rows = _check_rows(count * dense_size[0] * dense_size[1])
    tiles = taps.open * -(-a // 64) * -(-b // 64)
    splits = max(1, min(-(-_SPLIT_PROGRAMS // max(1, tiles)), rows // _SPLIT_ROWS))
    length = -(-rows // splits)
    parts = torch.empty(splits * taps.open * a * b, dtype=torch.float32, device=dense.device)
    out = torch.empty(a, b, *taps.kernel, dtype=dense.dtype, device=dense.device)
    with device_of(dense):
        if taps.open:
            _weight_gradient[
                lambda meta: (taps.open * triton.cdiv(a, meta["ROWS"]) * triton.cdiv(b, meta["COLUMNS"]), splits)
            ](
                dense, shifted, parts, count, *dense_size, *shifted.shape[2:], a, b, taps.open, length,
                **_geometry(taps), PRECISION=_precision(), POSITIONS=32,
            )  # fmt: skip
        _unpack[(triton.cdiv(out.numel(), _PACK),)](
            parts, out, a, b, taps.open, all_taps, splits, **_mask(mask), SIZE=_PACK
        )
    return out


def channels_of_step(image: Tensor) -> int:
    """Channels of one step of the sum."""
    return min(64 if image.element_size() == 2 else 32, max(16, triton.next_power_of_2(image.shape[1])))


def channels_last(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _geometry(taps: Taps) -> dict[str, int]:
    (sh, sw), (ph, pw) = taps.stride, taps.padding
    return {"KW": taps.kernel[1], "SH": sh, "SW": sw, "PH": ph, "PW": pw}


def _mask(mask: Mask | None) -> dict[str, Any]:
    return {"part": mask.part, "COLORS": mask.colors, "STRICT": mask.strict} if mask else {
        "part": 1, "COLORS": 1, "STRICT": False
    }  # fmt: skip


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _check_rows(rows: int) -> int:
    if rows > _MAX_ROWS:
        raise ValueError(f"a batch may have at most {_MAX_ROWS} positions, got {rows}")
    return rows
