"""Philox4x32-10 in Triton: the draws of `fastgen.ops.philox`, bit for bit, and the normal numbers of a draw."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen._arguments import signed
from fastgen.kernels.elementary import sqrt_normal
from fastgen.kernels.launch import device_of

_BLOCK = 256


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """The four uint32 lanes of the counters, uint32 tensors of one shape; the seed is an int64 with the key's bits.

    A product of two words is taken in 64 bits: one instruction gives both of its halves.
    """
    key = seed.to(tl.int64).to(tl.uint64, bitcast=True)
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def normals(seed, draw, position, sample):
    """float32 elements 4p .. 4p + 3 of the positions [..., P] of a draw, in order: [..., 4 * P].

    The definition is `fastgen.ops.normal`. Every product or sum is rounded where it is rounded there: no operand of a
    sum is a product, so none can be contracted.
    """
    low = sample.to(tl.uint32)
    high = (sample >> 32).to(tl.uint32)
    position = position.to(tl.uint32)
    zero = low * 0 + position * 0
    b0, b1, b2, b3 = philox(seed, zero + tl.cast(draw, tl.uint32), zero + position, zero + low, zero + high)
    n0, n1 = _box_muller(b0, b1)
    n2, n3 = _box_muller(b2, b3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def _box_muller(u, v):
    radius = _radius((u >> 8 | 1).to(tl.int32))
    cosine, sine = _cos_sin((v >> 8 | 1).to(tl.int32))
    return radius * cosine, radius * sine


@triton.jit
def _radius(k):
    """sqrt(-2 log(k / 2^24)): k = 2^n (1 + f), -2 log(1 + f) = -2 f + f^2 + f^3 p(f)."""
    bits = k.to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # bits of sqrt(1/2)
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    n = (exponent - 24).to(tl.float32)
    p = _fma(f, 0.152648946, -0.255169651)
    p = _fma(p, f, 0.263189494)
    p = _fma(p, f, -0.284042400)
    p = _fma(p, f, 0.332469231)
    p = _fma(p, f, -0.400024308)
    p = _fma(p, f, 0.500016361)
    p = _fma(p, f, -0.666666636)
    square = f * f
    log_mantissa = _fma(f, -2.0, tl.fma(square * f, p, square))
    return sqrt_normal(_fma(n, -1.38629436, tl.fma(n, _like(n, 3.80930865e-9), log_mantissa)))


@triton.jit
def _cos_sin(k):
    """Cosine and sine of 2 pi k / 2^24: the angle is q / 4 + t turns, |t| <= 1/8, without rounding."""
    q = (k + (1 << 21)) >> 22
    t = (k - (q << 22)).to(tl.float32) * 5.9604644775390625e-08
    square = t * t
    s = _fma(square, -75.4019940, 81.5931843)
    s = _fma(s, square, -41.3416725)
    s = _fma(s, square, -1.74845553e-7)
    s = _fma(t, 6.28318548, t * s)
    c = _fma(square, 59.2204006, -85.4432493)
    c = _fma(c, square, 64.9393255)
    c = _fma(c, square, -19.7392087)
    c = _fma(c, square, 1.0)
    odd = (q & 1) != 0
    cosine, sine = tl.where(odd, s, c), tl.where(odd, c, s)
    return tl.where(((q + 1) & 2) != 0, -cosine, cosine), tl.where((q & 2) != 0, -sine, sine)


@triton.jit
def _fma(x, y, z):
    """x * y + z rounded once; y and z may be numbers."""
    return tl.fma(x, _like(x, y), _like(x, z))


@triton.jit
def _like(x, value):
    return tl.broadcast_to(tl.cast(value, tl.float32), x.shape)


@triton.jit(do_not_specialize=["seed"])
def _draw(seed: tl.int64, block, position, sample, count, out, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    c0 = tl.load(block + i, inside, 0).to(tl.uint32)
    c1 = tl.load(position + i, inside, 0).to(tl.uint32)
    index = tl.load(sample + i, inside, 0)
    b0, b1, b2, b3 = philox(seed, c0, c1, index.to(tl.uint32), (index >> 32).to(tl.uint32))
    tl.store(out + 4 * i, b0.to(tl.int64), inside)
    tl.store(out + 4 * i + 1, b1.to(tl.int64), inside)
    tl.store(out + 4 * i + 2, b2.to(tl.int64), inside)
    tl.store(out + 4 * i + 3, b3.to(tl.int64), inside)


def uint32(seed: int, block: Tensor, position: Tensor, sample: Tensor) -> Tensor:
    """int64 counters of one shape [...] -> int64 [..., 4], see `fastgen.ops.philox.philox_reference`."""
    block, position, sample = block.contiguous(), position.contiguous(), sample.contiguous()
    out = torch.empty((*block.shape, 4), dtype=torch.int64, device=block.device)
    if block.numel():
        grid = (triton.cdiv(block.numel(), _BLOCK),)
        with device_of(block):
            _draw[grid](signed(seed), block, position, sample, block.numel(), out, BLOCK=_BLOCK)
    return out
