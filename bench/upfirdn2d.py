"""upfirdn2d against its implementations in PyTorch: the blurs and resamplings of StyleGAN2, with its filter of 4x4.

"eager" pads and convolves each channel of each sample as an image of its own, as most code does on a CPU, "eager
groups" channels as groups; fastgen is measured on both layouts. Compulsory are a read and a write; products are counted
without those of zeros between pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.case import Case, Provider, Work
from bench.stylegan2 import blur_channels, blur_planes

TESTS = ("tests/ops/test_upfirdn2d.py",)


@dataclass(frozen=True)
class Resampling:
    """Batch, channels and side of the (square) maps, factors, and the padding before and after."""

    batch: int
    channels: int
    side: int
    up: int = 1
    down: int = 1
    before: int = 1
    after: int = 1

    @property
    def name(self) -> str:
        kind = f"up {self.up}" if self.up > 1 else f"down {self.down}" if self.down > 1 else "blur"
        return f"{kind} {self.channels} {self.batch}x{self.side}x{self.side}"


CASES = [Resampling(batch, *shape) for shape in ((512, 17), (256, 65), (64, 257)) for batch in (1, 4)]
CASES += [Resampling(1, 3, 128, up=2, before=2), Resampling(4, 128, 128, down=2)]
QUICK_CASES = [Resampling(2, 6, 5), Resampling(1, 3, 4, up=2, before=2)]


def plain(blur: Callable[..., Tensor], case: Resampling, x: Tensor, kernel: Tensor) -> Tensor:
    with torch.no_grad():
        return blur(x, kernel, case.up, case.before, case.after)[:, :, :: case.down, :: case.down]


def strided(case: Resampling, x: Tensor, kernel: Tensor) -> Tensor:
    """Downsampling by a convolution that does not compute what is left out."""
    with torch.no_grad():
        x = F.pad(x, [case.before, case.after] * 2)
        weight = torch.flip(kernel, [0, 1])[None, None].expand(case.channels, -1, -1, -1)
        return F.conv2d(x, weight, stride=case.down, groups=case.channels)


def fused(case: Resampling, x: Tensor, kernel: Tensor) -> Tensor:
    from fastgen import ops

    padding = (case.before, case.after) * 2
    with torch.no_grad():
        return ops.upfirdn2d(x, kernel, up=case.up, down=case.down, padding=padding)


def build(case: Resampling) -> Work:
    torch.manual_seed(0)
    x = torch.randn(case.batch, case.channels, case.side, case.side)
    rows = x.contiguous(memory_format=torch.channels_last)
    row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
    kernel = row[:, None] * row
    groups = partial(strided, case) if case.down > 1 else partial(plain, blur_channels, case)
    providers = {
        "eager": Provider(partial(plain, blur_planes, case, x, kernel), True),
        "eager groups": Provider(partial(groups, x, kernel), True),
        "eager groups channels_last": Provider(partial(groups, rows, kernel), True),
        "fastgen": Provider(partial(fused, case, rows, kernel)),
        "fastgen contiguous": Provider(partial(fused, case, x, kernel)),
    }
    output = fused(case, x, kernel)
    products = output.numel() * kernel.numel() // case.up**2
    return Work(providers, 2 * products, 4 * (x.numel() + output.numel()))


def cases(quick: bool) -> list[Case]:
    return [
        Case(case.name, {"x": [case.batch, case.channels, case.side, case.side]}, partial(build, case))
        for case in (QUICK_CASES if quick else CASES)
    ]
