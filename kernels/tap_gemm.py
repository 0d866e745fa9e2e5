"""The tap-GEMM: convolutions as matrix products over the few positions that a kernel really reads, channels last.

    conv:        out[n, y, x, m] = sum over i, j, k of  image[n, s y + i - p, s x + j - p, k] weight[i, j, k, m]
    transposed:  out[n, s y + i - p, s x + j - p, m] = sum over them of  image[n, y, x, k] weight[i, j, k, m]

The transposed one is computed per output phase (y mod s, x mod s): a phase reads every s-th tap, so no zero is ever
multiplied.  Of stride 1, taps may be left out from the end (raster order): those that a mask closes.  Rows of the
product are output positions, its sum runs over blocks of channels and their taps in one loop: neighbouring taps read
nearly the same rows, which are then still in a cache.  All programs sum in that order, whatever their tile.

Few output channels of a transposed convolution are computed `MERGED`: a row is a patch of positions, its columns are
all the phases of all of them, and the sum runs over the union of their taps.  Most of it is multiplied by zero, but the
image is read a few times, rather than once for each tap of each phase.

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

from fastgen._float32 import float32_products
from fastgen.kernels.elementary import exp, expm1, relu, tanh
from fastgen.kernels.launch import INTERPRETED, architecture, device_of, launched_directly, tuned

_MAX_ROWS = 2**31 - 2**10
_SMALL = 2**31 - 2**24  # elements, at most, of tensors whose offsets, and those just beyond, take 32 bits
_MIN_TILE = 16 if INTERPRETED else 64  # rows; of the configurations below
_MERGED = {4: 32, 2: 64}  # columns at most, by bytes of an element
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
        x = relu(x)
    elif ACTIVATION == "leaky_relu":
        x = tl.where(x > 0, x, x * parameter)
    elif ACTIVATION == "elu":
        x = tl.where(x > 0, x, parameter * expm1(x))
    elif ACTIVATION == "tanh":
        x = tanh(x)
    elif ACTIVATION == "sigmoid":
        x = 1.0 / (1.0 + exp(-x))
    elif ACTIVATION == "silu":
        e = exp(-tl.abs(x))
        # `exp` ends above 0, which would make -inf of the NaN that PyTorch has at -inf.
        x = tl.where(x < -104.0, x * 0.0, x * tl.where(x < 0, e, 1.0) / (1.0 + e))
    elif ACTIVATION == "gelu":
        x = x * normal_cdf(x)
    return x


@triton.jit
def normal_cdf(x):
    """The distribution function of the standard normal."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def normalise(x, mean, var, gamma, beta, eps, m, inside):
    """BatchNorm of [rows, channels] by given statistics, of the channels m."""
    x -= tl.load(mean + m, inside, 0.0).to(tl.float32)[None, :]
    scale = 1.0 / tl.sqrt_rn(tl.load(var + m, inside, 1.0).to(tl.float32) + eps)
    if gamma is not None:
        scale *= tl.load(gamma + m, inside, 0.0).to(tl.float32)
    x *= scale[None, :]
    if beta is not None:
        x += tl.load(beta + m, inside, 0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def _finish(x, to, inside, m, of_column, mean, var, gamma, beta, parameter, eps, ACTIVATION: tl.constexpr):
    if mean is not None:
        x = normalise(x, mean, var, gamma, beta, eps, m, of_column)
    tl.store(to, activate(x, ACTIVATION, parameter).to(to.dtype.element_ty), inside)


def _tiles(*tiles: tuple[int, int, int, int]) -> list[triton.Config]:
    """Of (rows, columns, warps, stages)."""
    return [
        triton.Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps, num_stages=stages)
        for rows, columns, warps, stages in tiles
    ]


_WIDE = _tiles((256, 128, 8, 3))  # spills registers where there are sums, or no wgmma
_HALF = _tiles((128, 128, 8, 3), (256, 64, 8, 3), (128, 64, 4, 4), (64, 64, 4, 5))
_TENSOR_MEMORY = [*_tiles((128, 128, 4, 3)), *_HALF[1:]]  # of compute capability 10: 8 warps spill without sums, 4 with
_NARROW = _tiles(
    (128, 64, 8, 3), (64, 64, 4, 4), (128, 32, 4, 4), (64, 32, 4, 4), (256, 16, 8, 3), (128, 16, 4, 4), (64, 16, 4, 4)
)  # of few channels, or merged
_FULL = _tiles((64, 64, 8, 3), (64, 32, 8, 2), (64, 16, 4, 2))
_GRADIENT = _tiles((64, 64, 4, 3), (64, 32, 4, 3), (64, 16, 4, 3))
_TIMED = 4  # configurations at most


