"""Generators as they are published, narrow: name -> (network, arguments of a call). Styles are in `networks`."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from bench.decoder import LatentDecoder

from .networks import z


class DCGANExample(nn.Module):
    def __init__(self, nz=10, ngf=8, nc=3):
        super().__init__()
        layers, widths = [], [nz, ngf * 4, ngf * 2, ngf]
        for i, (inner, outer) in enumerate(zip(widths, widths[1:], strict=False)):
            layers += [nn.ConvTranspose2d(inner, outer, 4, 2 if i else 1, 1 if i else 0, bias=False)]
            layers += [nn.BatchNorm2d(outer), nn.ReLU(True)]
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False), nn.Tanh())

    def forward(self, input):
        return self.main(input)


class UnetBlock(nn.Module):
    """Of pix2pix: `submodule` between the ways down and up, as in the published code with its conditions."""

    def __init__(self, outer, inner, submodule=None, outermost=False, innermost=False, norm=nn.BatchNorm2d, drop=False):
        super().__init__()
        self.outermost = outermost
        use_bias = norm.func is nn.InstanceNorm2d if isinstance(norm, functools.partial) else norm is nn.InstanceNorm2d
        downconv = nn.Conv2d(outer, inner, kernel_size=4, stride=2, padding=1, bias=use_bias)
        downrelu, uprelu = nn.LeakyReLU(0.2, True), nn.ReLU(True)
        if outermost:
            up = nn.ConvTranspose2d(inner * 2, outer, kernel_size=4, stride=2, padding=1)
            model = [downconv, submodule, uprelu, up, nn.Tanh()]
        elif innermost:
            up = nn.ConvTranspose2d(inner, outer, kernel_size=4, stride=2, padding=1, bias=use_bias)
            model = [downrelu, downconv, uprelu, up, norm(outer)]
        else:
            up = nn.ConvTranspose2d(inner * 2, outer, kernel_size=4, stride=2, padding=1, bias=use_bias)
            model = [downrelu, downconv, norm(inner), submodule, uprelu, up, norm(outer)]
            model += [nn.Dropout(0.5)] if drop else []
        self.model = nn.Sequential(*model)

    def forward(self, x):
        return self.model(x) if self.outermost else torch.cat([x, self.model(x)], 1)


def pix2pix(norm=nn.BatchNorm2d, width=6):
    net = UnetBlock(width * 4, width * 4, innermost=True, norm=norm)
    net = UnetBlock(width * 4, width * 4, net, norm=norm, drop=True)
    net = UnetBlock(width * 2, width * 4, net, norm=norm, drop=True)
    net = UnetBlock(width, width * 2, net, norm=norm)
    return UnetBlock(3, width, net, outermost=True, norm=norm)


class ResnetBlock(nn.Module):
    def __init__(self, dim, norm, drop):
        super().__init__()
        half = [nn.ReflectionPad2d(1), nn.Conv2d(dim, dim, kernel_size=3, padding=0), norm(dim)]
        other = [nn.ReflectionPad2d(1), nn.Conv2d(dim, dim, kernel_size=3, padding=0), norm(dim)]
        self.conv_block = nn.Sequential(*half, nn.ReLU(True), *([nn.Dropout(0.5)] if drop else []), *other)

    def forward(self, x):
        out = x + self.conv_block(x)
        return out


def cyclegan(norm=nn.InstanceNorm2d, width=6, blocks=2, drop=False):
    model = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, kernel_size=7, padding=0), norm(width), nn.ReLU(True)]
    for mult in (1, 2):
        model += [nn.Conv2d(width * mult, width * mult * 2, kernel_size=3, stride=2, padding=1)]
        model += [norm(width * mult * 2), nn.ReLU(True)]
    model += [ResnetBlock(width * 4, norm, drop) for _ in range(blocks)]
    for mult in (4, 2):
        up = nn.ConvTranspose2d(width * mult, width * mult // 2, kernel_size=3, stride=2, padding=1, output_padding=1)
        model += [up, norm(width * mult // 2), nn.ReLU(True)]
    return nn.Sequential(*model, nn.ReflectionPad2d(3), nn.Conv2d(width, 3, kernel_size=7, padding=0), nn.Tanh())


class VanillaVAE(nn.Module):
    """Encoder, reparameterisation by `randn_like`, decoder; returns a list as much-copied code does."""

    def __init__(self, hidden=(6, 8, 12), latent=5):
        super().__init__()
        modules, channels = [], 3
        for width in hidden:
            conv = nn.Conv2d(channels, width, kernel_size=3, stride=2, padding=1)
            modules.append(nn.Sequential(conv, nn.BatchNorm2d(width), nn.LeakyReLU()))
            channels = width
        self.encoder = nn.Sequential(*modules)
        self.fc_mu, self.fc_var = nn.Linear(channels * 4, latent), nn.Linear(channels * 4, latent)
        self.decoder_input = nn.Linear(latent, channels * 4)
        modules, self.first = [], channels
        for inner, outer in zip(hidden[::-1], hidden[-2::-1], strict=False):
            up = nn.ConvTranspose2d(inner, outer, kernel_size=3, stride=2, padding=1, output_padding=1)
            modules.append(nn.Sequential(up, nn.BatchNorm2d(outer), nn.LeakyReLU()))
        self.decoder = nn.Sequential(*modules)
        up = nn.ConvTranspose2d(hidden[0], hidden[0], kernel_size=3, stride=2, padding=1, output_padding=1)
        self.final_layer = nn.Sequential(
            *(up, nn.BatchNorm2d(hidden[0]), nn.LeakyReLU()),
            *(nn.Conv2d(hidden[0], out_channels=3, kernel_size=3, padding=1), nn.Tanh()),
        )

    def encode(self, input):
        result = torch.flatten(self.encoder(input), start_dim=1)
        return [self.fc_mu(result), self.fc_var(result)]

    def decode(self, latents):
        result = self.decoder_input(latents).view(-1, self.first, 2, 2)
        return self.final_layer(self.decoder(result))

    def reparameterize(self, mu, logvar):
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return eps * std + mu

    def forward(self, input, **kwargs):
        mu, log_var = self.encode(input)
        return [self.decode(self.reparameterize(mu, log_var)), input, mu, log_var]


class UpBlock(nn.Module):
    """Of SNGAN's generator: norms and activations ahead of convolutions, upsampling, a shortcut of its own."""

    def __init__(self, inner, outer, classes=0):
        super().__init__()
        norm = (lambda width: ConditionalNorm(width, classes)) if classes else nn.BatchNorm2d
        self.bn1, self.bn2 = norm(inner), norm(outer)
        self.conv1 = nn.Conv2d(inner, outer, 3, 1, padding=1)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, padding=1)
        self.bypass = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(inner, outer, 1, 1, padding=0))
        self.activation = nn.ReLU()

    def forward(self, x, *label):
        h = self.activation(self.bn1(x, *label))
        h = self.conv1(F.interpolate(h, scale_factor=2, mode="nearest"))
        h = self.conv2(self.activation(self.bn2(h, *label)))
        return h + self.bypass(x)


