"""Elementary functions of float32 tensors where Triton's own are too rough: `tl.exp` loses a bit for every doubling of
its argument, and there is no expm1.  And where they are too slow: the hardware's functions, without care of subnormals.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastgen.kernels.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)

_LOG2_E = tl.constexpr(1.4426950216293335)
_LOG2_E_LOW = tl.constexpr(1.9259629911266175e-08)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def clamp(x, low, high):
    """NaN stays what it is, as it does in PyTorch; `tl.minimum` and `tl.maximum` would give the other number."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu(x):
    """Of NaN too, which a comparison with 0 would turn into 0."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exp(x):
    """e^x within 2 units in the last place; x counts as at most 88 and at least -103, where e^x is nearly 0."""
    x = clamp(x, -103.0, 88.0)
    rounded = x * _LOG2_E
    rest = tl.fma(x, tl.full(x.shape, _LOG2_E, tl.float32), -rounded) + x * _LOG2_E_LOW
    power = tl.exp2(rounded)
    return tl.fma(power, rest * _LN_2, power)


@triton.jit
def exp2_flushed(x):
    """2^x within 2 units in the last place, 0 where that is subnormal: one instruction."""
    if _INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x):
    """1 / x within a unit in the last place, for normal x and results: one instruction."""
    if _INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def sqrt_normal(x):
    """sqrt(x), rounded correctly, for x from 2^-100 to 2^127: no branch looks after others."""
    if _INTERPRETED:
        return tl.sqrt_rn(x)
    y = tl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    root = x * y
    return tl.fma(tl.fma(-root, root, x), 0.5 * y, root)


@triton.jit
def exp_bounded(x):
    """`exp` for x of at most 88, 0 where that is subnormal."""
    rounded = x * _LOG2_E
    rest = tl.fma(x, tl.full(x.shape, _LOG2_E, tl.float32), -rounded) + x * _LOG2_E_LOW
    power = exp2_flushed(rounded)
    return tl.fma(power, rest * _LN_2, power)


@triton.jit
def decay(x):
    """e^-|x|, 0 where that is subnormal, of infinity too."""
    return exp_bounded(tl.maximum(-tl.abs(x), -110.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def exp_beyond_tangent(x, power):
    """e^x - 1 - x, given e^x, without cancellation near 0."""
    p = 2.4801587e-5 + x * 2.7557319e-6
    p = 1.9841270e-4 + x * p
    p = 1.3888889e-3 + x * p
    p = 8.3333333e-3 + x * p
    p = 4.1666667e-2 + x * p
    p = 1.6666667e-1 + x * p
    p = 0.5 + x * p
    return tl.where(tl.abs(x) <= 0.5, x * x * p, power - 1.0 - x)


@triton.jit
def expm1(x):
    """e^x - 1 without cancellation near 0; x counts as at most 88."""
    x = tl.minimum(x, 88.0, propagate_nan=tl.PropagateNan.ALL)
    return expm1_given(x, exp(x))


@triton.jit
def expm1_given(x, power):
    """e^x - 1, given e^x."""
    return tl.where(tl.abs(x) <= 0.5, exp_beyond_tangent(x, power) + x, power - 1.0)


@triton.jit
def tanh(x):
    return tanh_given(x, exp(-2.0 * tl.abs(x)))


@triton.jit
def tanh_given(x, e):
    """tanh x, given e^-2|x|: x + x^3 p(x^2) near 0, elsewhere (1 - e) / (1 + e) with the sign of x; p minimax."""
    z = x * x
    p = 0.021116216 + z * -0.00627639
    p = -0.053875137 + z * p
    p = 0.13332924 + z * p
    p = -0.3333333 + z * p
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) <= 0.6, x + x * z * p, tl.where(x < 0, -far, far))
