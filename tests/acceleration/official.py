"""A generator in the style of NVIDIA's StyleGAN2, which makes integers of sizes and asserts much; in a module of its
own, as pytest rewrites assertions in modules of tests.
"""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_shape(x, expected):
    if x.ndim != len(expected):
        raise AssertionError(f"{x.ndim} dimensions, expected {len(expected)}")
    for i, (size, wanted) in enumerate(zip(x.shape, expected)):  # noqa: B905
        if wanted is None:
            pass
        elif isinstance(wanted, torch.Tensor) or isinstance(size, torch.Tensor):
            raise TypeError
        elif size != wanted:
            raise AssertionError(f"size {i} is {size}, expected {wanted}")


def labelled(function):
    def decorated(*args, **kwargs):
        with torch.autograd.profiler.record_function(function.__name__):
            return function(*args, **kwargs)

    return decorated


@labelled
def resample(x, kernel, pad, gain=1.0):
    assert isinstance(x, torch.Tensor) and x.ndim == 4
    assert kernel.dtype == torch.float32 and not kernel.requires_grad
    n, channels, height, width = x.shape
    x = F.pad(x.reshape([n, channels, height, 1, width, 1]), [0, 0, 0, 0, 0, 0])
    x = F.pad(x.reshape([n, channels, height, width]), [pad, pad, pad, pad])
    x = x[:, :, 0 : x.shape[2] - max(-pad, 0), 0 : x.shape[3] - max(-pad, 0)]
    kernel = (kernel * gain ** (kernel.ndim / 2)).to(x.dtype).flip(list(range(kernel.ndim)))
    kernel = kernel[np.newaxis, np.newaxis].repeat([channels, 1] + [1] * kernel.ndim)
    x = F.conv2d(input=x, weight=kernel, bias=None, stride=1, padding=0, dilation=1, groups=channels)
    return x[:, :, ::1, ::1]


def sizes_of(weight):
    with quiet():
        sizes = [int(size) for size in weight.shape]
    check_shape(weight, sizes)
    return sizes


def convolve(x, weight, kernel, groups, up):
    assert isinstance(groups, int) and groups >= 1
    outer, inner, height, width = sizes_of(weight)
    if height == 1 and width == 1 and x.stride()[1] == 1:
        return F.conv2d(x.contiguous(), weight, groups=groups).to(memory_format=torch.channels_last)
    if not up:
        return F.conv2d(x, weight, padding=height // 2, groups=groups)
    if groups == 1:
        weight = weight.transpose(0, 1)
    else:
        weight = weight.reshape(groups, outer // groups, inner, height, width).transpose(1, 2)
        weight = weight.reshape(groups * inner, outer // groups, height, width)
    x = F.conv_transpose2d(x, weight, stride=2, padding=[max(height - 3, 0), max(width - 3, 0)], groups=groups)
    return resample(x, kernel, 1, gain=4)


class Layer(nn.Module):
    def __init__(self, inner=4, outer=5, kernel=3, up=False):
        super().__init__()
        self.affine, self.weight = nn.Linear(6, inner), nn.Parameter(torch.randn(outer, inner, kernel, kernel))
        self.bias, self.strength = nn.Parameter(torch.randn(outer)), nn.Parameter(torch.ones([]))
        self.register_buffer("noise", torch.randn(14, 14))
        self.register_buffer("kernel", torch.rand(4, 4))
        self.up, self.gain = up, 1 / np.sqrt(inner)

    def forward(self, x, w, noise="random", fused=True, gain=1):
        assert noise in ("random", "const", "none")
        check_shape(x, [None, self.weight.shape[1], None, None])
        styles = self.affine(w) * self.gain
        batch = x.shape[0]
        check_shape(styles, [batch, x.shape[1]])
        added = None
        if noise == "random":
            added = torch.randn([x.shape[0], 1, 1, 1], device=x.device) * self.strength
        if noise == "const":
            added = self.noise * self.strength
        weights = self.weight.unsqueeze(0) * styles.reshape(batch, 1, -1, 1, 1)
        weights = weights * (weights.square().sum(dim=[2, 3, 4]) + 1e-8).rsqrt().reshape(batch, -1, 1, 1, 1)
        if not fused:
            raise NotImplementedError
        batch = int(batch)
        check_shape(x, [batch, self.weight.shape[1], None, None])
        x = x.reshape(1, -1, *x.shape[2:])
        weights = weights.reshape(-1, *self.weight.shape[1:])
        x = convolve(x, weights.to(x.dtype), self.kernel, batch, self.up)
        x = x.reshape(batch, -1, *x.shape[2:])
        if added is not None:
            x = x.add_(added[: x.shape[2], : x.shape[3]] if noise == "const" else added)
        bias = self.bias.to(x.dtype)
        assert 0 <= 1 < x.ndim and bias.shape[0] == x.shape[1]
        x = x + bias.reshape([-1 if i == 1 else 1 for i in range(x.ndim)])
        return F.leaky_relu(x, 0.2) * (float(np.sqrt(2)) * gain)


class Network(nn.Module):
    """Layers by number, arguments passed on, a list of styles."""

    def __init__(self, kernel=3):
        super().__init__()
        self.const, self.count = nn.Parameter(torch.randn(4, 7, 7)), 2
        self.layer0, self.layer1 = Layer(4, 4, kernel), Layer(4, 5, 3, up=True)

    def forward(self, ws, scale=1.0, **options):
        check_shape(ws, [None, self.count, 6])
        styles = iter(ws.unbind(dim=1))
        x = self.const.unsqueeze(0).repeat([ws.shape[0], 1, 1, 1])
        for i in range(self.count):
            x = getattr(self, f"layer{i}")(x, next(styles), **options)
        return x * scale
