"""Likelihood of mixtures of discretised logistics, and its gradient, a tile of components x pixels at a time.

`fastgen.ops.logistic_mixture_nll` is the definition.  With x the encoded level, h half the width of a bin, m the mean
and s the log scale of a component, and w = 2 h e^-s, a bin's mass is

    sigma(a) - sigma(b) = sigma(a) sigma(-b) (1 - e^-w),   a = (x - m + h) e^-s,   b = (x - m - h) e^-s,

sigma(a) alone for the lowest level and sigma(-b) for the highest.  A component's joint probability is kept as e^L R:

    sigma(a) = e^min(a, 0) / (1 + e^-|a|),   1 - e^-w = e^-s 2 h (1 - e^-w) / w,

exponents are summed in L, and R, a product of factors that are neither tiny nor large, takes the rest.  So a component
needs no logarithm; a pixel needs two.

A program reads each parameter once, in the layout that the tensor has, and holds the derivatives of its components in
registers until the sum over all components is known.  Arithmetic is float32.  (The parameters are the kernel's
`values`: Triton's launcher cannot do with an argument called `params`.)

The gradient with respect to the result is nearly always one number, that of the previous step: the result is averaged.
So the training forward pass assumes that number and writes the gradient along with the result; the backward pass
compares, tile by tile, and computes again where the assumption was wrong.  No bit of a result depends on it.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.elementary import clamp, exp2_flushed, exp_bounded, reciprocal
from fastgen.kernels.launch import device_of, launched_directly

_ROWS = 2  # threads that share the components of a pixel: fewer have too many numbers to hold, more are idle more often
_CLOSE_ROWS = 16  # of channels-last parameters
_THREADS = 64  # of a program
_WARPS = _THREADS // 32
_CHECKED = 8  # tiles that a program compares
_MIN_LOG_SCALE = tl.constexpr(-7.0)
_FAR = tl.constexpr(3.4028234e38 / 16)  # sums of six such numbers are finite
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tanh(x):
    """Within 2^-23 of tanh x."""
    e = exp2_flushed(tl.abs(x) * (-2 * _LOG2_E))
    t = (1.0 - e) * reciprocal(1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _bin(x, first, last, half, mean, log_scale):
    """L and R of a bin's mass but for 2h; what rounding adds to R, relative to it; and the derivatives of the mass's
    logarithm by mean and by log scale.
    """
    s = clamp(log_scale, _MIN_LOG_SCALE, _FAR)
    inverse = exp_bounded(-s)
    inner = ~(first | last)
    centre = clamp((x - mean) * inverse, -_FAR, _FAR)
    d = half * inverse
    # The lowest level has no lower end, the highest no upper one.
    upper = tl.where(last, _FAR, centre + d)
    lower = tl.where(first, -_FAR, centre - d)
    e_upper = exp2_flushed(tl.abs(upper) * -_LOG2_E)
    e_lower = exp2_flushed(tl.abs(lower) * -_LOG2_E)
    one_upper, one_lower = 1.0 + e_upper, 1.0 + e_lower
    sigmoids = reciprocal(one_upper * one_lower)
    width = d + d
    power = exp2_flushed(width * -_LOG2_E)
    p = 8.19328893e-3 + width * -1.12591650e-3
    p = -4.16320450e-2 + width * p
    p = 1.66662887e-1 + width * p
    p = -4.99999851e-1 + width * p
    p = 1.0 + width * p  # (1 - e^-w) / w for w <= 0.5, minimax
    share = tl.where(inner, tl.where(width < 0.5, p, (1.0 - power) * reciprocal(width)), 1.0)
    exponent = tl.minimum(upper, 0.0) - tl.maximum(lower, 0.0) - tl.where(inner, s, 0.0)
    by_upper = tl.where(upper > 0, e_upper, 1.0) * (one_lower * sigmoids)
    by_lower = tl.where(lower > 0, 1.0, e_lower) * (one_upper * sigmoids)
    by_mean = inverse * (by_lower - by_upper)
    by_scale = by_lower * lower - by_upper * upper - tl.where(inner, power * reciprocal(share), 0.0)
    lost = (e_upper - (one_upper - 1.0)) * one_lower + (e_lower - (one_lower - 1.0)) * one_upper
    lost = lost * sigmoids + tl.fma(one_upper * one_lower, sigmoids, -1.0 + 0.0 * sigmoids)
    return exponent, share * sigmoids, lost, by_mean, tl.where(log_scale < _MIN_LOG_SCALE, 0.0, by_scale)


@launched_directly(_WARPS)
@triton.jit
def _nll(
    values, images, nll, out, grad, guess, assumed, levels, size, tiles,
    ps_n, ps_c: tl.constexpr, ps_s, is_n, is_c, is_s, gs_n, gs_s, os_n, os_c: tl.constexpr, os_s,
    K: tl.constexpr, COLORS: tl.constexpr, ROWS: tl.constexpr, PIXELS: tl.constexpr, WHOLE: tl.constexpr,
    LARGE: tl.constexpr,
):  # fmt: skip
    """The result, the gradient or both of a tile of an image, each where there is a tensor for it.

    A thread has every ROWS-th component of a pixel, at addresses whose distances are constants: to compute them would
    cost registers, and the gradient of RGB would spill.  So unless parameters are channels-last the kernels are
    compiled anew for images of another size.  An image has `size` pixels, whole tiles if WHOLE.  `guess` [1] is the
    gradient with respect to the result that is assumed where `grad` is None, 0 for none; `assumed` [tiles of all
    images] gets what was assumed, NaN for nothing.
    """
    n = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = _wide(tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS), LARGE)
    exists = pixel < size
    if WHOLE:
        exists = pixel >= 0
    g = tl.zeros([PIXELS], tl.float32)
    if grad is not None:
        g = tl.load(grad + n * gs_n + pixel * gs_s, exists, 0.0)
    elif guess is not None:
        g = tl.load(guess + pixel * 0)
    _tile(
        values, images, nll, out, g, assumed, n, pixel, exists, K, levels, size,
        ps_n, ps_c, ps_s, is_n, is_c, is_s, os_n, os_c, os_s, COLORS, ROWS, PIXELS, WHOLE, LARGE,
    )  # fmt: skip


@launched_directly(_WARPS)
@triton.jit
def _complete(
    values, images, out, grad, guess, assumed, levels, size, tiles, total,
    ps_n, ps_c: tl.constexpr, ps_s, is_n, is_c, is_s, gs_n, gs_s, os_n, os_c: tl.constexpr, os_s,
    K: tl.constexpr, COLORS: tl.constexpr, ROWS: tl.constexpr, PIXELS: tl.constexpr, WHOLE: tl.constexpr,
    LARGE: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """The gradient where another one of the result was assumed than `grad`; the first program's becomes the `guess`."""
    first = tl.program_id(0) * CHECKED
    tile = first + tl.arange(0, CHECKED)[:, None]
    pixel = _wide(tile % tiles * PIXELS + tl.arange(0, PIXELS)[None, :], LARGE)
    exists = (tile < total) & (pixel < size)
    g = tl.load(grad + (tile // tiles).to(tl.int64) * gs_n + pixel * gs_s, exists, 0.0)
    before = tl.load(assumed + tile, tile < total, 0.0)
    if tl.program_id(0) == 0:
        least = tl.min(tl.min(tl.where(exists, g, float("inf")), 1), 0)
        most = tl.max(tl.max(tl.where(exists, g, -float("inf")), 1), 0)
        tl.store(guess, tl.where(least == most, most, 0.0))
    if tl.max(tl.max((exists & (g != before)).to(tl.int32), 1), 0) > 0:
        for i in range(CHECKED):
            if first + i < total:
                n = ((first + i) // tiles).to(tl.int64)
                at = _wide((first + i) % tiles * PIXELS + tl.arange(0, PIXELS), LARGE)
                here = at < size
                if WHOLE:
                    here = at >= 0
                _tile(
                    values, images, None, out, tl.load(grad + n * gs_n + at * gs_s, here, 0.0), None, n, at, here,
                    K, levels, size, ps_n, ps_c, ps_s, is_n, is_c, is_s, os_n, os_c, os_s, COLORS, ROWS, PIXELS, WHOLE,
                    LARGE,
                )  # fmt: skip


@triton.jit
def _tile(
    values, images, nll, out, g, assumed, n, pixel, exists, K: tl.constexpr, levels, size,
    ps_n, ps_c: tl.constexpr, ps_s, is_n, is_c, is_s, os_n, os_c: tl.constexpr, os_s,
    COLORS: tl.constexpr, ROWS: tl.constexpr, PIXELS: tl.constexpr, WHOLE: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    row = _wide(tl.arange(0, ROWS)[:, None], LARGE)
    base = values + n * ps_n + (pixel * ps_s)[None, :]
    at = images + n * is_n + pixel * is_s
    half = tl.div_rn(1.0, (levels - 1).to(tl.float32))  # PyTorch has it rounded once
    red, first_r, last_r, wrong, inners = _level(at, exists, levels)
    if COLORS == 3:
        green, first_g, last_g, wrong_g, inner_g = _level(at + is_c, exists, levels)
        blue, first_b, last_b, wrong_b, inner_b = _level(at + 2 * is_c, exists, levels)
        wrong = wrong | wrong_g | wrong_b
        inners += inner_g + inner_b
    logits, exponents, rests, losses, derivatives = (), (), (), (), ()
    STEPS: tl.constexpr = (K + ROWS - 1) // ROWS
    for step in tl.static_range(STEPS):
        k = step * ROWS + row
        inside = _inside(k, exists, K, step * ROWS + ROWS > K, WHOLE)
        logit = _read(base, k, ps_c, inside)
        if step * ROWS + ROWS > K:
            logit = tl.where(k < K, logit, float("-inf"))
        mean, scale = _read(base, K + k, ps_c, inside), _read(base, 2 * K + k, ps_c, inside)
        exponent, rest, lost, by_mean, by_scale = _bin(red, first_r, last_r, half, mean, scale)
        found = (by_mean, by_scale)
        if COLORS == 3:
            in_green = _tanh(_read(base, 3 * K + k, ps_c, inside))
            mean, scale = _read(base, 4 * K + k, ps_c, inside) + in_green * red, _read(base, 5 * K + k, ps_c, inside)
            more, factor, _, by_mean, by_scale = _bin(green, first_g, last_g, half, mean, scale)
            exponent += more
            rest *= factor
            found = found + (by_mean * red * (1.0 - in_green * in_green), by_mean, by_scale)
            red_in, green_in = _tanh(_read(base, 6 * K + k, ps_c, inside)), _tanh(_read(base, 9 * K + k, ps_c, inside))
            mean = _read(base, 7 * K + k, ps_c, inside) + red_in * red + green_in * green
            more, factor, _, by_mean, by_scale = _bin(
                blue, first_b, last_b, half, mean, _read(base, 8 * K + k, ps_c, inside)
            )
            exponent += more
            rest *= factor
            found = found + (by_mean * red * (1.0 - red_in * red_in), by_mean, by_scale)
            found = found + (by_mean * green * (1.0 - green_in * green_in),)
        logits, exponents, rests = logits + (logit,), exponents + (exponent,), rests + (rest,)
        losses, derivatives = losses + (lost,), derivatives + found
    most = logits[0]
    for step in tl.static_range(1, STEPS):
        most = tl.maximum(most, logits[step])
    most = tl.max(most, 0)[None, :]
    top = exponents[0] + (logits[0] - most)
    for step in tl.static_range(1, STEPS):
        top = tl.maximum(top, exponents[step] + (logits[step] - most))
    top = tl.max(top, 0)[None, :]
    priors, posteriors = (), ()
    for step in tl.static_range(STEPS):
        beyond = logits[step] - most
        priors = priors + (exp2_flushed(beyond * _LOG2_E),)
        posteriors = posteriors + (exp2_flushed((exponents[step] + beyond - top) * _LOG2_E) * rests[step],)
    prior_sum, posterior_sum = priors[0], posteriors[0]
    for step in tl.static_range(1, STEPS):
        prior_sum += priors[step]
        posterior_sum += posteriors[step]
    prior_sum, posterior_sum = tl.sum(prior_sum, 0), tl.sum(posterior_sum, 0)
    if nll is not None:
        if COLORS == 1:  # a result may be small against 1
            lost = posteriors[0] * losses[0]
            for step in tl.static_range(1, STEPS):
                lost += posteriors[step] * losses[step]
            lost = tl.sum(lost, 0) / posterior_sum
        else:
            lost = 0.0
        result = tl.log(prior_sum) - tl.log(posterior_sum) - inners * tl.log(2.0 * half) - tl.sum(top, 0) + lost
        tl.store(nll + n * size + pixel, tl.where(wrong, float("nan"), result), exists)
    if out is not None:
        if assumed is not None:
            seen = tl.max(g, 0)  # the same number in all threads, whatever another stream does to it
            g = tl.zeros([PIXELS], tl.float32) + seen
            exists = exists & (g != 0)
            tl.store(assumed + tl.program_id(0), tl.where(seen != 0, seen, float("nan")))
        to = out + n * os_n + (pixel * os_s)[None, :]
        of_prior, of_posterior = (g / prior_sum)[None, :], (g / posterior_sum)[None, :]
        KINDS: tl.constexpr = 9 if COLORS == 3 else 2
        for step in tl.static_range(STEPS):
            k = step * ROWS + row
            inside = _inside(k, exists, K, step * ROWS + ROWS > K, WHOLE and assumed is None)
            weight = posteriors[step] * of_posterior
            _write(to, k, os_c, priors[step] * of_prior - weight, inside)
            for kind in tl.static_range(KINDS):
                value = derivatives[step * KINDS + kind] * -weight
                _write(to, (kind + 1) * K + k, os_c, value, inside)


@triton.jit
def _wide(index, LARGE: tl.constexpr):
    """Of an image whose elements are too far apart for offsets of 32 bits."""
    return index.to(tl.int64) if LARGE else index


@triton.jit
def _inside(k, exists, K: tl.constexpr, PADDED: tl.constexpr, WHOLE: tl.constexpr):
    """Which elements exist; None for all."""
    if PADDED:
        inside = (k < K) & exists[None, :]
    elif WHOLE:
        inside = None
    else:
        inside = (k >= 0) & exists[None, :]
    return inside


@triton.jit
def _read(pointer, parameter, stride, inside):
    return tl.load(pointer + parameter * stride, inside, None if inside is None else 0.0).to(tl.float32)


@triton.jit
def _write(pointer, parameter, stride, value, inside):
    tl.store(pointer + parameter * stride, value.to(pointer.dtype.element_ty), inside)


@triton.jit
def _level(at, exists, levels):
    """Of a colour: what the network reads, [1, PIXELS]; whether the level is the lowest, the highest; out of range, and
    neither, as numbers [PIXELS].
    """
    level = tl.load(at, exists, 0).to(tl.int32)
    first, last = level == 0, level == levels - 1
    x = level.to(tl.float32) * tl.div_rn(2.0, (levels - 1).to(tl.float32)) - 1.0
    return x[None, :], first[None, :], last[None, :], level >= levels, tl.where(first | last, 0.0, 1.0)


def forward(params: Tensor, images: Tensor, levels: int) -> Tensor:
    """float32 [N, H, W]; NaN where a level is out of range: a kernel cannot raise, and checking would wait for it."""
    params, images = _with_flat_images(params), _with_flat_images(images)
    nll = _empty_nll(params)
    _launch(params, images, levels, nll, None)
    return nll


def training_forward(params: Tensor, images: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """`forward`; the gradient of params for an assumed gradient of the result; and what was assumed, for `backward`."""
    kept, images = _with_flat_images(params), _with_flat_images(images)
    nll, gradient = _empty_nll(params), torch.empty_like(kept)
    tiles = _tiling(kept, images)[1]
    assumed = torch.empty(tiles * len(images), dtype=torch.float32, device=params.device)
    _launch(kept, images, levels, nll, gradient, assumed=assumed)
    return nll, gradient, assumed


def backward(
    grad: Tensor, params: Tensor, images: Tensor, levels: int,
    gradient: Tensor | None = None, assumed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Gradient of params, in their dtype and layout; `gradient`, completed in place, of a training forward pass."""
    kept, images = _with_flat_images(params), _with_flat_images(images)
    if _pixel_stride(grad) is None:
        grad = grad.contiguous()
    if gradient is None:
        gradient = torch.empty_like(kept)
    _launch(kept, images, levels, None, gradient, grad, assumed)
    return gradient if kept is params else torch.empty_like(params).copy_(gradient)


def _launch(
    params: Tensor, images: Tensor, levels: int, nll: Tensor | None, out: Tensor | None,
    grad: Tensor | None = None, assumed: Tensor | None = None,
) -> None:  # fmt: skip
    if params.numel() == 0:
        return
    count, _, height, width = params.shape
    constants, tiles = _tiling(params, images)
    guess = None if assumed is None else _guess(params.device)
    strides = [*_strides(params), *_strides(images)]
    strides += (0, 0) if grad is None else (grad.stride(0), _pixel_stride(grad))
    strides += (0, 0, 0) if out is None else _strides(out)
    with device_of(params):
        if grad is not None and assumed is not None:
            total = tiles * count
            _complete[lambda _: (-(-total // _CHECKED),)](
                params, images, out, grad, guess, assumed, levels, height * width, tiles, total, *strides, **constants,
                CHECKED=_CHECKED,
            )  # fmt: skip
            return
        _nll[lambda _: (tiles * count,)](
            params, images, nll, out, grad, guess, assumed, levels, height * width, tiles, *strides, **constants
        )


def _empty_nll(params: Tensor) -> Tensor:
    count, _, height, width = params.shape
    return torch.empty((count, height, width), dtype=torch.float32, device=params.device)


@functools.cache
def _guess(device: torch.device) -> Tensor:
    """What a training forward pass assumes, [1]: what the last backward pass saw, 0 where it was not one number."""
    return torch.zeros(1, device=device)


def _tiling(params: Tensor, images: Tensor) -> tuple[dict[str, int | bool], int]:
    """Constants, and tiles of an image."""
    colors, height, width = images.shape[1:]
    components = params.shape[1] // (10 if colors == 3 else 3)
    rows = min(_CLOSE_ROWS if params.stride(1) == 1 else _ROWS, 1 << (components - 1).bit_length())
    pixels = _THREADS // rows
    constants = {
        "K": components, "COLORS": colors, "ROWS": rows, "PIXELS": pixels, "WHOLE": height * width % pixels == 0,
        "LARGE": max(_extent(params), _extent(images)) >= 2**31,
    }  # fmt: skip
    return constants, -(-height * width // pixels)


def _extent(tensor: Tensor) -> int:
    """Elements of memory from the first of an image to its last."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))


def _strides(tensor: Tensor) -> tuple[int, int, int | None]:
    """Of [N, C, H, W]: those of images, channels and pixels."""
    return tensor.stride(0), tensor.stride(1), _pixel_stride(tensor)


def _pixel_stride(tensor: Tensor) -> int | None:
    """From one pixel of an image to the next; None where it is not one number."""
    *_, vertical, horizontal = tensor.stride()
    *_, height, width = tensor.shape
    if width == 1:
        return vertical
    return horizontal if height == 1 or vertical == width * horizontal else None


def _with_flat_images(tensor: Tensor) -> Tensor:
    return tensor if _pixel_stride(tensor) is not None else tensor.contiguous()
