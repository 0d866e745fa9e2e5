"""Transposed convolution, BatchNorm and activation; `fastgen.ops.conv_transpose2d_bn_act` is the definition.

Inference is one tap-GEMM whose epilogue normalises and activates.  In training the epilogue leaves sums of each block
of rows, from which mean and variance are merged; a pass normalises and activates.  The backward pass reads the gradient
twice: for the sums over a channel, then for the gradient of the convolution's result, which two more products turn into
those of input and weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.elementary import exp, tanh
from fastgen.kernels.launch import device_of
from fastgen.kernels.tap_gemm import (
    Norm,
    Sums,
    Taps,
    activate,
    channels_last,
    empty_sums,
    normal_cdf,
    normalise,
    packed,
    tap_gemm,
    weight_gradient,
)

_ROWS, _COLUMNS = 16, 64  # of a tile of the passes over channels
_TILES = 8  # that a program of sums has at least, one below the other
_SUM_PROGRAMS = 256  # at most, below each other


class Options(NamedTuple):
    """The arguments of the operators after the tensors; there is one group, and dilation 1."""

    stride: Sequence[int]
    padding: Sequence[int]
    output_padding: Sequence[int]
    groups: int
    dilation: Sequence[int]
    training: bool
    eps: float
    activation: str
    parameter: float

    def output(self, input: Tensor, weight: Tensor) -> Tensor:
        sizes = zip(input.shape[2:], self.stride, self.padding, weight.shape[2:], self.output_padding, strict=True)
        size = [(n - 1) * s - 2 * p + k + extra for n, s, p, k, extra in sizes]
        return channels_last((input.shape[0], weight.shape[1], *size), input)


@triton.jit
def _tile(rows, C, row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Addresses [ROWS, COLUMNS] of the tile that starts at a row, which of them exist, and channels."""
    m = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    r = row + tl.arange(0, ROWS)
    return r.to(tl.int64)[:, None] * C + m[None, :], (r < rows)[:, None] & (m < C)[None, :], m


@triton.jit
def _derivative(x, ACTIVATION: tl.constexpr, parameter):
    """Of the activation at x."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, 1.0)  # 1 of NaN, as in PyTorch
    elif ACTIVATION == "leaky_relu":
        return tl.where(x > 0, 1.0, parameter)
    elif ACTIVATION == "elu":
        return tl.where(x > 0, 1.0, parameter * exp(x))
    elif ACTIVATION == "tanh":
        y = tanh(x)
        return 1.0 - y * y
    elif ACTIVATION == "sigmoid":
        e = exp(-tl.abs(x))
        return e / ((1.0 + e) * (1.0 + e))
    elif ACTIVATION == "silu":
        e = exp(-tl.abs(x))
        y = tl.where(x < 0, e, 1.0) / (1.0 + e)
        return y * (1.0 + x * (1.0 - y))
    elif ACTIVATION == "gelu":
        return normal_cdf(x) + x * exp(-0.5 * x * x) * 0.3989422804014327
    else:
        return x * 0.0 + 1.0


@triton.jit
def _normalise_and_activate(
    conv, out, mean, var, gamma, beta, parameter, eps, rows, C,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at, inside, m = _tile(rows, C, tl.program_id(0) * ROWS, ROWS, COLUMNS)
    x = tl.load(conv + at, inside, 0.0).to(tl.float32)
    if mean is not None:
        x = normalise(x, mean, var, gamma, beta, eps, m, m < C)
    tl.store(out + at, activate(x, ACTIVATION, parameter).to(out.dtype.element_ty), inside)


@triton.jit
def _before_norm(grad, conv, at, inside, m, mean, var, gamma, beta, parameter, eps, C, ACTIVATION: tl.constexpr):
    """Gradient of the BatchNorm's result, and the normalised values (without BatchNorm those of the convolution)."""
    g = tl.load(grad + at, inside, 0.0).to(tl.float32)
    x = tl.load(conv + at, inside, 0.0).to(tl.float32)
    before = x
    if mean is not None:
        x = normalise(x, mean, var, None, None, eps, m, m < C)
        before = x
        if gamma is not None:
            before *= tl.load(gamma + m, m < C, 0.0).to(tl.float32)[None, :]
        if beta is not None:
            before += tl.load(beta + m, m < C, 0.0).to(tl.float32)[None, :]
    g *= _derivative(before, ACTIVATION, parameter)
    return tl.where(inside, g, 0.0), tl.where(inside, x, 0.0)


