"""Likelihood of mixtures of discretised logistics, and its gradient, a tile of pixels x components at a time.

`fastgen.ops.logistic_mixture_nll` is the definition.  With x the encoded level, h half the width of a bin, m the mean
and s the log scale of a component, a bin's mass is

    sigma(a) - sigma(b) = sigma(a) sigma(-b) (1 - e^-(a-b)),   a = (x - m + h) e^-s,   b = (x - m - h) e^-s,

sigma(a) alone for the lowest level and sigma(-b) for the highest.  Its logarithm is the sum of the three logarithms,
log sigma(a) = min(a, 0) - log(1 + e^-|a|), and none of them cancels.  A program reads each parameter once, in the
layout that the tensor has, and writes each derivative once.  Arithmetic is float32.  (The parameters are the kernels'
`values`: Triton's launcher cannot do with an argument called `params`.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.elementary import exp, exp_beyond_tangent, tanh
from fastgen.kernels.launch import device_of

_ELEMENTS = 512  # pixels x components of a program
_BACKWARD_WARPS = 8  # so that a thread has two elements, each with a hundred live numbers: more are spilled
_MIN_LOG_SCALE = tl.constexpr(-7.0)
_FAR = tl.constexpr(3.4028234e38 / 16)  # sums of six such numbers are finite


@triton.jit
def _log1p(e):
    """log(1 + e) for e in [0, 1]: what rounding takes from the sum is given back."""
    u = 1.0 + e
    return tl.log(u) + (e - (u - 1.0)) / u


@triton.jit
def _log_sigmoid(x):
    """log sigma(x), and sigma(-x), its derivative."""
    e = exp(-tl.abs(x))
    return tl.minimum(x, 0.0) - _log1p(e), tl.where(x > 0, e, 1.0) / (1.0 + e)


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, -_FAR), _FAR)


@triton.jit
def _log_mass(x, level, mean, log_scale, levels):
    """Logarithm of a bin's mass, and its derivatives by mean and by log scale.

    log(1 - e^-w), w = a - b the width: for small widths by the logarithm of the width and a series, whose derivative by
    -w w' is smooth; x and level are [PIXELS, 1].
    """
    half = 1.0 / (levels - 1)
    s = tl.minimum(tl.maximum(log_scale, _MIN_LOG_SCALE), _FAR)
    inverse = exp(-s)
    upper = _clamp((x - mean + half) * inverse)
    lower = _clamp((x - mean - half) * inverse)
    below_upper, upper_tail = _log_sigmoid(upper)
    above_lower, lower_tail = _log_sigmoid(-lower)
    width = 2.0 * half * inverse
    power = exp(-width)
    share = -(exp_beyond_tangent(-width, power) - width)  # 1 - e^-w
    small = width < 1e-3
    log_share = tl.where(
        small,
        tl.log(2.0 * half) - s - width * 0.5 + width * width * (1.0 / 24.0),
        tl.log(tl.where(small, 1.0, share)),
    )
    by_log_width = tl.where(small, 1.0 - width * 0.5, width * power / tl.where(small, 1.0, share))
    first, last = level == 0, level == levels - 1
    inner = ~(first | last)
    # sigma(a) is left out of the highest level, sigma(-b) out of the lowest, the width's part out of both.
    mass = tl.where(last, 0.0, below_upper) + tl.where(first, 0.0, above_lower) + tl.where(inner, log_share, 0.0)
    by_upper = tl.where(last, 0.0, upper_tail)
    by_lower = tl.where(first, 0.0, -lower_tail)
    by_mean = -inverse * (by_upper + by_lower)
    by_scale = -(by_upper * upper + by_lower * lower) - tl.where(inner, by_log_width, 0.0)
    return mass, by_mean, tl.where(log_scale < _MIN_LOG_SCALE, 0.0, by_scale)


@triton.jit
def _coordinates(N, H, W, K, PIXELS: tl.constexpr, COMPONENTS: tl.constexpr):
    """Pixel numbers, their image, row and column, which exist, and component numbers."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    k = tl.arange(0, COMPONENTS)[None, :]
    n, y, x = pixel // (H * W), pixel // W % H, pixel % W
    return pixel, n, y, x, pixel < N * H * W, k


