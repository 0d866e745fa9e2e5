"""Decoders and generators that upsample by repeating pixels, accelerated: of VQGAN, latent diffusion and SNGAN; and
the cells that NVAE's decoder is made of.

As `bench.generator`, whose providers these are. The floor counts products with every repeated pixel, as the layers are
written, so that a convolution that reads what was upsampled may pass it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.generator import build
from bench.harness.case import Case

TESTS = ("tests/acceleration/test_decoders.py", "tests/acceleration/test_architectures.py")


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class ResidualBlock(nn.Module):
    def __init__(self, inner: int, outer: int, groups: int):
        super().__init__()
        self.inner, self.outer = inner, outer
        self.norm1, self.conv1 = nn.GroupNorm(groups, inner, eps=1e-6), nn.Conv2d(inner, outer, 3, 1, 1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, outer, eps=1e-6), nn.Conv2d(outer, outer, 3, 1, 1)
        self.dropout = nn.Dropout(0.0)
        if inner != outer:
            self.nin_shortcut = nn.Conv2d(inner, outer, 1)

    def forward(self, x: Tensor, temb: Tensor | None) -> Tensor:
        h = self.conv1(swish(self.norm1(x)))
        if temb is not None:
            h = h + temb[:, :, None, None]
        h = self.conv2(self.dropout(swish(self.norm2(h))))
        if self.inner != self.outer:
            x = self.nin_shortcut(x)
        return x + h


class AttentionBlock(nn.Module):
    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        b, c, height, width = q.shape
        q, k = q.reshape(b, c, height * width).permute(0, 2, 1), k.reshape(b, c, height * width)
        weights = F.softmax(torch.bmm(q, k) * (int(c) ** (-0.5)), dim=2).permute(0, 2, 1)
        h = torch.bmm(v.reshape(b, c, height * width), weights).reshape(b, c, height, width)
        return x + self.proj_out(h)


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class LatentDecoder(nn.Module):
    """Esser et al. 2021 (VQGAN) and Rombach et al. 2022 (latent diffusion), as their code has it.

    `multiples` of `width` are the channels of each level, from the image on; maps of `attention` pixels across have
    attention; z [N, latent, size, size].
    """

    def __init__(
        self,
        width: int = 128,
        multiples: Sequence[int] = (1, 1, 2, 2, 4),
        latent: int = 256,
        size: int = 16,
        attention: int | None = 16,
        blocks: int = 2,
        groups: int = 32,
    ):
        super().__init__()
        inner = width * multiples[-1]
        self.latent, self.size = latent, size
        self.conv_in, self.mid, self.up = nn.Conv2d(latent, inner, 3, 1, 1), nn.Module(), nn.ModuleList()
        self.mid.block_1, self.mid.block_2 = (ResidualBlock(inner, inner, groups) for _ in range(2))
        self.mid.attn_1 = AttentionBlock(inner, groups)
        for level in reversed(range(len(multiples))):
            up: Any = nn.Module()
            up.block, up.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(blocks + 1):
                up.block.append(ResidualBlock(inner, width * multiples[level], groups))
                inner = width * multiples[level]
                if size == attention:
                    up.attn.append(AttentionBlock(inner, groups))
            if level:
                up.upsample, size = Upsample(inner), 2 * size
            self.up.insert(0, up)
        self.norm_out, self.conv_out = nn.GroupNorm(groups, inner, eps=1e-6), nn.Conv2d(inner, 3, 3, 1, 1)

    def forward(self, z: Tensor) -> Tensor:
        self.last_z_shape = z.shape
        temb = None
        h = self.mid.block_1(self.conv_in(z), temb)
        h = self.mid.block_2(self.mid.attn_1(h), temb)
        for level in reversed(range(len(self.up))):
            up: Any = self.up[level]
            for i, block in enumerate(up.block):
                h = block(h, temb)
                if len(up.attn) > 0:
                    h = up.attn[i](h)
            if level != 0:
                h = up.upsample(h)
        return self.conv_out(swish(self.norm_out(h)))

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, self.latent, self.size, self.size),)


class UpBlock(nn.Module):
    def __init__(self, inner: int, outer: int):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inner), nn.BatchNorm2d(outer)
        self.conv1, self.conv2 = nn.Conv2d(inner, outer, 3, 1, 1), nn.Conv2d(outer, outer, 3, 1, 1)
        self.shortcut = nn.Conv2d(inner, outer, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.interpolate(F.relu(self.bn1(x)), scale_factor=2))
        h = self.conv2(F.relu(self.bn2(h)))
        return h + self.shortcut(F.interpolate(x, scale_factor=2))


class SNGAN(nn.Module):
    """Miyato et al. 2018, the ResNet generator for CIFAR-10."""

    def __init__(self, width: int = 256, latent: int = 128):
        super().__init__()
        self.width, self.latent = width, latent
        self.linear = nn.Linear(latent, 16 * width)
        self.blocks = nn.Sequential(*[UpBlock(width, width) for _ in range(3)])
        self.bn, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, 3, 3, 1, 1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.blocks(self.linear(z).view(-1, self.width, 4, 4))
        return torch.tanh(self.conv(F.relu(self.bn(h))))

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, self.latent),)


class Cell(nn.Module):
    """The residual cell of NVAE's decoder, Vahdat and Kautz 2020, figure 3a."""

    def __init__(self, width: int, expansion: int = 6):
        super().__init__()
        inner, squeezed = expansion * width, max(width // 16, 4)
        self.residual = nn.Sequential(
            nn.BatchNorm2d(width), nn.Conv2d(width, inner, 1, bias=False),
            nn.BatchNorm2d(inner), nn.SiLU(), nn.Conv2d(inner, inner, 5, 1, 2, groups=inner, bias=False),
            nn.BatchNorm2d(inner), nn.SiLU(), nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.squeeze = nn.Sequential(
            nn.Linear(width, squeezed), nn.ReLU(), nn.Linear(squeezed, width), nn.Sigmoid()
        )  # and excite: Hu et al. 2018

    def forward(self, x: Tensor) -> Tensor:
        h = self.residual(x)
        return x + 0.1 * h * self.squeeze(h.mean((2, 3)))[:, :, None, None]


class NVAECells(nn.Module):
    def __init__(self, width: int = 128, size: int = 16, count: int = 4):
        super().__init__()
        self.cells = nn.Sequential(*[Cell(width) for _ in range(count)])
        self.shape = (width, size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x)

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, *self.shape),)


