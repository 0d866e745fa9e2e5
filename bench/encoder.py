"""Networks of ordinary convolutions, accelerated: encoders, classifiers, a U-Net, couplings of a flow, discriminators.

As `bench.generator`, whose providers these are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.generator import build
from bench.harness.case import Case

TESTS = ("tests/acceleration/test_accelerate.py", "tests/ops/test_conv2d_bn_act.py", "tests/ops/test_conv_sequence.py")


def block(inputs: int, outputs: int, kernel: int, stride: int = 1, act: bool = True) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(True) if act else nn.Identity())


class Bottleneck(nn.Module):
    """He et al. 2016, figure 5."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        outputs = 4 * width
        first, middle = block(inputs, width, 1), block(width, width, 3)
        self.convs = nn.Sequential(first, middle, block(width, outputs, 1, act=False))
        self.shortcut = block(inputs, outputs, 1, act=False) if inputs != outputs else nn.Identity()
        self.relu = nn.ReLU(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.convs(x) + self.shortcut(x))


class Images(nn.Module):
    """Of images [N, channels, size, size]."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.shape = (channels, size, size)

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, *self.shape),)


class Bottlenecks(Images):
    """Two stages of them, as between the ends of a ResNet-50 for images of 32 pixels."""

    def __init__(self, width: int = 64, size: int = 32):
        super().__init__(width, size)
        widths = [(width, width), (4 * width, width), (4 * width, 2 * width), (8 * width, 2 * width)]
        self.blocks = nn.Sequential(*[Bottleneck(*pair) for pair in widths])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class UNet(Images):
    """Ronneberger et al. 2015, with padding and BatchNorm, as it is mostly written: four levels."""

    def __init__(self, width: int = 32, size: int = 128):
        super().__init__(3, size)
        widths = [3, width, 2 * width, 4 * width, 8 * width]
        self.pool = nn.MaxPool2d(2)
        self.down = nn.ModuleList([self._double(a, b) for a, b in zip(widths, widths[1:], strict=False)])
        levels = list(zip(widths[:1:-1], widths[-2:0:-1], strict=True))
        self.up = nn.ModuleList([nn.ConvTranspose2d(a, b, 2, 2) for a, b in levels])
        self.join = nn.ModuleList([self._double(a, b) for a, b in levels])
        self.last = nn.Conv2d(width, 3, 1)

    @staticmethod
    def _double(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(block(inputs, outputs, 3), block(outputs, outputs, 3))

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for i, down in enumerate(self.down):
            skips.append(down(self.pool(skips[-1]) if i else x))
        h = skips.pop()
        for up, join in zip(self.up, self.join, strict=True):
            h = join(torch.cat([skips.pop(), up(h)], 1))
        return self.last(h)


class Couplings(Images):
    """Kingma and Dhariwal 2018 (Glow), section 3.3: affine couplings, without the mixing of channels between them."""

    def __init__(self, width: int = 512, channels: int = 12, size: int = 16, steps: int = 4):
        super().__init__(channels, size)
        half = channels // 2
        self.networks = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv2d(half, width, 3, padding=1), nn.ReLU()),
                *(nn.Conv2d(width, width, 1), nn.ReLU()),
                nn.Conv2d(width, channels, 3, padding=1),
            )
            for _ in range(steps)
        )

    def forward(self, x: Tensor) -> Tensor:
        for network in self.networks:
            a, b = x.chunk(2, 1)
            scale, shift = network(a).chunk(2, 1)
            x = torch.cat([b * torch.sigmoid(scale + 2) + shift, a], 1)
        return x


class Discriminator(Images):
    """Isola et al. 2017: 70x70 patches."""

    def __init__(self, width: int = 64, size: int = 64):
        super().__init__(3, size)
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        for i, stride in enumerate((2, 2, 1)):
            conv = nn.Conv2d(width << i, width << (i + 1), 4, stride, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(width << (i + 1)), nn.LeakyReLU(0.2, True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Classifier(Images):
    """Of digits, as in many a first program."""

    def __init__(self, width: int = 16, size: int = 28):
        super().__init__(1, size)
        self.features = nn.Sequential(block(1, width, 3), block(width, width, 3), nn.MaxPool2d(2))
        self.more = nn.Sequential(block(width, 2 * width, 3), block(2 * width, 2 * width, 3), nn.AdaptiveAvgPool2d(1))
        self.linear = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.more(self.features(x)).flatten(1))


NETWORKS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {  # sizes where it is quick, batches
    "ResNet bottlenecks 64x32x32": (Bottlenecks, (3, 4), (1, 16)),
    "U-Net 3x128x128": (UNet, (2, 16), (1,)),
    "Glow couplings 12x16x16": (Couplings, (4, 4, 4, 2), (1, 16)),
    "PatchGAN 3x64x64": (Discriminator, (4, 32), (1, 16)),
    "digit classifier 1x28x28": (Classifier, (3, 8), (1, 16)),
}


def cases(quick: bool) -> list[Case]:
    return [
        Case(f"{name}, batch {batch}", {"batch": batch}, partial(build, kind, small if quick else (), batch, not quick))
        for name, (kind, small, batches) in NETWORKS.items()
        for batch in (batches[:1] if quick else batches)
    ]