@triton.jit
def _read(pointer, parameter, stride, inside):
    return tl.load(pointer + parameter * stride, inside, 0.0).to(tl.float32)


@triton.jit
def _levels(images, at, channel, stride, exists, levels):
    """Levels [PIXELS, 1] of a colour, and what the network reads for them."""
    level = tl.load(images + at + channel * stride, exists, 0).to(tl.int32)[:, None]
    return level, level.to(tl.float32) * (2.0 / (levels - 1)) - 1.0


@triton.jit
def _log_weights(logits, mass, real):
    """Logarithms of the sums of e^logit and of e^(logit + mass), [PIXELS], and the summands over their sums."""
    logits = tl.where(real, logits, float("-inf"))
    most = tl.max(logits, 1)
    prior = tl.where(real, exp(logits - most[:, None]), 0.0)
    prior_sum = tl.sum(prior, 1)
    joint = logits + mass
    top = tl.max(joint, 1)
    posterior = tl.where(real, exp(joint - top[:, None]), 0.0)
    posterior_sum = tl.sum(posterior, 1)
    nll = (most - top) + tl.log(prior_sum) - tl.log(posterior_sum)
    return nll, prior / prior_sum[:, None], posterior / posterior_sum[:, None]


@triton.jit
def _forward(
    values, images, nll, N, H, W, K, levels, ps_n, ps_c, ps_h, ps_w, is_n, is_c, is_h, is_w,
    COLORS: tl.constexpr, PIXELS: tl.constexpr, COMPONENTS: tl.constexpr,
):  # fmt: skip
    pixel, n, y, x, exists, k = _coordinates(N, H, W, K, PIXELS, COMPONENTS)
    real = k < K
    inside = exists[:, None] & real
    base = values + (n * ps_n + y * ps_h + x * ps_w)[:, None]
    at = n * is_n + y * is_h + x * is_w
    logits = _read(base, k, ps_c, inside)
    level, red = _levels(images, at, 0, is_c, exists, levels)
    wrong = level >= levels
    mass, _, _ = _log_mass(red, level, _read(base, K + k, ps_c, inside), _read(base, 2 * K + k, ps_c, inside), levels)
    if COLORS == 3:
        in_green = tanh(_read(base, 3 * K + k, ps_c, inside))
        red_in_blue = tanh(_read(base, 6 * K + k, ps_c, inside))
        green_in_blue = tanh(_read(base, 9 * K + k, ps_c, inside))
        level, green = _levels(images, at, 1, is_c, exists, levels)
        wrong |= level >= levels
        mean = _read(base, 4 * K + k, ps_c, inside) + in_green * red
        share, _, _ = _log_mass(green, level, mean, _read(base, 5 * K + k, ps_c, inside), levels)
        mass += share
        level, blue = _levels(images, at, 2, is_c, exists, levels)
        wrong |= level >= levels
        mean = _read(base, 7 * K + k, ps_c, inside) + red_in_blue * red + green_in_blue * green
        share, _, _ = _log_mass(blue, level, mean, _read(base, 8 * K + k, ps_c, inside), levels)
        mass += share
    result, _, _ = _log_weights(logits, mass, real)
    wrong_pixel = tl.sum(wrong.to(tl.int32), 1) > 0
    tl.store(nll + pixel, tl.where(wrong_pixel, float("nan"), result), exists)


@triton.jit
def _write(pointer, parameter, stride, value, inside):
    tl.store(pointer + parameter * stride, value.to(pointer.dtype.element_ty), inside)