class ConditionalNorm(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.bn = nn.BatchNorm2d(width, affine=False, eps=1e-4)
        self.gamma, self.beta = nn.Embedding(classes, width), nn.Embedding(classes, width)

    def forward(self, x, label):
        gamma, beta = self.gamma(label)[..., None, None], self.beta(label)[..., None, None]
        return gamma * self.bn(x) + beta


class SNGAN(nn.Module):
    def __init__(self, width=12, classes=0, spectral=False):
        super().__init__()
        self.dense = nn.Linear(8, 2 * 2 * width)
        self.blocks = nn.ModuleList([UpBlock(width, width, classes) for _ in range(2)])
        self.bn = nn.BatchNorm2d(width)
        conv = nn.Conv2d(width, 3, 3, stride=1, padding=1)
        self.final = nn.utils.spectral_norm(conv) if spectral else conv
        self.width = width

    def forward(self, z, labels=None):
        h = self.dense(z).view(-1, self.width, 2, 2)
        for block in self.blocks:
            h = block(h) if labels is None else block(h, labels)
        return torch.tanh(self.final(F.relu(self.bn(h))))


class ConditionalGAN(nn.Module):
    """Embedded labels as a further plane and as a factor of the noise; BatchNorm with the eps of popular code."""

    def __init__(self, width=8):
        super().__init__()
        self.label_emb, self.plane = nn.Embedding(10, 6), nn.Embedding(10, 16)
        self.l1 = nn.Sequential(nn.Linear(6, width * 16))
        self.conv_blocks = nn.Sequential(
            *(nn.BatchNorm2d(width + 1), nn.Upsample(scale_factor=2)),
            *(nn.Conv2d(width + 1, width, 3, stride=1, padding=1), nn.BatchNorm2d(width, 0.8)),
            *(nn.LeakyReLU(0.2, inplace=True), nn.Upsample(scale_factor=2)),
            *(nn.Conv2d(width, width, 3, stride=1, padding=1), nn.BatchNorm2d(width, 0.8)),
            *(nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(width, 3, 3, stride=1, padding=1), nn.Tanh()),
        )

    def forward(self, noise, labels):
        out = self.l1(torch.mul(self.label_emb(labels), noise))
        out = out.view(out.shape[0], -1, 4, 4)
        return self.conv_blocks(torch.cat((out, self.plane(labels).view(-1, 1, 4, 4)), dim=1))


class ModulatedConv(nn.Module):
    """Of StyleGAN2: weights by sample, as groups; nothing of it is constant."""

    def __init__(self, inner, outer, kernel, style, demodulate=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, outer, inner, kernel, kernel))
        self.modulation = nn.Linear(style, inner)
        self.scale, self.padding, self.demodulate = 1 / math.sqrt(inner * kernel**2), kernel // 2, demodulate

    def forward(self, input, style):
        batch, inner, height, width = input.shape
        weight = self.scale * self.weight * self.modulation(style).view(batch, 1, inner, 1, 1)
        if self.demodulate:
            weight = weight * torch.rsqrt(weight.pow(2).sum([2, 3, 4], keepdim=True) + 1e-8)
        weight = weight.view(-1, inner, *self.weight.shape[3:])
        input = input.reshape(1, batch * inner, height, width)
        out = F.conv2d(input, weight, padding=self.padding, groups=batch)
        return out.view(batch, -1, height, width)


