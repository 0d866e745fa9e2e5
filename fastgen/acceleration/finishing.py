"""What follows a convolution element by element, sums, activation, gain and clamping, in one pass over its result.

StyleGAN2 adds noise for each position and a bias for each channel, applies a leaky ReLU and a gain: with the scale of
the output channels, which is left to this pass, five times through memory that no cache holds.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastgen import backends
from fastgen.acceleration import blocks
from fastgen.acceleration.deferred import plain
from fastgen.acceleration.deferred_images import Images
from fastgen.acceleration.scaled_weights import DTYPES
from fastgen.ops.conv_block import goes_straight
from fastgen.ops.feature_maps import native

_THREAD_ELEMENTS = 32768  # below, waking a thread costs more than it saves


def finish(
    value: Any,
    terms: tuple[Any, ...],
    methods: tuple[bool, ...],
    activation: str,
    parameter: float,
    gain: float,
    limit: float,
) -> Tensor:
    """The sum of a result that nobody else has and of terms that are added to it, activated, scaled and clamped; by
    `methods` some are terms of ``add_``, which takes none that are larger.
    """
    is_images = type(value) is Images
    x, scale = value.unscaled() if is_images else (value, None)
    given = None
    if x is not None and not torch.compiler.is_compiling() and goes_straight((x, *terms, scale)):
        given = _given(x, terms, scale)
    if given is None:
        return _one_by_one(plain(value), terms, methods, activation, parameter, gain, limit)
    if is_images:
        value.pending.clear()
    sizes, flags, tensors = given
    threads = max(1, min(torch.get_num_threads(), x.numel() // _THREAD_ELEMENTS))
    memory = [0 if tensor is None else tensor.data_ptr() for tensor in (x, *tensors)]
    act = getattr(backends.native_cpu().Activation, activation)
    native("scaled_act", x.dtype)(sizes, flags, threads, *memory, act, parameter, gain, limit)
    return x


_Given = tuple[tuple[int, int, int], tuple[bool, bool, bool], tuple[Tensor | None, Tensor | None, Tensor | None]]


def _given(x: Tensor, terms: tuple[Any, ...], scale: Tensor | None) -> _Given | None:
    """Sizes, flags and tensors of the native call; None if that cannot compute it."""
    planes = x.is_contiguous()
    if x.dim() != 4 or x.dtype not in DTYPES or 0 in x.shape:
        return None
    if not planes and not x.is_contiguous(memory_format=torch.channels_last):
        return None
    n, c, h, w = x.shape
    noise: Tensor | None = None
    bias: Tensor | None = None
    for term in terms:
        if term.dim() > 4:
            return None
        shape = (1,) * (4 - term.dim()) + tuple(term.shape)
        if shape == (1, c, 1, 1):
            bias = term.reshape(c) if bias is None else bias + term.reshape(c)
        elif shape[1:] == (1, h, w) and shape[0] in (1, n):
            noise = term.reshape(shape) if noise is None else noise + term.reshape(shape)
        else:
            return None
    if scale is not None:
        scale = scale.expand(scale.shape[0], c, 1, 1).contiguous()
    noise, bias = (None if tensor is None else tensor.contiguous() for tensor in (noise, bias))
    flags = not planes, scale is not None and scale.shape[0] == 1, noise is not None and noise.shape[0] == 1
    return (n, c, h * w), flags, (scale, noise, bias)


def _one_by_one(
    x: Tensor,
    terms: tuple[Any, ...],
    methods: tuple[bool, ...],
    activation: str,
    parameter: float,
    gain: float,
    limit: float,
) -> Tensor:
    for term, method in zip(terms, methods, strict=True):
        x = x.add_(term) if method else blocks.add_into(x, term)
    if activation != "none":
        x = blocks.activate_into(x, activation, parameter)
    x = x if gain == 1.0 else blocks.mul_into(x, gain)
    return x if limit == math.inf else x.clamp(-limit, limit)
