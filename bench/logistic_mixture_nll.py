"""logistic_mixture_nll against the formula in plain PyTorch, as the ports of PixelCNN++ write it.

The memory format of the parameters is in the name of the provider; plain "fastgen" and "compile" get channels_last,
which is what networks give on the CPU.  The formula moves the channels to the end first, for which contiguous
parameters are copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.case import Case, Provider, Work

TESTS = ("tests/ops/test_logistic_mixture_nll.py",)
EXP_FLOPS = 16  # of one exponential: range reduction and a polynomial of degree 6, fused or not
OTHER_FLOPS = 40  # for each component and colour, without the exponentials


@dataclass(frozen=True)
class Size:
    """A batch of images and the number of mixture components."""

    batch: int
    channels: int
    height: int
    width: int
    components: int

    @property
    def name(self) -> str:
        return f"{self.batch}x{self.channels}x{self.height}x{self.width} {self.components} components"

    @property
    def pixels(self) -> int:
        return self.batch * self.height * self.width

    @property
    def params(self) -> int:
        return self.components * (10 if self.channels == 3 else 3)


SIZES = [
    Size(16, 3, 32, 32, 10),  # the bar of the project
    Size(1, 3, 32, 32, 10),
    Size(64, 1, 28, 28, 10),
    Size(16, 3, 64, 64, 5),
]
QUICK_SIZES = [Size(2, 3, 5, 7, 2), Size(2, 1, 5, 7, 3)]


def formula(params: Tensor, images: Tensor) -> Tensor:
    """Nats of each pixel [N, H, W], for 256 levels."""
    channels = images.shape[1]
    kinds = 3 if channels == 3 else 2
    components = params.shape[1] // (1 + channels * kinds)
    params = params.permute(0, 2, 3, 1)
    logits = params[..., :components]
    own = params[..., components:].reshape(*params.shape[:3], channels, kinds * components)
    means, log_scales = own[..., :components], own[..., components : 2 * components].clamp(min=-7.0)
    x = (images.permute(0, 2, 3, 1).to(params.dtype) * (2 / 255) - 1).unsqueeze(-1)
    if channels == 3:
        coefficients = torch.tanh(own[..., 2 * components :])
        red, green = x[..., 0, :], x[..., 1, :]
        mean_green = means[..., 1, :] + coefficients[..., 0, :] * red
        mean_blue = means[..., 2, :] + coefficients[..., 1, :] * red + coefficients[..., 2, :] * green
        means = torch.stack((means[..., 0, :], mean_green, mean_blue), dim=-2)
    centred = x - means
    inverse = torch.exp(-log_scales)
    upper, lower, middle = inverse * (centred + 1 / 255), inverse * (centred - 1 / 255), inverse * centred
    mass = torch.sigmoid(upper) - torch.sigmoid(lower)
    density = middle - log_scales - 2 * F.softplus(middle) - torch.log(torch.tensor(127.5))
    inner = torch.where(mass > 1e-5, torch.log(mass.clamp(min=1e-12)), density)
    log_probs = torch.where(x < -0.999, upper - F.softplus(upper), torch.where(x > 0.999, -F.softplus(lower), inner))
    return -torch.logsumexp(log_probs.sum(-2) + F.log_softmax(logits, dim=-1), dim=-1)


def backward(forward: Callable[..., Tensor], params: Tensor, images: Tensor) -> Tensor:
    """Forward pass and the gradient of the mean."""
    return torch.autograd.grad(forward(params, images).mean(), params)[0]


def without_grad(forward: Callable[..., Tensor], params: Tensor, images: Tensor) -> Tensor:
    with torch.no_grad():
        return forward(params, images)


def flops(size: Size, train: bool) -> int:
    """An exponential for each: mixture logit, component, inverse scale, the two parts of a bin's mass, coefficient."""
    coefficients = 3 if size.channels == 3 else 0
    exponentials = 2 + 3 * size.channels + coefficients
    one_pass = EXP_FLOPS * exponentials + OTHER_FLOPS * size.channels * (2 if train else 1)
    return size.pixels * size.components * one_pass


def build(size: Size, train: bool, with_compile: bool) -> Work:
    """Inputs and providers of one size; `train` adds the backward pass."""
    from fastgen import ops

    torch.manual_seed(0)
    params = torch.randn(size.batch, size.params, size.height, size.width)
    images = torch.randint(256, (size.batch, size.channels, size.height, size.width), dtype=torch.uint8)

    def provider(forward: Callable[..., Tensor], memory_format: torch.memory_format, baseline: bool) -> Provider:
        own = params.contiguous(memory_format=memory_format).clone().requires_grad_(train)
        return Provider(partial(backward if train else without_grad, forward, own, images), baseline)

    skipped = {}
    providers = {
        "contiguous": provider(formula, torch.contiguous_format, True),
        "channels_last": provider(formula, torch.channels_last, True),
    }
    if with_compile:
        try:
            providers["compile"] = provider(torch.compile(formula, dynamic=False), torch.channels_last, True)
            providers["compile"].call()
        except Exception as error:  # whatever the compiler's stack raises: it is not what is measured
            providers.pop("compile", None)
            skipped["compile"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    providers["fastgen"] = provider(ops.logistic_mixture_nll, torch.channels_last, False)
    providers["fastgen contiguous"] = provider(ops.logistic_mixture_nll, torch.contiguous_format, False)

    size_bytes = 4 * params.numel() * (2 if train else 1) + images.numel() + 4 * size.pixels
    return Work(providers, flops(size, train), size_bytes, skipped)


def cases(quick: bool) -> list[Case]:
    """Forward, and forward with backward, of every size."""
    result = []
    for size in QUICK_SIZES if quick else SIZES:
        shapes = {
            "params": [size.batch, size.params, size.height, size.width],
            "images": [size.batch, size.channels, size.height, size.width],
        }
        for train in (False, True):
            name = f"{size.name} {'forward+backward' if train else 'forward'}"
            with_compile = not quick and size is SIZES[0]
            result.append(Case(name, shapes, partial(build, size, train, with_compile)))
    return result