VQGAN = partial(LatentDecoder)
LATENT_DIFFUSION = partial(LatentDecoder, multiples=(1, 2, 4, 4), latent=4, size=32, attention=None)
QUICK = {"width": 4, "multiples": (1, 2), "latent": 3, "size": 4, "attention": 4, "blocks": 1, "groups": 2}


def cases(quick: bool) -> list[Case]:
    if quick:
        kinds: list[tuple[str, Any, tuple[int, ...]]] = [
            ("VQGAN", partial(LatentDecoder, **QUICK), (1,)),  # type: ignore[arg-type]
            ("SNGAN", partial(SNGAN, 4, 3), (2,)),
            ("NVAE cells", partial(NVAECells, 4, 3, 1), (2,)),
        ]
    else:
        kinds = [
            ("VQGAN f16, 3x256x256", VQGAN, (1,)),
            ("latent diffusion f8, 3x256x256", LATENT_DIFFUSION, (1,)),
            ("SNGAN 3x32x32", SNGAN, (1, 16)),
            ("four cells of NVAE, 128x16x16", NVAECells, (1, 16)),
        ]
    return [
        Case(f"{name}, batch {batch}", {"batch": batch}, partial(build, kind, (), batch, not quick))
        for name, kind, batches in kinds
        for batch in batches
    ]
