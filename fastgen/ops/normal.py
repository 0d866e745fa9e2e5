"""Standard normal numbers that are a function of (seed, sample, element), by Box-Muller from `fastgen.ops.philox`.

G. E. P. Box, M. E. Muller, "A Note on the Generation of Random Normal Deviates", Ann. Math. Statist. 29 (1958).

Elements 2i and 2i + 1 of a sample are r cos(a) and r sin(a) with r = sqrt(-2 log u) and a = 2 pi v, (u, v) being the
i-th pair of uniforms.  Logarithm, cosine and sine are polynomials whose every float32 operation is written down here,
and so all implementations give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen import backends
from fastgen._arguments import integer, signed
from fastgen.ops import philox
from fastgen.ops.conv_block import is_transformed

# Powers of f from the highest: -2 log(1 + f) = -2 f + f^2 + f^3 p(f).  Those of t^2 in sin(2 pi t) / t - 2 pi, of which
# the last is what float32 lacks of 2 pi, and in cos(2 pi t).  All minimax in the relative error.
_LOG = (
    0.152648946, -0.255169651, 0.263189494, -0.284042400, 0.332469231, -0.400024308, 0.500016361, -0.666666636
)  # fmt: skip
_SIN = (-75.4019940, 81.5931843, -41.3416725, -1.74845553e-7)
_COS = (59.2204006, -85.4432493, 64.9393255, -19.7392087, 1.0)
_CPU = torch.device("cpu")  # whatever the default device is
_TWO_PI = 6.28318548
_TWO_LOG_2 = (-1.38629436, 3.80930865e-9)  # -2 log 2 in two parts
_SQRT_HALF_BITS = 0x3F3504F3
_MIN_THREAD_NUMBERS = 8192  # below, waking a thread costs more than it saves


def normal(n: int, shape: Sequence[int], *, seed: int = 0, start: int = 0) -> Tensor:
    """Standard normal numbers of the samples start .. start+n-1 of a seed: float32 [n, *shape], on the CPU.

    Sample i depends on the seed and i alone: not on n, start or the number of threads.  The numbers are within 3 units
    in the last place of what exact arithmetic makes of their uniforms.  The largest magnitude is 5.77.

    Raises:
        TypeError: an argument is not of an integer type.
        ValueError: an argument is negative or too large.
    """
    n, start = integer("n", n, 0, 2**62 - 1), integer("start", start, 0, 2**62 - 1)
    shape = [integer("shape", size, 0, 2**62 - 1) for size in shape]
    philox.check_seed(seed)
    numbers = normals(n, math.prod(shape), seed=seed, start=start, draw=0)
    return numbers.reshape(n, *shape)


def normals(n: int, count: int, *, seed: int, start: int, draw: int) -> Tensor:
    """`normal` of flat samples, and of other draws than the first (see the table in `fastgen.ops.philox`)."""
    args = (n, count, seed, start, draw)
    if is_transformed():
        return normals_reference(*args)
    if torch.compiler.is_compiling():
        return torch.ops.fastgen.normal(n, count, signed(seed), start, draw)
    return backends.select("normal", *args)(*args)


def normals_reference(n: int, count: int, seed: int, start: int, draw: int, device: torch.device = _CPU) -> Tensor:
    """The definition: float32 [n, count]."""
    sample = torch.arange(start, start + n, device=device).view(-1, 1)
    position = torch.arange(-(-count // 4), device=device)
    k = philox.uint32(seed, draw, position, sample) >> 8 | 1  # [n, blocks, 4]: the uniforms times 2^24
    radius = normal_radius(k[..., ::2])
    cosine, sine = cos_sin(k[..., 1::2])
    return torch.stack((radius * cosine, radius * sine), dim=-1).flatten(1)[:, :count]


def normal_radius(k: Tensor) -> Tensor:
    """sqrt(-2 log(k / 2^24)) in float32, k odd and below 2^24, int64."""
    bits = k.float().view(torch.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1
    n = (exponent - 24).float()
    square = f * f
    log_mantissa = _fma(f, -2.0, _fma(square * f, _polynomial(f, _LOG), square))
    square = _fma(n, _TWO_LOG_2[0], _fma(n, _TWO_LOG_2[1], log_mantissa))
    return torch.sqrt(square.double()).float()  # torch.sqrt of float32 is not always rounded correctly


def cos_sin(k: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2 pi k / 2^24 in float32: the angle is q / 4 + t turns, |t| <= 1/8, without rounding."""
    q = (k + 2**21) >> 22
    t = (k - (q << 22)).float() * 2.0**-24
    square = t * t
    sine = _fma(t, _TWO_PI, t * _polynomial(square, _SIN))
    cosine = _polynomial(square, _COS)
    odd = (q & 1).bool()
    signs = [1.0 - ((q + turn) & 2).float() for turn in (1, 0)]
    return torch.where(odd, sine, cosine) * signs[0], torch.where(odd, cosine, sine) * signs[1]


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Horner's scheme, highest power first."""
    first, second, *rest = coefficients
    value = _fma(x, first, second)
    for coefficient in rest:
        value = _fma(value, x, coefficient)
    return value


def _fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a * b + c of float32 numbers, rounded once.

    The product is exact in float64.  The sum is rounded there to odd, so that the second rounding is right: S. Boldo,
    G. Melquiond, "Emulation of FMA and Correctly Rounded Sums: Proved Algorithms Using Rounding to Odd", IEEE Trans.
    Computers 57 (2008).
    """
    factor, summand = (torch.as_tensor(value, dtype=torch.float32, device=a.device).double() for value in (b, c))
    product = a.double() * factor
    total = product + summand
    part = total - product
    error = (product - (total - part)) + (summand - part)
    even = (total.view(torch.int64) & 1) == 0
    away = (error > 0) == (total > 0)
    step = torch.where(away, 1, -1)
    odd = (total.view(torch.int64) + step).view(torch.float64)
    return torch.where((error != 0) & even, odd, total).float()


def _normals_cpu(n: int, count: int, seed: int, start: int, draw: int) -> Tensor:
    numbers = torch.empty(n, count, dtype=torch.float32, device=_CPU)
    threads = max(1, min(torch.get_num_threads(), n, n * count // _MIN_THREAD_NUMBERS))
    backends.native_cpu().normal(seed, draw, start, n, count, numbers.data_ptr(), threads)
    return numbers


backends.register("normal", "reference", normals_reference)
backends.register("normal", "cpu", _normals_cpu)


# Registration


def _real(n: int, count: int, seed: int, start: int, draw: int) -> Tensor:
    args = (n, count, seed % 2**64, start, draw)
    return backends.select("normal", *args)(*args)


def _fake(n: int, count: int, *_: int) -> Tensor:
    return torch.empty(n, count, dtype=torch.float32, device=_CPU)


_library = torch.library.Library("fastgen", "FRAGMENT")
_library.define(
    "normal(SymInt n, SymInt count, SymInt seed, SymInt start, int draw) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
_library.impl("normal", _real, "CompositeExplicitAutograd")
torch.library.register_fake("fastgen::normal", _fake, lib=_library)