class StyleGAN(nn.Module):
    """Mapping network, constant input, noise, blurred upsampling by a buffer, images of all sizes summed."""

    def __init__(self, width=8, style=6):
        super().__init__()
        self.mapping = nn.Sequential(nn.Linear(style, style), nn.LeakyReLU(0.2), nn.Linear(style, style))
        self.constant = nn.Parameter(torch.randn(1, width, 4, 4))
        self.convs = nn.ModuleList([ModulatedConv(width, width, 3, style) for _ in range(3)])
        self.to_rgb = nn.ModuleList([ModulatedConv(width, 3, 1, style, demodulate=False) for _ in range(3)])
        self.noise = nn.ParameterList([nn.Parameter(torch.full((1,), 0.1)) for _ in range(3)])
        blur = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("blur", (blur[:, None] * blur).expand(width, 1, 4, 4) / 16)
        self.refine = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(width, 3, 1))
        self.width = width

    def forward(self, z):
        style = self.mapping(z * torch.rsqrt(torch.mean(z**2, dim=1, keepdim=True) + 1e-8))
        x, image = self.constant.repeat(z.shape[0], 1, 1, 1), 0
        for i, (conv, to_rgb, noise) in enumerate(zip(self.convs, self.to_rgb, self.noise, strict=True)):
            if i:
                x = F.conv_transpose2d(x, self.blur, stride=2, padding=1, groups=self.width)
                image = F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False)
            x = F.leaky_relu(conv(x, style) + noise, 0.2) * 2**0.5
            image = image + to_rgb(x, style)
        return image + self.refine(image)


class SelfAttention(nn.Module):
    """Of SAGAN, between fused blocks: it flattens what they return."""

    def __init__(self, width):
        super().__init__()
        self.query, self.key = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width, width // 4, 1)
        self.value, self.gamma = nn.Conv2d(width, width, 1), nn.Parameter(torch.full((1,), 0.5))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        batch, channels, width, height = x.size()
        query = self.query(x).view(batch, -1, width * height).permute(0, 2, 1)
        attention = self.softmax(torch.bmm(query, self.key(x).view(batch, -1, width * height)))
        out = torch.bmm(self.value(x).view(batch, -1, width * height), attention.permute(0, 2, 1))
        return self.gamma * out.view(batch, channels, width, height) + x