@triton.jit
def _backward(
    grad, values, images, out, N, H, W, K, levels,
    gs_n, gs_h, gs_w, ps_n, ps_c, ps_h, ps_w, is_n, is_c, is_h, is_w, os_n, os_c, os_h, os_w,
    COLORS: tl.constexpr, PIXELS: tl.constexpr, COMPONENTS: tl.constexpr,
):  # fmt: skip
    _, n, y, x, exists, k = _coordinates(N, H, W, K, PIXELS, COMPONENTS)
    real = k < K
    inside = exists[:, None] & real
    base = values + (n * ps_n + y * ps_h + x * ps_w)[:, None]
    to = out + (n * os_n + y * os_h + x * os_w)[:, None]
    at = n * is_n + y * is_h + x * is_w
    g = tl.load(grad + n * gs_n + y * gs_h + x * gs_w, exists, 0.0).to(tl.float32)[:, None]
    logits = _read(base, k, ps_c, inside)
    level, red = _levels(images, at, 0, is_c, exists, levels)
    mean, scale = _read(base, K + k, ps_c, inside), _read(base, 2 * K + k, ps_c, inside)
    mass, red_mean, red_scale = _log_mass(red, level, mean, scale, levels)
    if COLORS == 3:
        in_green = tanh(_read(base, 3 * K + k, ps_c, inside))
        red_in_blue = tanh(_read(base, 6 * K + k, ps_c, inside))
        green_in_blue = tanh(_read(base, 9 * K + k, ps_c, inside))
        level, green = _levels(images, at, 1, is_c, exists, levels)
        mean, scale = _read(base, 4 * K + k, ps_c, inside) + in_green * red, _read(base, 5 * K + k, ps_c, inside)
        share, green_mean, green_scale = _log_mass(green, level, mean, scale, levels)
        mass += share
        level, blue = _levels(images, at, 2, is_c, exists, levels)
        mean = _read(base, 7 * K + k, ps_c, inside) + red_in_blue * red + green_in_blue * green
        share, blue_mean, blue_scale = _log_mass(blue, level, mean, _read(base, 8 * K + k, ps_c, inside), levels)
        mass += share
    _, prior, posterior = _log_weights(logits, mass, real)
    _write(to, k, os_c, g * (prior - posterior), inside)
    g = -g * posterior
    _write(to, K + k, os_c, g * red_mean, inside)
    _write(to, 2 * K + k, os_c, g * red_scale, inside)
    if COLORS == 3:
        _write(to, 3 * K + k, os_c, g * green_mean * red * (1.0 - in_green * in_green), inside)
        _write(to, 4 * K + k, os_c, g * green_mean, inside)
        _write(to, 5 * K + k, os_c, g * green_scale, inside)
        _write(to, 6 * K + k, os_c, g * blue_mean * red * (1.0 - red_in_blue * red_in_blue), inside)
        _write(to, 7 * K + k, os_c, g * blue_mean, inside)
        _write(to, 8 * K + k, os_c, g * blue_scale, inside)
        _write(to, 9 * K + k, os_c, g * blue_mean * green * (1.0 - green_in_blue * green_in_blue), inside)


def forward(params: Tensor, images: Tensor, levels: int) -> Tensor:
    """float32 [N, H, W]; NaN where a level is out of range: a kernel cannot raise, and checking would wait for it."""
    count, _, height, width = images.shape
    nll = torch.empty((count, height, width), dtype=torch.float32, device=params.device)
    grid, components, tile = _tiling(params, images)
    if nll.numel():
        with device_of(params):
            _forward[grid](
                params,
                images,
                nll,
                count,
                height,
                width,
                components,
                levels,
                *params.stride(),
                *images.stride(),
                **tile,
            )
    return nll


def backward(grad: Tensor, params: Tensor, images: Tensor, levels: int) -> Tensor:
    """Gradient of params, in their dtype and layout."""
    count, _, height, width = images.shape
    out = torch.empty_like(params)
    grid, components, tile = _tiling(params, images)
    if grad.numel():
        with device_of(params):
            _backward[grid](
                grad, params, images, out, count, height, width, components, levels,
                *grad.stride(), *params.stride(), *images.stride(), *out.stride(),
                **tile, num_warps=_BACKWARD_WARPS,
            )  # fmt: skip
    return out


def _tiling(params: Tensor, images: Tensor) -> tuple[tuple[int], int, dict[str, int]]:
    """Grid, number of components, constants."""
    count, colors, height, width = images.shape
    components = params.shape[1] // (10 if colors == 3 else 3)
    padded = triton.next_power_of_2(components)
    pixels = max(1, _ELEMENTS // padded)
    grid = (triton.cdiv(count * height * width, pixels),)
    return grid, components, {"COLORS": colors, "PIXELS": pixels, "COMPONENTS": padded}
