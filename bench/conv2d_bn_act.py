"""conv2d_bn_act against the Sequential(Conv2d, BatchNorm2d, ReLU) that it replaces, in inference and in training.

Layers of discriminators, encoders and VQ-VAEs, and the whole discriminator of a DCGAN, a step of which also takes the
gradient of its images, as the step of a generator needs it; and depthwise layers, in inference alone. The first layer
of a network, and kernels of one element, are left to PyTorch: what is measured there is that nothing is lost. The
providers and what is counted are those of `bench.conv_transpose2d_bn_act`.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.conv_transpose2d_bn_act import Config, Layer, case, step
from bench.harness.case import Case, Provider, Work
from bench.harness.layers import convolution_products
from bench.vae import plain

TESTS = ("tests/ops/test_conv2d_bn_act.py", "tests/ops/test_conv_training.py", "tests/nn/test_conv_bn_act.py")

DOWN, SAME = Config(4, 2, 1, transposed=False), Config(3, 1, 1, transposed=False)
LAYERS = [
    *((DOWN, Layer(64, 64, 128, 32)), (DOWN, Layer(64, 128, 256, 16)), (DOWN, Layer(64, 256, 512, 8))),
    *((SAME, Layer(16, 64, 64, 32)), (SAME, Layer(16, 128, 128, 32)), (SAME, Layer(64, 256, 256, 8))),
    (SAME, Layer(1, 64, 64, 32)),
    *((DOWN, Layer(64, 3, 64, 64)), (Config(1, 1, 0, transposed=False), Layer(16, 256, 128, 8))),
]
DEPTHWISE = [
    (Config(3, 1, 1, transposed=False, depthwise=True), Layer(1, 64, 64, 64)),
    (Config(5, 1, 2, transposed=False, depthwise=True), Layer(16, 768, 768, 16)),
    (Config(7, 1, 3, transposed=False, depthwise=True), Layer(1, 96, 96, 32)),
]
LAST = (SAME, Layer(64, 32, 3, 32))
QUICK_LAYERS = [(DOWN, Layer(2, 32, 33, 6)), (SAME, Layer(2, 8, 6, 3))]


def build_discriminator(options: dict[str, Any], batch: int) -> Work:
    from fastgen import models

    torch.manual_seed(0)
    model = models.DCGAN(**options)
    channels, height, width = model.image_shape
    images, grad = torch.randn(batch, channels, height, width), torch.randn(batch)
    fast = model.discriminator.train()
    rows = images.contiguous(memory_format=torch.channels_last)

    def provider(module: nn.Module, x: Tensor, baseline: bool) -> Provider:
        return Provider(partial(step, module, x.clone().requires_grad_(), grad), baseline)

    eager = plain(fast)
    providers = {
        "eager": provider(eager, images, True),
        "eager channels_last": provider(copy.deepcopy(eager).to(memory_format=torch.channels_last), rows, True),
        "fastgen": provider(fast, rows, False),
        "fastgen contiguous": provider(copy.deepcopy(fast), images, False),
    }
    twin = plain(fast).eval()
    flops = 3 * 2 * batch * convolution_products(twin, lambda: twin(images[:1]))
    weights = sum(parameter.numel() for parameter in fast.parameters())
    return Work(providers, flops, 4 * (3 * weights + 2 * images.numel()))


def cases(quick: bool) -> list[Case]:
    layers = QUICK_LAYERS if quick else LAYERS
    result = [case(*layer, False, train) for train in (False, True) for layer in layers]
    if not quick:
        result += [case(*LAST, True, train) for train in (False, True)]
        result += [case(*layer, False, False) for layer in DEPTHWISE]
    options = (
        {"image_shape": (3, 16, 16), "num_filters": 2} if quick else {"image_shape": (3, 64, 64), "num_filters": 64}
    )
    for batch in (2,) if quick else (16, 64):
        shapes = {"batch": batch, "num_filters": options["num_filters"]}
        build = partial(build_discriminator, options, batch)
        result.append(Case(f"discriminator of DCGAN-64, batch {batch}, forward+backward", shapes, build))
    return result