def sagan(width=8):
    norm = nn.utils.spectral_norm
    blocks = []
    for i, inner in enumerate((6, width, width)):
        conv = norm(nn.ConvTranspose2d(inner, width, 4, 2 if i else 1, 1 if i else 0))
        blocks += [conv, nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*blocks, SelfAttention(width), nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh())


class SRResNet(nn.Module):
    """Of SRGAN: PReLU, PixelShuffle, skips over all blocks."""

    def __init__(self, width=8):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, width, kernel_size=9, padding=4), nn.PReLU())
        blocks = [
            nn.Sequential(
                *(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width, 0.8), nn.PReLU()),
                *(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width, 0.8)),
            )
            for _ in range(2)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.conv2 = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width, 0.8))
        up = (nn.Conv2d(width, width * 4, 3, 1, 1), nn.BatchNorm2d(width * 4), nn.PixelShuffle(2), nn.PReLU())
        self.upsampling = nn.Sequential(*up)
        self.conv3 = nn.Sequential(nn.Conv2d(width, 3, kernel_size=9, stride=1, padding=4), nn.Tanh())

    def forward(self, x):
        out = out1 = self.conv1(x)
        for block in self.blocks:
            out = out + block(out)
        return self.conv3(self.upsampling(torch.add(out1, self.conv2(out))))


class Residual(nn.Module):
    """Of VQ-VAE code: the first ReLU works in place, so that the sum takes its result, not the input."""

    def __init__(self, width):
        super().__init__()
        layers = [nn.ReLU(True), nn.Conv2d(width, width, 3, 1, 1, bias=False)]
        self._block = nn.Sequential(*layers, nn.ReLU(True), nn.Conv2d(width, width, 1, 1, bias=False))

    def forward(self, x):
        return x + self._block(x)


def vqvae_decoder(width=8):
    first, up = nn.Conv2d(5, width, 3, 1, 1), nn.ConvTranspose2d(width, width // 2, 4, 2, 1)
    last = nn.ConvTranspose2d(width // 2, 3, 4, 2, 1)
    return nn.Sequential(first, Residual(width), Residual(width), nn.ReLU(True), up, nn.ReLU(), last)


def running(norm):
    return functools.partial(norm, affine=True, track_running_stats=True)


ARCHITECTURES = {
    "dcgan": lambda: (DCGANExample(), (z(10, 1, 1),)),
    "pix2pix": lambda: (pix2pix(), (z(3, 32, 32, n=2),)),
    "pix2pix, instances": lambda: (pix2pix(running(nn.InstanceNorm2d)), (z(3, 32, 64, n=2),)),
    "cyclegan": lambda: (cyclegan(), (z(3, 16, 20, n=2),)),
    "cyclegan, batches": lambda: (cyclegan(nn.BatchNorm2d, drop=True), (z(3, 16, 20, n=2),)),
    "vae": lambda: (VanillaVAE(), (z(3, 16, 16),)),
    "sngan": lambda: (SNGAN(), (z(8),)),
    "sngan, spectral": lambda: (SNGAN(spectral=True), (z(8),)),
    "sngan, conditional": lambda: (SNGAN(classes=4), (z(8), torch.tensor([0, 3, 1]))),
    "conditional": lambda: (ConditionalGAN(), (z(6), torch.tensor([0, 9, 1]))),
    "stylegan": lambda: (StyleGAN(), (z(6),)),
    "sagan": lambda: (sagan(), (z(6, 1, 1),)),
    "srgan": lambda: (SRResNet(), (z(3, 9, 7),)),
    "latent": lambda: (LatentDecoder(8, (1, 2), latent=4, size=4, attention=4, blocks=1, groups=4), (z(4, 4, 3),)),
    "vqvae": lambda: (vqvae_decoder(), (z(5, 4, 5),)),
}
