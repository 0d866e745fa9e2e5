"""Small causal networks written in the styles that people write them in, none of them with fastgen's layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 5


class MaskedInPlace(nn.Conv2d):
    """The common style: the mask is multiplied into the weight, through .data, at every call."""

    def __init__(self, mask_type: str, *args: int, **kwargs: int):
        super().__init__(*args, **kwargs)
        kh, kw = self.weight.shape[2:]
        mask = torch.ones_like(self.weight)
        mask[:, :, kh // 2, kw // 2 + (mask_type == "B") :] = 0
        mask[:, :, kh // 2 + 1 :] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


class InPlaceMasks(nn.Module):
    """BatchNorm in eval, in-place ReLU, dropout, a skip by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a = MaskedInPlace("A", 1, 6, 5, padding=2)
        self.norm = nn.BatchNorm2d(6)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.b = MaskedInPlace("B", 6, 6, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Conv2d(12, LEVELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.norm(self.a(x)), inplace=True)
        b = self.drop(F.leaky_relu(self.b(a), 0.1))
        return self.out(torch.cat([a, b], dim=1))


class Shifts(nn.Module):
    """Unmasked convolutions, made causal by padding and cropping; concat-ELU; old-style weight normalisation; a channel
    of ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.utils.weight_norm(nn.Conv2d(2, 4, (2, 3)))
        self.down_right = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 4, (2, 2)))
        self.stack = nn.Conv2d(8, 4, (2, 3))
        self.mix = nn.Conv2d(16, LEVELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        u = self._shift_down(self.down(F.pad(x, (1, 1, 1, 0))))
        l = self._shift_right(self.down_right(F.pad(x, (1, 0, 1, 0))))
        u = self.stack(F.pad(self._concat_elu(u), (1, 1, 1, 0)))
        return self.mix(self._concat_elu(torch.cat([u, l + u], dim=1)))

    @staticmethod
    def _concat_elu(x: Tensor) -> Tensor:
        return F.elu(torch.cat([x, -x], dim=1))

    @staticmethod
    def _shift_down(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 1, 0))[:, :, : x.shape[2]]

    @staticmethod
    def _shift_right(x: Tensor) -> Tensor:
        return F.pad(x[:, :, :, :-1], (1, 0))


class CentredThenShifted(nn.Module):
    """A full 3x3 convolution, not causal by itself, used two rows further down: computed behind the drawing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.left = nn.Conv2d(1, 4, (1, 3))
        self.out = nn.Conv2d(4, LEVELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        above = F.pad(torch.tanh(self.conv(x)), (0, 0, 2, 0))[:, :, :-2]
        left = self.left(F.pad(x, (3, 0)))[:, :, :, :-1]
        return self.out(F.silu(above + left))


class Permuted(nn.Module):
    """1x1 layers as permute + linear, channels split into gates, in-place writes into a buffer, a learned position."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.conv = MaskedInPlace("A", 1, 6, 3, padding=1)
        self.linear = nn.Linear(6, 8)
        self.position = nn.Parameter(torch.randn(1, 4, height, width))
        self.out = nn.Linear(4, LEVELS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(self.conv(x).permute(0, 2, 3, 1))
        gate, value = h.chunk(2, dim=-1)
        h = (torch.sigmoid(gate) * value).permute(0, 3, 1, 2)
        buffer = torch.zeros_like(h)
        buffer[:, :, 1:] = h[:, :, :-1] * 0.5
        h = (h + buffer + self.position).contiguous()
        flat = h.flatten(2).transpose(1, 2)
        return self.out(flat).transpose(1, 2).view(len(x), LEVELS, *x.shape[2:])


class Filled(nn.Module):
    """Gated linear units, and parts of feature maps overwritten by zeros and by another number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = MaskedInPlace("A", 1, 8, 3, padding=1)
        self.second = MaskedInPlace("B", 4, 4, 3, padding=1)
        self.out = nn.Conv2d(4, LEVELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.glu(self.conv(x), dim=1)
        h[:, 1] = 0
        h[:, 2] = 0.7
        h = self.second(h)
        h[:, :, :1] = 0
        return self.out(h)


class Labelled(nn.Module):
    """Class labels by an added bias, by a scale, and as extra input channels."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, 12)
        self.conv = MaskedInPlace("A", 1, 4, 3, padding=1)
        self.mix = nn.Conv2d(8, 4, 1)
        self.out = nn.Conv2d(4, LEVELS, 1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        bias, scale, channels = self.embedding(labels)[:, :, None, None].chunk(3, dim=1)
        h = torch.tanh(self.conv(x) * scale + bias)
        h = self.mix(torch.cat([h, channels.expand(-1, -1, *x.shape[2:])], dim=1))
        return self.out(F.elu(h))


class Colours(nn.Module):
    """Three colours in sequence, with interleaved channel groups (channel i belongs to colour i mod 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 9, 3, padding=1)
        self.second = nn.Conv2d(9, 3 * LEVELS, 3, padding=1)
        rank = torch.arange(9) % 3
        self.register_buffer("mask_a", self._mask(self.first.weight, torch.arange(3), rank, False))
        self.register_buffer("mask_b", self._mask(self.second.weight, rank, torch.arange(3 * LEVELS) // LEVELS, True))

    @staticmethod
    def _mask(weight: Tensor, inputs: Tensor, outputs: Tensor, same: bool) -> Tensor:
        mask = torch.zeros_like(weight)
        mask[:, :, 0] = 1
        mask[:, :, 1, 0] = 1
        earlier = inputs[None] <= outputs[:, None] if same else inputs[None] < outputs[:, None]
        mask[:, :, 1, 1] = earlier.float()
        return mask

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(F.conv2d(x, self.first.weight * self.mask_a, self.first.bias, padding=1))
        return F.conv2d(h, self.second.weight * self.mask_b, self.second.bias, padding=1)


# name -> (network of a given height and width, channels, number of classes)
NETWORKS = {
    "in-place masks": (lambda h, w: InPlaceMasks(), 1, None),
    "shifts": (lambda h, w: Shifts(), 1, None),
    "centred then shifted": (lambda h, w: CentredThenShifted(), 1, None),
    "permuted": (Permuted, 1, None),
    "filled": (lambda h, w: Filled(), 1, None),
    "labelled": (lambda h, w: Labelled(4), 1, 4),
    "colours": (lambda h, w: Colours(), 3, None),
}


def make(name: str, height: int, width: int) -> tuple[nn.Module, int, int | None]:
    """(network in eval mode with weights large enough to matter, channels, number of classes)."""
    build, channels, num_classes = NETWORKS[name]
    torch.manual_seed(7)
    network = build(height, width).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1.5)
    return network, channels, num_classes