def _fitting(configs: list[triton.Config], columns: int) -> list[triton.Config]:
    """Wide ones first: without tiles that are mostly beyond the columns, or much narrower than they could be."""
    most = max(16, triton.next_power_of_2(columns))
    fitting = [config for config in configs if min(most, 64) <= config.kwargs["COLUMNS"] <= most]
    return fitting[: _TIMED - 1] + fitting[_TIMED - 1 :][-1:]


def _configs(
    image: Tensor, weight: Tensor, out: Tensor, *rest: Any, MERGED: int, SH: int, SW: int, **_: Any
) -> list[triton.Config]:
    channels = out.shape[1]
    if image.dtype == torch.float32:
        return _fitting(_FULL, channels * SH * SW * MERGED**2 if MERGED else channels)
    if MERGED or channels <= 32:
        return _fitting(_NARROW, channels * SH * SW * MERGED**2 if MERGED else channels)
    gpu = architecture()
    if rest[5] is not None or gpu < 90 or gpu >= 120:  # 120: without tensor memory, and the shared memory of 86
        return _fitting(_HALF, channels)
    return _fitting(_WIDE + _HALF if gpu == 90 else _TENSOR_MEMORY, channels)


def _kind(image: Tensor, weight: Tensor, out: Tensor, *rest: Any, TRANSPOSED: bool, MERGED: int, **_: Any) -> Any:
    """Calls of a kind share a tile: alike, with at most four times the positions."""
    size = (image.shape[1], *out.shape[1:3], out.numel().bit_length() // 2)
    return image.dtype, size, rest[5] is not None, TRANSPOSED, MERGED


def _gradient_configs(dense: Tensor, shifted: Tensor, *_: Any, **__: Any) -> Any:
    return _fitting(_GRADIENT, shifted.shape[1])


def _gradient_kind(dense: Tensor, shifted: Tensor, *_: Any, **__: Any) -> Any:
    return dense.dtype, dense.shape[1], shifted.shape[1]


@tuned(_configs, _kind, zero=("sums", "squares", "counts"))
@triton.jit
def _tap_gemm(
    image, weight, out, bias, mean, var, gamma, beta, sums, squares, counts, parameter, eps,
    N, IH, IW, OH, OW, GH, GW, OF_TAP, OF_SOURCE, OF_READER,
    CI: tl.constexpr, CO: tl.constexpr, OPEN: tl.constexpr, TRANSPOSED: tl.constexpr, MERGED: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, LARGE: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[row, m] of one tile; weight is [taps, CI, CO] of the strides OF_*. Rows are positions of the grid [N, GH, GW]
    of a phase; offsets of LARGE tensors take 64 bits.
    """
    PHASES: tl.constexpr = SH * SW if TRANSPOSED and MERGED == 0 else 1
    HIGH: tl.constexpr = SH * MERGED  # outputs of a merged row
    WIDE: tl.constexpr = SW * MERGED
    WIDTH: tl.constexpr = CO * HIGH * WIDE if MERGED else CO
    TILES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    BLOCKS: tl.constexpr = (CI + CHANNELS - 1) // CHANNELS
    block = tl.program_id(0) // (TILES * PHASES)  # tiles and phases that read the same rows run side by side
    phase = tl.program_id(0) // TILES % PHASES
    row = block * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % TILES * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, CHANNELS)
    of_column = column < WIDTH
    gx = row % GW
    gy = row // GW % GH
    n = row // (GW * GH)
    if MERGED:
        m = column % CO
        my, mx = column // (CO * WIDE), column // CO % WIDE
        FIRST_Y: tl.constexpr = -((KH - 1 - PH) // SH)  # of the input, relative to the first position of the row
        FIRST_X: tl.constexpr = -((KW - 1 - PW) // SW)
        across = (WIDE - 1 + PW) // SW - FIRST_X + 1
        taps = ((HIGH - 1 + PH) // SH - FIRST_Y + 1) * across
        y, x = gy * MERGED + FIRST_Y, gx * MERGED + FIRST_X
        exists = n < N
    elif TRANSPOSED:
        m = column
        ry, rx = phase // SW, phase % SW
        ky, kx = (ry + PH) % SH, (rx + PW) % SW  # the first tap of the phase
        if KH % SH == 0 and KW % SW == 0:  # all phases have as many taps
            across = KW // SW
            taps = min(KH // SH * across, OPEN)
        else:
            across = (KW - kx + SW - 1) // SW  # 0 where the stride is wider than the kernel
            taps = tl.minimum((KH - ky + SH - 1) // SH * across, OPEN)
        y, x = gy + (ry + PH) // SH, gx + (rx + PW) // SW
        oy, ox = gy * SH + ry, gx * SW + rx
        exists = (n < N) & (oy < OH) & (ox < OW)
    else:
        m = column
        across = KW
        taps = OPEN
        y, x = gy * SH - PH, gx * SW - PW
        oy, ox = gy, gx
        exists = n < N
    if LARGE:
        n = n.to(tl.int64)
    of_image = (((n * IH + y) * IW + x) * CI)[:, None] + k[None, :]
    of_weight = (k * OF_SOURCE)[:, None] + (m * OF_READER)[None, :]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(taps * BLOCKS):
        tap = step % taps
        first = step // taps * CHANNELS
        dy, dx = tap // max(across, 1), tap % max(across, 1)
        if MERGED:
            i, j = my + (PH - SH * FIRST_Y) - SH * dy, mx + (PW - SW * FIRST_X) - SW * dx
            readers = (of_column & (i >= 0) & (i < KH) & (j >= 0) & (j < KW))[None, :]
            from_weight = weight + first * OF_SOURCE + (of_weight + ((i * KW + j) * OF_TAP)[None, :])
        else:
            t = tap
            if TRANSPOSED:
                t = (ky + dy * SH) * KW + kx + dx * SW
                dy, dx = -dy, -dx
            readers = of_column[None, :]
            from_weight = weight + (t.to(tl.int64) * OF_TAP + first * OF_SOURCE) + of_weight
        # Of unsigned numbers, those below 0 are the largest.
        inside = exists & ((y + dy).to(tl.uint32) < IH) & ((x + dx).to(tl.uint32) < IW)
        from_image = image + ((dy * IW + dx) * CI + first) + of_image
        if CI % CHANNELS == 0:
            a = tl.load(from_image, inside[:, None], 0.0)
            if WIDTH % COLUMNS == 0 and not MERGED:
                b = tl.load(from_weight)
            else:
                b = tl.load(from_weight, readers, 0.0)
        else:
            rest = k < CI - first
            a = tl.load(from_image, inside[:, None] & rest[None, :], 0.0)
            b = tl.load(from_weight, rest[:, None] & readers, 0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    if bias is not None:
        acc += tl.load(bias + m, of_column, 0.0).to(tl.float32)[None, :]
    if sums is not None:  # of what is stored; the merging needs them per block: sum, sum of squares about its mean
        acc = acc.to(out.dtype.element_ty).to(tl.float32)
        count = tl.sum(exists.to(tl.float32))
        total = tl.sum(tl.where(exists[:, None], acc, 0.0), 0)
        apart = tl.where(exists[:, None], acc - (total / tl.maximum(count, 1.0))[None, :], 0.0)
        at = phase * tl.cdiv(N * GH * GW, ROWS) + block
        tl.store(sums + at.to(tl.int64) * CO + m, total, of_column)
        tl.store(squares + at.to(tl.int64) * CO + m, tl.sum(apart * apart, 0), of_column)
        tl.store(counts + at, count)
    if MERGED:
        oy, ox = (gy * HIGH)[:, None] + my[None, :], (gx * WIDE)[:, None] + mx[None, :]
        to = out + (((n[:, None] * OH + oy) * OW + ox) * CO + m[None, :])
        inside = exists[:, None] & of_column[None, :] & (oy < OH) & (ox < OW)
        _finish(acc, to, inside, m, of_column, mean, var, gamma, beta, parameter, eps, ACTIVATION)
    elif COLUMNS < 128:
        to = out + (((n * OH + oy) * OW + ox) * CO)[:, None] + m[None, :]
        inside = exists[:, None] & of_column[None, :]
        _finish(acc, to, inside, m, of_column, mean, var, gamma, beta, parameter, eps, ACTIVATION)
    else:  # half of it at a time: there are no registers for all that a BatchNorm needs
        HALF: tl.constexpr = COLUMNS // 2
        to = out + ((n * OH + oy) * OW + ox) * CO
        first, second = tl.split(acc.reshape(ROWS, 2, HALF).permute(0, 2, 1))
        for half in tl.static_range(2):
            m = tl.program_id(0) % TILES * COLUMNS + half * HALF + tl.arange(0, HALF)
            inside = exists[:, None] & (m < CO)[None, :]
            x = first if half == 0 else second
            _finish(x, to[:, None] + m[None, :], inside, m, m < CO, mean, var, gamma, beta, parameter, eps, ACTIVATION)


@tuned(_gradient_configs, _gradient_kind)
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


@launched_directly()
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


@launched_directly()
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
    """weight [A, B, kh, kw] as [open taps, A, B] (`by_first`) or [open taps, B, A]; A are the readers of a mask.

    Without a mask, a channels-last weight is only looked at from another side.
    """
    a, b = weight.shape[:2]
    shape = (taps.open, a, b) if by_first else (taps.open, b, a)
    if mask is None and weight.is_contiguous(memory_format=torch.channels_last):
        of_a = taps.kernel[0] * taps.kernel[1] * b
        return weight.as_strided(shape, (b, of_a, 1) if by_first else (b, 1, of_a))
    weight = weight.contiguous()
    out = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    if taps.open:
        with device_of(weight):
            _pack[lambda _: (-(-out.numel() // _PACK),)](
                weight, out, a, b, taps.open, taps.kernel[0] * taps.kernel[1], **_mask(mask), BY_A=by_first, SIZE=_PACK
            )
    return out


def tap_gemm(
    image: Tensor, weight: Tensor, taps: Taps, out: Tensor, *, transposed: bool, bias: Tensor | None = None,
    norm: Norm | None = None, activation: str = "none", parameter: float = 0.0, eps: float = 0.0,
    sums: Sums | None = None,
) -> None:  # fmt: skip
    """Convolution of a channels-last image by a `packed` weight into a channels-last result, with what follows it."""
    if out.numel() == 0:
        return
    count, inputs, *image_size = image.shape
    _, channels, *size = out.shape
    step, merged = (1, 1), 0  # outputs of a row of the product in either direction
    if transposed:
        if sums is None:  # whose blocks are those of separate phases
            taps = taps._replace(stride=_phases(taps, image_size, size))
            merged = _merged(taps, channels, image)
        step = taps.stride[0] * max(merged, 1), taps.stride[1] * max(merged, 1)
    height, width = (-(-outputs // s) for outputs, s in zip(size, step, strict=True))
    rows = _check_rows(count * height * width)
    columns, phases = (channels * step[0] * step[1], 1) if merged else (channels, step[0] * step[1])

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (-(-rows // meta["ROWS"]) * -(-columns // meta["COLUMNS"]) * phases,)

    with device_of(image):
        _tap_gemm[grid](
            image, weight, out, bias, *(norm or (None,) * 4), *(sums or (None,) * 3), parameter, eps,
            count, *image_size, *size, height, width, *weight.stride(),
            CI=inputs, CO=channels, OPEN=taps.open, TRANSPOSED=transposed, MERGED=merged, KH=taps.kernel[0],
            **_geometry(taps), ACTIVATION=activation, PRECISION=float32_products(), CHANNELS=channels_of_step(image),
            LARGE=max(image.numel(), weight.numel(), out.numel()) > _SMALL,
        )  # fmt: skip


def _phases(taps: Taps, image_size: Sequence[int], size: Sequence[int]) -> tuple[int, int]:
    """Of a transposed convolution in either direction: its strides.  That of an image one position wide means nothing;
    with a wide one every phase has only the tap that lands there.
    """
    if taps.open < taps.kernel[0] * taps.kernel[1]:
        return taps.stride
    all_sides = zip(image_size, size, taps.kernel, taps.stride, strict=True)
    first, second = (max(kernel, outputs) if side == 1 else stride for side, outputs, kernel, stride in all_sides)
    return first, second


def _merged(taps: Taps, channels: int, image: Tensor) -> int:
    """Sides of the patch of positions that is a row of the product; 0 where phases are computed one by one."""
    columns = channels * taps.stride[0] * taps.stride[1]
    most = _MERGED[image.element_size()]
    if columns == channels or columns > most or taps.open < taps.kernel[0] * taps.kernel[1]:
        return 0
    return 2 if 4 * columns <= most else 1


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
                **_geometry(taps), PRECISION=float32_products(), POSITIONS=32,
            )  # fmt: skip
        _unpack[lambda _: (-(-out.numel() // _PACK),)](
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


def _check_rows(rows: int) -> int:
    if rows > _MAX_ROWS:
        raise ValueError(f"a batch may have at most {_MAX_ROWS} positions, got {rows}")
    return rows