@triton.jit
def _channel_sums(
    grad, conv, sums, products, mean, var, gamma, beta, parameter, eps, rows, C, LENGTH,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """[programs, C]: sums over LENGTH rows of the gradient behind the BatchNorm, and of its product with its input."""
    m = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(0) * LENGTH
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for row in range(first, tl.minimum(first + LENGTH, rows), ROWS):
        at, inside, m = _tile(rows, C, row, ROWS, COLUMNS)
        g, x = _before_norm(grad, conv, at, inside, m, mean, var, gamma, beta, parameter, eps, C, ACTIVATION)
        total += g
        product += g * x
    to = tl.program_id(0).to(tl.int64) * C + m
    tl.store(sums + to, tl.sum(total, 0), m < C)
    tl.store(products + to, tl.sum(product, 0), m < C)


@triton.jit
def _conv_gradient(
    grad, conv, out, sums, products, mean, var, gamma, beta, parameter, eps, rows, C, share,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradient of the convolution's result; `share` is 1 / rows where the statistics are those of the batch, else 0."""
    at, inside, m = _tile(rows, C, tl.program_id(0) * ROWS, ROWS, COLUMNS)
    g, x = _before_norm(grad, conv, at, inside, m, mean, var, gamma, beta, parameter, eps, C, ACTIVATION)
    if mean is not None:
        g -= share * (tl.load(sums + m, m < C, 0.0)[None, :] + x * tl.load(products + m, m < C, 0.0)[None, :])
        scale = 1.0 / tl.sqrt_rn(tl.load(var + m, m < C, 1.0).to(tl.float32) + eps)
        if gamma is not None:
            scale *= tl.load(gamma + m, m < C, 0.0).to(tl.float32)
        g *= scale[None, :]
    tl.store(out + at, g.to(out.dtype.element_ty), inside)


def forward(input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    bias, mean, var, gamma, beta = _dense(rest[:5])
    options = Options(*rest[5:])
    norm = None if mean is None or var is None else Norm(mean, var, gamma, beta)
    return _convolve(input, weight, options, bias, norm, options.activation)


def saving(input: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, result of the convolution, mean and variance; empty where the reference's are."""
    bias, mean, var, gamma, beta = _dense(rest[:5])
    options = Options(*rest[5:])
    empty = [input.new_empty(0) for _ in range(3)]
    if not options.training and mean is None and options.activation == "none":
        return _convolve(input, weight, options, bias), empty[0], empty[1], empty[2]
    sums = None
    if options.training:
        sums = empty_sums(options.output(input, weight), options.stride)
    conv = _convolve(input, weight, options, bias, sums=sums)
    norm = None
    if sums is not None:
        norm = Norm(*(value.to(input.dtype) for value in _merged(sums)), gamma, beta)
    elif mean is not None and var is not None:
        norm = Norm(mean.clone(), var.clone(), gamma, beta)
    out = torch.empty_like(conv)
    _over_channels(_normalise_and_activate, conv, conv, out, *(norm or (None,) * 4), options=options)
    return out, conv, norm.mean if norm else empty[1], norm.var if norm else empty[2]


def backward(
    grad: Tensor, input: Tensor, weight: Tensor, gamma: Tensor | None, beta: Tensor | None,
    conv: Tensor, mean: Tensor, var: Tensor, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, weight, bias, scale and shift; of the first two, empty ones where not needed."""
    options, (for_input, for_weight) = Options(*rest[:-1]), rest[-1]
    grad = grad.contiguous(memory_format=torch.channels_last)
    norm = Norm(mean, var, *_dense((gamma, beta))) if mean.numel() else (None,) * 4
    if conv.numel():
        by_shift, by_scale = _sums_over_channels(grad, conv, norm, options)
        share = 1.0 / (grad.numel() // grad.shape[1]) if options.training else 0.0
        grad_conv = torch.empty_like(grad)
        sums = (by_shift, by_scale)
        _over_channels(_conv_gradient, grad, grad, conv, grad_conv, *sums, *norm, options=options, extra=(share,))
    else:  # neither BatchNorm nor activation
        grad_conv, by_shift = grad, grad.sum((0, 2, 3), dtype=torch.float32)
        by_scale = torch.zeros_like(by_shift)
    taps = _taps(weight, options)
    grad_input, grad_weight = input.new_empty(0), input.new_empty(0)
    if for_input:
        grad_input = channels_last(input.shape, input)
        tap_gemm(grad_conv, packed(weight, taps, by_first=False), taps, grad_input, transposed=False)
    if for_weight:
        grad_weight = weight_gradient(input.contiguous(memory_format=torch.channels_last), grad_conv, taps)
    grad_bias = by_shift
    if options.training:
        grad_bias = torch.zeros_like(by_shift)  # a bias ahead of batch statistics changes nothing
    elif mean.numel():
        scale = (var.float() + options.eps).rsqrt()
        grad_bias = by_shift * (scale if gamma is None else scale * gamma)
    grads = [value.to(grad.dtype) for value in (grad_bias, by_scale)]
    return grad_input, grad_weight, grads[0], grads[1], by_shift.to(grad.dtype, copy=True)


def _convolve(
    input: Tensor, weight: Tensor, options: Options, bias: Tensor | None, norm: Norm | None = None,
    activation: str = "none", sums: Sums | None = None,
) -> Tensor:  # fmt: skip
    taps = _taps(weight, options)
    out = options.output(input, weight)
    tap_gemm(
        input.contiguous(memory_format=torch.channels_last), packed(weight, taps, by_first=True), taps, out,
        transposed=True, bias=bias, norm=norm, activation=activation, parameter=options.parameter,
        eps=options.eps, sums=sums,
    )  # fmt: skip
    return out


def _taps(weight: Tensor, options: Options) -> Taps:
    height, width = weight.shape[2:]
    stride, padding = ((int(first), int(second)) for first, second in (options.stride, options.padding))
    return Taps((height, width), stride, padding, height * width)


def _merged(sums: Sums) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel: T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating Formulae and a Pairwise
    Algorithm for Computing Sample Variances", 1979.
    """
    counts = sums.counts[:, None]
    count = counts.sum().clamp(min=1)
    mean = sums.sums.sum(0) / count
    between = counts * (sums.sums / counts.clamp(min=1) - mean).square()
    return mean, (sums.squares + between).sum(0) / count


def _over_channels(kernel: Any, like: Tensor, *args: Any, options: Options, extra: tuple[Any, ...] = ()) -> None:
    """A pass over channels-last images as [rows, C]."""
    channels = like.shape[1]
    rows = like.numel() // channels
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(channels, _COLUMNS))
    act = (options.parameter, options.eps, rows, channels)
    if rows:
        with device_of(like):
            kernel[grid](*args, *act, *extra, ACTIVATION=options.activation, ROWS=_ROWS, COLUMNS=_COLUMNS)


def _sums_over_channels(grad: Tensor, conv: Tensor, norm: Any, options: Options) -> tuple[Tensor, Tensor]:
    """[C]: sums of the gradient behind the BatchNorm, and of its product with the normalised values."""
    channels = grad.shape[1]
    rows = grad.numel() // channels
    length = _ROWS * max(_TILES, triton.cdiv(rows, _ROWS * _SUM_PROGRAMS))
    programs = triton.cdiv(rows, length)
    sums, products = (torch.zeros(programs, channels, dtype=torch.float32, device=grad.device) for _ in range(2))
    if rows:
        with device_of(grad):
            _channel_sums[programs, triton.cdiv(channels, _COLUMNS)](
                grad, conv, sums, products, *norm, options.parameter, options.eps, rows, channels, length,
                ACTIVATION=options.activation, ROWS=_ROWS, COLUMNS=_COLUMNS,
            )  # fmt: skip
    return sums.sum(0), products.sum(0)


def _dense(tensors: Any) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]
