"""A PixelCNN++ as third parties write it, with the state dict of the common PyTorch port (pclucas14/pixel-cnn-pp).

Nothing of fastgen is used.  It is the foreign network that the converter and the sampler are tested with: weight
normalisation by hooks, per input channel in the transposed convolutions; 1x1 layers as permute, view, linear; additions
in place; a channel of ones that is kept from call to call; sizes that must be multiples of 4.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import nn

OLD_NORM, NEW_NORM = nn.utils.weight_norm, nn.utils.parametrizations.weight_norm


def concat_elu(x):
    return F.elu(torch.cat([x, -x], dim=1))


class Nin(nn.Module):
    def __init__(self, norm, c_in, c_out):
        super().__init__()
        self.lin_a = norm(nn.Linear(c_in, c_out))

    def forward(self, x):
        n, c, h, w = x.shape
        x = x.permute(0, 2, 3, 1).contiguous().view(n * h * w, c)
        return self.lin_a(x).view(n, h, w, -1).permute(0, 3, 1, 2)


class Down(nn.Module):
    """Sees the rows above and its own; `shift` moves the result down by one row."""

    def __init__(self, norm, c_in, c_out, size=(2, 3), stride=1, shift=False):
        super().__init__()
        self.conv = norm(nn.Conv2d(c_in, c_out, size, stride))
        self.pad = nn.ZeroPad2d((size[1] // 2, size[1] // 2, size[0] - 1, 0))
        self.shift = shift

    def forward(self, x):
        x = self.conv(self.pad(x))
        return F.pad(x[:, :, :-1], (0, 0, 1, 0)) if self.shift else x


class DownRight(nn.Module):
    """Sees nothing to its right; `shift` moves the result to the right by one column."""

    def __init__(self, norm, c_in, c_out, size=(2, 2), stride=1, shift=False):
        super().__init__()
        self.conv = norm(nn.Conv2d(c_in, c_out, size, stride))
        self.pad = nn.ZeroPad2d((size[1] - 1, 0, size[0] - 1, 0))
        self.shift = shift

    def forward(self, x):
        x = self.conv(self.pad(x))
        return F.pad(x[:, :, :, :-1], (1, 0)) if self.shift else x


class Deconv(nn.Module):
    """Twice the size: a kernel of 2x3 loses a column on both sides, one of 2x2 none on the left."""

    def __init__(self, norm, p, size):
        super().__init__()
        self.deconv = norm(nn.ConvTranspose2d(p, p, size, stride=2, output_padding=1))
        self.left = size[1] - 2

    def forward(self, x):
        h, w = 2 * x.shape[2], 2 * x.shape[3]
        return self.deconv(x)[:, :, :h, self.left : self.left + w]


class GatedResnet(nn.Module):
    def __init__(self, norm, p, conv, skips):
        super().__init__()
        self.conv_input = conv(norm, 2 * p, p)
        if skips:
            self.nin_skip = Nin(norm, 2 * skips * p, p)
        self.dropout = nn.Dropout2d(0.5)
        self.conv_out = conv(norm, 2 * p, 2 * p)

    def forward(self, x, a=None):
        y = self.conv_input(concat_elu(x))
        if a is not None:
            y += self.nin_skip(concat_elu(a))
        y, gate = torch.chunk(self.conv_out(self.dropout(concat_elu(y))), 2, dim=1)
        return x + y * torch.sigmoid(gate)


class Stage(nn.Module):
    def __init__(self, norm, count, p, skips):
        super().__init__()
        self.u_stream = nn.ModuleList([GatedResnet(norm, p, Down, skips) for _ in range(count)])
        self.ul_stream = nn.ModuleList([GatedResnet(norm, p, DownRight, skips + 1) for _ in range(count)])


class PortPixelCNNpp(nn.Module):
    """Images [N, C, H, W] in [-1, 1], H and W multiples of 4 -> [N, 10 (or 3, for C = 1) * nr_logistic_mix, H, W]."""

    def __init__(self, nr_resnet=5, nr_filters=80, nr_logistic_mix=10, input_channels=3, norm=OLD_NORM):
        super().__init__()
        n, p, c = nr_resnet, nr_filters, input_channels + 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the old norm is deprecated
            self.up_layers = nn.ModuleList([Stage(norm, n, p, 0) for _ in range(3)])
            self.down_layers = nn.ModuleList([Stage(norm, count, p, 1) for count in (n, n + 1, n + 1)])
            self.downsize_u_stream = nn.ModuleList([Down(norm, p, p, stride=2) for _ in range(2)])
            self.downsize_ul_stream = nn.ModuleList([DownRight(norm, p, p, stride=2) for _ in range(2)])
            self.upsize_u_stream = nn.ModuleList([Deconv(norm, p, (2, 3)) for _ in range(2)])
            self.upsize_ul_stream = nn.ModuleList([Deconv(norm, p, (2, 2)) for _ in range(2)])
            self.u_init = Down(norm, c, p, shift=True)
            self.ul_init = nn.ModuleList(
                [Down(norm, c, p, size=(1, 3), shift=True), DownRight(norm, c, p, size=(2, 1), shift=True)]
            )
            self.nin_out = Nin(norm, p, (3 if input_channels == 1 else 10) * nr_logistic_mix)
        self.init_padding = None

    def forward(self, x):
        if self.init_padding is None or self.init_padding.shape[0] != x.shape[0]:
            self.init_padding = x.new_ones(x.shape[0], 1, *x.shape[2:])
        x = torch.cat((x, self.init_padding), 1)
        us, uls = [self.u_init(x)], [self.ul_init[0](x) + self.ul_init[1](x)]
        for i, stage in enumerate(self.up_layers):
            for u_layer, ul_layer in zip(stage.u_stream, stage.ul_stream, strict=True):
                us.append(u_layer(us[-1]))
                uls.append(ul_layer(uls[-1], a=us[-1]))
            if i < 2:
                us.append(self.downsize_u_stream[i](us[-1]))
                uls.append(self.downsize_ul_stream[i](uls[-1]))
        u, ul = us.pop(), uls.pop()
        for i, stage in enumerate(self.down_layers):
            for u_layer, ul_layer in zip(stage.u_stream, stage.ul_stream, strict=True):
                u = u_layer(u, a=us.pop())
                ul = ul_layer(ul, a=torch.cat((u, uls.pop()), 1))
            if i < 2:
                u, ul = self.upsize_u_stream[i](u), self.upsize_ul_stream[i](ul)
        return self.nin_out(F.elu(ul))
