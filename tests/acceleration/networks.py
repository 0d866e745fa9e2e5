"""Generators and decoders in the styles that people write them in, small: name -> (network, arguments of a call).

Layers have random running statistics, and everything is in eval mode.
"""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import torch
import torch.nn.functional as F
from torch import nn

Maps = namedtuple("Maps", ["image", "features"])


def block(inner, outer, *activation, stride=2, bias=False, **norm):
    conv = nn.ConvTranspose2d(inner, outer, 4, stride, stride - 1, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(outer, **norm), *(activation or (nn.ReLU(),)))


def dcgan_sequential():
    """DCGAN as one Sequential."""
    layers = [nn.ConvTranspose2d(5, 12, 4, 1, 0, bias=False), nn.BatchNorm2d(12), nn.ReLU(True)]
    layers += [nn.ConvTranspose2d(12, 7, 4, 2, 1, bias=False), nn.BatchNorm2d(7), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(7, 3, 4, 2, 1, bias=False), nn.Tanh()), (z(5, 1, 1),)


class DataParallelExample(nn.Module):
    """Asks where its input is, as the DCGAN of PyTorch's examples does: its forward cannot be traced."""

    def __init__(self):
        super().__init__()
        self.ngpu = 2
        self.main, _ = dcgan_sequential()

    def forward(self, input):
        if input.is_cuda and self.ngpu > 1:
            return nn.parallel.data_parallel(self.main, input, range(self.ngpu))
        return self.main(input)


class Functional(nn.Module):
    """Layers as attributes, activations as functions and methods."""

    def __init__(self):
        super().__init__()
        self.deconv1, self.bn1 = nn.ConvTranspose2d(5, 8, 4), nn.BatchNorm2d(8)
        self.deconv2, self.bn2 = nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.BatchNorm2d(6)
        self.deconv3, self.bn3 = nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1), nn.BatchNorm2d(4)
        self.deconv4 = nn.ConvTranspose2d(4, 1, 3)

    def forward(self, z):
        x = F.relu(self.bn1(self.deconv1(z.view(-1, 5, 1, 1))))
        x = F.leaky_relu(self.bn2(self.deconv2(x)), 0.2, inplace=True)
        x = self.bn3(self.deconv3(x)).relu_()
        return F.tanh(self.deconv4(x)).view(len_of(x), -1)


def len_of(x):
    return x.size(0)


class OwnParameters(nn.Module):
    """Everything by functions, with parameters and buffers of the module itself."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(5, 4, 3, 3)), nn.Parameter(torch.randn(2, 4, 3, 3))
        self.b1 = nn.Parameter(torch.randn(4))
        self.register_buffer("running_mean", torch.randn(4))
        self.register_buffer("running_var", torch.rand(4) + 0.1)

    def forward(self, x):
        x = F.conv_transpose2d(x, self.w1, self.b1, stride=2, padding=1)
        x = F.batch_norm(x, self.running_mean, self.running_var, training=self.training, eps=0.1)
        x = F.elu(x, alpha=0.7)
        x = F.conv2d(input=x, weight=self.w2, padding="same")
        return torch.sigmoid(x)


class SharedActivation(nn.Module):
    """One ReLU for all blocks, and two layers used twice."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 6, 2, 2)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.relu(self.bn3(self.conv2(x)))  # the same convolution before another norm
        return self.relu(self.bn1(self.up(self.relu(self.bn1(self.up(x))))))


