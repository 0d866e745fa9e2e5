"""Elementary functions of float32 tensors where Triton's own are too rough: `tl.exp` loses a bit for every doubling of
its argument, and there is no expm1.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950216293335)
_LOG2_E_LOW = tl.constexpr(1.9259629911266175e-08)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp(x):
    """e^x within 2 units in the last place; x counts as at most 88 and at least -103, where e^x is nearly 0."""
    x = tl.minimum(tl.maximum(x, -103.0), 88.0)
    rounded = x * _LOG2_E
    rest = tl.fma(x, tl.full(x.shape, _LOG2_E, tl.float32), -rounded) + x * _LOG2_E_LOW
    power = tl.exp2(rounded)
    return tl.fma(power, rest * _LN_2, power)


@triton.jit
def exp_beyond_tangent(x, power):
    """e^x - 1 - x, given e^x, without cancellation near 0."""
    near = tl.minimum(tl.maximum(x, -0.5), 0.5)
    p = 2.4801587e-5 + near * 2.7557319e-6
    p = 1.9841270e-4 + near * p
    p = 1.3888889e-3 + near * p
    p = 8.3333333e-3 + near * p
    p = 4.1666667e-2 + near * p
    p = 1.6666667e-1 + near * p
    p = 0.5 + near * p
    return tl.where(tl.abs(x) <= 0.5, near * near * p, power - 1.0 - x)


@triton.jit
def expm1(x):
    """e^x - 1 without cancellation near 0; x counts as at most 88."""
    x = tl.minimum(x, 88.0)
    power = exp(x)
    return tl.where(tl.abs(x) <= 0.5, exp_beyond_tangent(x, power) + x, power - 1.0)


@triton.jit
def tanh(x):
    """x + x^3 p(x^2) near 0, elsewhere (1 - e^-2|x|) / (1 + e^-2|x|) with the sign of x; p minimax."""
    z = tl.minimum(x * x, 0.36)
    p = 0.021116216 + z * -0.00627639
    p = -0.053875137 + z * p
    p = 0.13332924 + z * p
    p = -0.3333333 + z * p
    e = exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) <= 0.6, x + x * z * p, tl.where(x < 0, -far, far))