class NormsElsewhere(nn.Module):
    """Convolutions in one container, norms and activations in others."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.ConvTranspose2d(5, 6, 4), nn.ConvTranspose2d(6, 4, 4, 2, 1)])
        self.norms = nn.ModuleDict({"0": nn.BatchNorm2d(6), "1": nn.BatchNorm2d(4)})
        self.acts = [torch.relu, nn.functional.elu]

    def forward(self, x):
        for i, (conv, act) in enumerate(zip(self.convs, self.acts, strict=True)):
            x = act(self.norms[str(i)](conv(x)))
        return x


class PreActivation(nn.Module):
    """Norm and activation before the convolution, residual sums in place."""

    def __init__(self):
        super().__init__()
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(4), nn.BatchNorm2d(6), nn.BatchNorm2d(4)
        self.conv1, self.conv2 = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 4, 2, 1)

    def forward(self, x):
        h = self.conv1(F.relu(self.bn1(x)))
        h = self.conv2(F.relu(self.bn2(h)))
        h += x
        alias = h
        h += 1
        return self.up(F.relu(self.bn3(h))) + F.interpolate(alias, scale_factor=2)


class SkipBlock(nn.Module):
    """A level of the pix2pix U-Net: activations before the convolutions, in place, which the skip sees."""

    def __init__(self, outer, inner, middle=None, outermost=False):
        super().__init__()
        down = [nn.LeakyReLU(0.2, True), nn.Conv2d(outer, inner, 4, 2, 1, bias=False), nn.BatchNorm2d(inner)]
        width = inner if middle is None else 2 * inner
        up = [nn.ReLU(True), nn.ConvTranspose2d(width, outer, 4, 2, 1, bias=False), nn.BatchNorm2d(outer)]
        self.outermost = outermost
        layers = [*down, *([middle] if middle else []), *up, nn.Dropout(0.5)]
        self.model = nn.Sequential(*([*layers[1:-2], nn.Tanh()] if outermost else layers))

    def forward(self, x):
        if self.outermost:
            return self.model(x)
        return torch.cat([x, self.model(x)], 1)


class UNet(nn.Module):
    """Encoder and decoder with skips and sizes that the stride leaves open."""

    def __init__(self):
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.LeakyReLU(0.2))
        self.down2 = nn.Sequential(nn.Conv2d(5, 7, 3, 2, 1), nn.InstanceNorm2d(7, track_running_stats=True), nn.ReLU())
        self.up2 = nn.ConvTranspose2d(7, 5, 3, 2, 1)
        self.bn2 = nn.BatchNorm2d(5)
        self.up1 = nn.ConvTranspose2d(10, 3, 3, 2, 1)

    def forward(self, x):
        skip1 = self.down1(x)
        skip2 = self.down2(skip1)
        h = self.bn2(self.up2(skip2, output_size=skip1.size())).relu()
        return {"image": torch.tanh(self.up1(torch.cat([h, skip1], 1), x.shape[2:])), "features": [skip1, skip2]}


class ResnetBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        norm = {"affine": True, "track_running_stats": True}
        self.conv_block = nn.Sequential(
            *(nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width, **norm), nn.ReLU(True)),
            *(nn.Dropout(0.5), nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width, **norm)),
        )

    def forward(self, x):
        return x + self.conv_block(x)


def resnet_generator():
    norm = {"track_running_stats": True}
    layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, 4, 7), nn.InstanceNorm2d(4, **norm), nn.ReLU(True)]
    layers += [nn.Conv2d(4, 8, 3, 2, 1), nn.InstanceNorm2d(8, **norm), nn.ReLU(True), ResnetBlock(8), ResnetBlock(8)]
    layers += [nn.ConvTranspose2d(8, 4, 3, 2, 1, output_padding=1), nn.InstanceNorm2d(4, **norm), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(4, 3, 7), nn.Tanh()), (z(3, 8, 8),)


class VAE(nn.Module):
    """Returns a tuple; its decoder, which has a linear front, is also called by itself."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.LeakyReLU(), nn.Flatten())
        self.mu, self.logvar = nn.Linear(64, 3), nn.Linear(64, 3)
        self.front = nn.Linear(3, 6 * 4 * 4)
        self.decoder = nn.Sequential(block(6, 5, nn.LeakyReLU()), nn.ConvTranspose2d(5, 1, 3, 1, 1), nn.Sigmoid())

    def decode(self, z):
        return self.decoder(self.front(z).view(-1, 6, 4, 4))

    def forward(self, x):
        h = self.encoder(x)
        mu, logvar = self.mu(h), self.logvar(h)
        return self.decode(mu), mu, logvar


class Conditional(nn.Module):
    """Labels or not, and a choice that is a constant."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 3)
        self.blocks = nn.Sequential(block(8, 6, stride=1), block(6, 4))
        self.image = nn.ConvTranspose2d(4, 1, 4, 2, 1)

    def forward(self, z, labels=None, *, features=False):
        extra = self.embedding(labels) if labels is not None else torch.zeros(z.size(0), 3, dtype=z.dtype)
        h = self.blocks(torch.cat([z, extra], 1)[:, :, None, None])
        image = torch.tanh(self.image(h))
        return Maps(image, h) if features else image


class EpsilonAndSlope(nn.Module):
    """Constants as in popular BEGAN and CoGAN code: ``BatchNorm2d(n, 0.8)`` and LeakyReLUs of unusual slopes."""

    def __init__(self):
        super().__init__()
        self.l1 = nn.Sequential(nn.Linear(5, 4 * 4 * 4))
        self.blocks = nn.Sequential(
            *(nn.BatchNorm2d(4), nn.Upsample(scale_factor=2), nn.Conv2d(4, 6, 3, stride=1, padding=1)),
            *(nn.BatchNorm2d(6, 0.8), nn.LeakyReLU(0.2, inplace=True), nn.ConvTranspose2d(6, 5, 4, 2, 1)),
            *(nn.BatchNorm2d(5, 0.8), nn.LeakyReLU(1.0), nn.ConvTranspose2d(5, 4, 3), nn.LeakyReLU(-0.5)),
            *(nn.ConvTranspose2d(4, 4, 3), nn.ELU(2.5), nn.Conv2d(4, 3, 3, stride=1, padding=1), nn.Tanh()),
        )

    def forward(self, noise):
        out = self.l1(noise)
        return self.blocks(out.view(out.shape[0], 4, 4, 4))


class TwoGenerators(nn.Module):
    """CoGAN: a shared trunk and two heads, a tuple of images."""

    def __init__(self):
        super().__init__()
        self.shared = block(5, 6, stride=1)
        self.G1 = nn.Sequential(nn.ConvTranspose2d(6, 3, 4, 2, 1), nn.Tanh())
        self.G2 = nn.Sequential(nn.ConvTranspose2d(6, 3, 4, 2, 1), nn.Tanh())

    def forward(self, noise):
        out = self.shared(noise)
        return self.G1(out), self.G2(out)


class Attention(nn.Module):
    """Decides by the data, so that it stays one node of its parent."""

    def __init__(self, width):
        super().__init__()
        self.query = nn.Conv2d(width, width, 1)

    def forward(self, x):
        if x.abs().max() > 1e9:
            return x
        return x + torch.sigmoid(self.query(x)) * x


class WithOpaquePart(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.bn = nn.ConvTranspose2d(5, 6, 4, 2, 1), nn.BatchNorm2d(6)
        self.attention = Attention(6)
        self.image = nn.ConvTranspose2d(6, 3, 4, 2, 1)

    def forward(self, x):
        return self.image(self.attention(F.relu(self.bn(self.up(x))))).tanh()


class Normed(nn.Module):
    """Weight and spectral norm, old and new."""

    def __init__(self):
        super().__init__()
        new, old = nn.utils.parametrizations, nn.utils
        self.a = new.weight_norm(nn.ConvTranspose2d(5, 6, 3, 2, 1))
        self.b = new.spectral_norm(nn.ConvTranspose2d(6, 6, 3, 2, 1))
        self.c = old.weight_norm(nn.ConvTranspose2d(6, 6, 3))
        self.d = old.spectral_norm(nn.Conv2d(6, 6, 3))
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn(self.d(F.relu(self.c(F.relu(self.bn(self.b(F.relu(self.a(x)))))))))


class KeywordInputs(nn.Module):
    """Several inputs, given by name; an ordered dictionary comes out."""

    def __init__(self):
        super().__init__()
        self.one, self.two = block(3, 4), block(2, 4)

    def forward(self, left, *, right):
        return OrderedDict(sum=self.one(left) + self.two(right))


class NoisyDecoder(nn.Module):
    """Random numbers and constants that its forward makes."""

    def __init__(self):
        super().__init__()
        self.up = block(5, 6)

    def forward(self, x):
        grid = torch.linspace(0, 1, 8, dtype=x.dtype)
        return self.up(x) * grid + torch.randn(8, 8, dtype=x.dtype) * 0.1


class Checking(nn.Module):
    """Checks its input, and changes results in place that have another name as well."""

    def __init__(self):
        super().__init__()
        self.up = block(3, 3)

    def forward(self, x, other=None):
        assert x.dim() == 4, "images"
        if x.shape[1] != 3:
            raise ValueError(f"three channels, got {x.shape[1]}")
        if not isinstance(x, torch.Tensor) or not hasattr(x, "dtype") or hasattr(x, "channels"):
            return None
        n, channels, height, width = x.shape
        x = self.up(x)
        skip = x
        x += 1  # seen by skip
        x *= torch.arange(1, 3 + 1, dtype=x.dtype).view(1, -1, 1, 1)
        return {"sum": skip + x.view(n, -1).sum(), "shape": (channels, height, width)}, other is None


def z(*shape, n=3):
    return torch.randn(n, *shape)


def prepared(network):
    """In eval mode, with statistics and scales unlike the initial ones."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 2)
            if module.weight is not None:
                nn.init.normal_(module.weight, 1, 0.3)
                nn.init.normal_(module.bias)
    return network.eval()


NETWORKS = {
    "sequential": dcgan_sequential,
    "control flow": lambda: (DataParallelExample(), (z(5, 1, 1),)),
    "functional": lambda: (Functional(), (z(5),)),
    "own parameters": lambda: (OwnParameters(), (z(5, 4, 3),)),
    "shared activation": lambda: (SharedActivation(), (z(3, 5, 4),)),
    "norms elsewhere": lambda: (NormsElsewhere(), (z(5, 1, 1),)),
    "pre-activation": lambda: (PreActivation(), (z(4, 5, 3),)),
    "pix2pix": lambda: (SkipBlock(3, 4, SkipBlock(4, 5, SkipBlock(5, 6)), outermost=True), (z(3, 16, 8),)),
    "unet": lambda: (UNet(), (z(3, 9, 7),)),
    "resnet": resnet_generator,
    "vae": lambda: (VAE(), (z(1, 8, 8),)),
    "conditional": lambda: (Conditional(), (z(5), torch.tensor([1, 9, 3]))),
    "unconditional": lambda: (Conditional(), (z(5),)),
    "eps and slope": lambda: (EpsilonAndSlope(), (z(5),)),
    "two generators": lambda: (TwoGenerators(), (z(5, 1, 1),)),
    "opaque part": lambda: (WithOpaquePart(), (z(5, 2, 3),)),
    "norms of weights": lambda: (Normed(), (z(5, 3, 3),)),
    "noise": lambda: (NoisyDecoder(), (z(5, 4, 4),)),
}


def make(name):
    torch.manual_seed(0)
    network, inputs = NETWORKS[name]()
    return prepared(network), inputs
