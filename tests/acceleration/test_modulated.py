"""Weights of each sample and filters for all channels in the styles of StyleGAN2's code, and what looks like them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgen
from fastgen.acceleration import deferring, scaled_weights
from fastgen.acceleration.scaled_weights import ScaledWeight

from .networks import prepared
from .test_architectures import assert_as_exact

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # of code that fails where the original does not


def binomial(count):
    row = torch.tensor([1.0, 3.0, 3.0, 1.0])[:count]
    return row[:, None] * row / row.sum() ** 2


def filter_planes(x, kernel, up=1, down=1, pad=(0, 0)):
    """Each channel of each sample as an image of one."""
    if x.device.type != "cpu":
        raise NotImplementedError
    _, channels, height, width = x.shape
    x = x.reshape(-1, height, width, 1)
    _, height, width, minor = x.shape
    out = F.pad(x.view(-1, height, 1, width, 1, minor), [0, 0, 0, up - 1, 0, 0, 0, up - 1])
    out = out.view(-1, height * up, width * up, minor)
    out = F.pad(out, [0, 0, max(pad[0], 0), max(pad[1], 0), max(pad[0], 0), max(pad[1], 0)])
    crop = (
        slice(max(-pad[0], 0), out.shape[1] - max(-pad[1], 0)),
        slice(max(-pad[0], 0), out.shape[2] - max(-pad[1], 0)),
    )
    out = out[:, crop[0], crop[1], :].permute(0, 3, 1, 2)
    size = [side * up + pad[0] + pad[1] for side in (height, width)]
    out = F.conv2d(out.reshape([-1, 1, *size]), torch.flip(kernel, [0, 1]).view(1, 1, *kernel.shape))
    size = [side - edge + 1 for side, edge in zip(size, kernel.shape, strict=True)]
    out = out.reshape(-1, minor, *size).permute(0, 2, 3, 1)[:, ::down, ::down, :]
    return out.view(-1, channels, (size[0] - 1) // down + 1, (size[1] - 1) // down + 1)


def filter_channels(x, kernel, up=1, down=1, pad=(0, 0)):
    """Channels as groups, by one filter, or by one along either axis."""
    n, channels, height, width = x.shape
    x = F.pad(x.reshape([n, channels, height, 1, width, 1]), [0, up - 1, 0, 0, 0, up - 1])
    x = F.pad(x.reshape([n, channels, height * up, width * up]), [max(side, 0) for side in (*pad, *pad)])
    x = x[:, :, max(-pad[0], 0) : x.shape[2] - max(-pad[1], 0), max(-pad[0], 0) : x.shape[3] - max(-pad[1], 0)]
    f = kernel.flip(list(range(kernel.ndim)))[None, None].repeat([channels, 1] + [1] * kernel.ndim)
    if kernel.ndim == 2:
        x = F.conv2d(input=x, weight=f, groups=channels)
    else:
        x = F.conv2d(F.conv2d(x, f.unsqueeze(2), groups=channels), f.unsqueeze(3), groups=channels)
    return x[:, :, ::down, ::down]


class Modulated(nn.Module):
    """A style for each input channel, output channels normalised, samples as groups; sizes by name."""

    def __init__(self, inner=6, outer=5, kernel=3, demodulate=True, filtered=None, downsample=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, outer, inner, kernel, kernel))
        self.modulation = nn.Linear(4, inner)
        self.inner, self.outer, self.size, self.demodulate = inner, outer, kernel, demodulate
        self.filtered, self.downsample = filtered, downsample
        self.register_buffer("kernel", binomial(4))

    def forward(self, x, style):
        batch, inner, height, width = x.shape
        style = self.modulation(style).view(batch, 1, inner, 1, 1)
        weight = 0.1 * self.weight * style
        if self.demodulate:
            norm = torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8)
            weight = weight * norm.view(batch, self.outer, 1, 1, 1)
        weight = weight.view(batch * self.outer, inner, self.size, self.size)
        if self.filtered is None:
            x = x.view(1, batch * inner, height, width)
            out = F.conv2d(x, weight, padding=self.size // 2, groups=batch)
            return out.view(batch, self.outer, *out.shape[2:])
        if self.downsample:
            x = self.filtered(x, self.kernel, pad=(2, 2))
            _, _, height, width = x.shape
            out = F.conv2d(x.view(1, batch * inner, height, width), weight, padding=0, stride=2, groups=batch)
            _, _, height, width = out.shape
            return out.view(batch, self.outer, height, width)
        weight = weight.view(batch, self.outer, inner, self.size, self.size)
        weight = weight.transpose(1, 2).reshape(batch * inner, self.outer, self.size, self.size)
        x = x.view(1, batch * inner, height, width)
        out = F.conv_transpose2d(x, weight, padding=0, stride=2, groups=batch)
        _, _, height, width = out.shape
        return self.filtered(out.view(batch, self.outer, height, width), self.kernel, pad=(1, 1))


class Indexed(nn.Module):
    """New dimensions by indices, ``** 2``, a norm that keeps its dimensions, sizes unpacked with a star."""

    def __init__(self, outer=5):
        super().__init__()
        self.weight, self.outer = nn.Parameter(torch.randn(outer, 4, 3, 3)), outer

    def forward(self, x, style):
        b, _, h, w = x.shape
        weights = self.weight[None, :, :, :, :] * (style[:, None, :, None, None] + 1)
        weights = weights * torch.rsqrt((weights**2).sum(dim=(2, 3, 4), keepdim=True) + 1e-8)
        _, _, *sizes = weights.shape
        out = F.conv2d(x.reshape(1, -1, h, w), weights.reshape(b * self.outer, *sizes), padding=1, groups=b)
        return out.reshape(-1, self.outer, h, w)


class ByNames(nn.Module):
    """Arguments by name, squares and a quotient by functions, noise in place, a bias, an activation, and a last filter
    that makes twice the pixels.
    """

    def __init__(self, kernel):
        super().__init__()
        self.weight, self.affine = nn.Parameter(torch.randn(5, 4, 3, 3)), nn.Linear(4, 4)
        self.bias, self.strength = nn.Parameter(torch.randn(5)), nn.Parameter(torch.ones(()))
        self.register_buffer("noise", torch.randn(7, 6))
        self.register_buffer("kernel", kernel)

    def forward(self, x, w):
        n = x.shape[0]
        _, inner, *_ = self.weight.shape
        weight = torch.mul(self.weight.unsqueeze(0), self.affine(w).reshape(n, 1, -1, 1, 1))
        norm = (torch.square(weight).sum(dim=[2, 3, 4]) + 1e-8).sqrt()
        weight = torch.div(weight, norm.reshape(n, -1, 1, 1, 1))
        x = x.reshape(1, -1, *x.shape[2:])
        x = F.conv2d(input=x, weight=weight.reshape(-1, inner, 3, 3), padding=[1, 1], groups=n)
        x = x.reshape(n, -1, *x.shape[2:]).add_(self.noise * self.strength)
        x = F.leaky_relu(x + self.bias.view(1, -1, 1, 1), 0.2) * 2**0.5
        return filter_channels(x, self.kernel, up=2, pad=(2, 1))


NETWORKS = {
    "same size": (lambda: Modulated(), (6, 7, 5), 1),
    "no norm": (lambda: Modulated(kernel=1, outer=3, demodulate=False), (6, 7, 5), 1),
    "as many channels": (lambda: Modulated(inner=5), (5, 4, 4), 1),
    "one channel": (lambda: Modulated(inner=1, outer=1), (1, 4, 6), 1),
    "one channel, upwards": (lambda: Modulated(inner=1, outer=1, filtered=filter_planes), (1, 4, 6), 2),
    "upwards": (lambda: Modulated(filtered=filter_planes), (6, 7, 5), 2),
    "upwards, channels": (lambda: Modulated(filtered=filter_channels), (6, 7, 5), 2),
    "from one pixel": (lambda: Modulated(filtered=filter_planes), (6, 1, 1), 2),
    "downwards": (lambda: Modulated(filtered=filter_planes, downsample=True), (6, 8, 7), 2),
    "downwards, channels": (lambda: Modulated(filtered=filter_channels, downsample=True), (6, 8, 7), 2),
    "indexed": (lambda: Indexed(), (4, 7, 5), 1),
    "by names": (lambda: ByNames(binomial(4)), (4, 7, 6), 2),
    "by names, two filters": (lambda: ByNames(binomial(4)[0]), (4, 7, 6), 3),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def make(name):
    torch.manual_seed(0)
    factory, shape, found = NETWORKS[name]
    return prepared(factory()), (torch.randn(3, *shape), torch.randn(3, 4)), found


@pytest.fixture(autouse=True)
def small_weights(monkeypatch):
    """As if they were large."""
    monkeypatch.setattr(deferring, "_LEAST", 0)


@pytest.fixture
def no_tensors(monkeypatch):
    """None of the weights of each sample is computed."""

    def refuse(self):
        raise AssertionError("the weights of each sample were computed")

    monkeypatch.setattr(ScaledWeight, "tensor", refuse)


@torch.no_grad()
@every_network
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_exact(name, layout, no_tensors):
    network, (x, style), found = make(name)
    fast = fastgen.accelerate(network)
    assert len(fast.fastgen_report.fused) == found and not fast.fastgen_report.skipped
    assert_as_exact(network, fast, (x, style))
    by_view = isinstance(network, Modulated)  # which refuses other than contiguous images
    for n in (1, 2):
        x = torch.randn(n, *x.shape[1:])
        expected = network(x, style[:n])
        x = x if by_view else x.contiguous(memory_format=layout)
        torch.testing.assert_close(fast(x, style[:n]), expected, rtol=1e-4, atol=1e-4)


@every_network
def test_gradients(name):
    network, (x, style), _ = make(name)
    results = []
    for module in (network.double(), fastgen.accelerate(network.double())):
        inputs = x.double().requires_grad_(), style.double().requires_grad_()
        module(*inputs).square().sum().backward()
        results.append([t.grad for t in (*inputs, *module.parameters())])
    torch.testing.assert_close(results[1], results[0])


@torch.no_grad()
@every_network
def test_copies_and_changes(name):
    network, inputs, _ = make(name)
    fast = fastgen.accelerate(network)
    expected = fast(*inputs)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(*inputs), expected)
    for module in (network, fast):
        module.weight.mul_(torch.linspace(1, 2, module.weight.numel()).view_as(module.weight))
    torch.testing.assert_close(fast(*inputs), network(*inputs), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["upwards", "indexed", "by names"])
def test_compiles(name):
    network, inputs, _ = make(name)
    compiled = torch.compile(fastgen.accelerate(network), backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), network(*inputs), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["upwards, channels", "by names"])
def test_modes(name):
    network, inputs, _ = make(name)
    fast = fastgen.accelerate(network)
    with torch.inference_mode():
        torch.testing.assert_close(fast(*inputs), network(*inputs), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(*inputs), network(*inputs), rtol=0.05, atol=0.2)
    half = copy.deepcopy(network).bfloat16()
    args = [x.bfloat16() for x in inputs]
    torch.testing.assert_close(fastgen.accelerate(half)(*args), half(*args), rtol=0.05, atol=0.1)


@torch.no_grad()
def test_a_few_weights_are_computed(monkeypatch):
    monkeypatch.undo()
    kernel = ScaledWeight.kernel
    network, inputs, _ = make("upwards")
    fast = fastgen.accelerate(network)
    for least, computed in ((scaled_weights._LEAST_PRODUCTS, True), (6 * 5 * 9 * 3 * 7 * 5, False)):
        monkeypatch.setattr(scaled_weights, "_LEAST_PRODUCTS", least)
        found = []
        monkeypatch.setattr(
            ScaledWeight, "kernel", lambda self, *args, found=found: found.append(self) or kernel(self, *args)
        )
        torch.testing.assert_close(fast(*inputs), network(*inputs), rtol=1e-4, atol=1e-4)
        assert (not found) is computed


# What looks like it


class Look(nn.Module):
    """What scales the weights, or happens in between, is given."""

    def __init__(self, body):
        super().__init__()
        self.weight, self.body = nn.Parameter(torch.randn(5, 4, 3, 3)), body

    def forward(self, x, style):
        return self.body(x, style, self.weight)


def joined(x, weights):
    n, c, h, w = x.shape
    out = F.conv2d(x.reshape(1, n * c, h, w), weights.reshape(n * 5, 4, 3, 3), padding=1, groups=n)
    return out.reshape(n, 5, h, w)


def other_at_each_element(x, style, weight):
    return joined(x, weight * style[:, :1, None, None, None] + weight.flip(0) * style[:, 1:2, None, None, None])


def of_pairs(x, style, weight):
    return joined(
        x, weight * (style[:, :1] * style).reshape(-1, 1, 4, 1, 1) * (style @ style.t())[:, :1, None, None, None]
    )


def of_columns(x, style, weight):
    return joined(x, weight * style[:, None, None, None, :3])


def powers(x, style, weight):
    weights = (weight * style[:, None, :, None, None]) ** 2
    return joined(x, weights * weights.sum((1, 2, 3, 4), keepdim=True).rsqrt())


def absolute(x, style, weight):
    return joined(x, (weight * style[:, None, :, None, None]).abs().clamp(max=1.5))


def also_returned(x, style, weight):
    weights = weight * style[:, None, :, None, None]
    return joined(x, weights), weights, weights.mean()


def with_a_bias(x, style, weight):
    n, c, h, w = x.shape
    weights = (weight * style[:, None, :, None, None]).reshape(n * 5, 4, 3, 3)
    bias = style.repeat(1, 2)[:, :5].flatten()
    return F.conv2d(x.reshape(1, n * c, h, w), weights, bias, padding=1, groups=n)


def samples_behind_channels(x, style, weight):
    """[O, N, I, kh, kw]: what a group has are not the weights of a sample."""
    n, c, h, w = x.shape
    weights = (weight.unsqueeze(1) * style[:, :, None, None]).reshape(5 * n, 4, 3, 3)
    return F.conv2d(x.reshape(1, n * c, h, w), weights, padding=1, groups=n)


def channels_first(x, style, weight):
    n, c, h, w = x.shape
    weights = (weight * style[:, None, :, None, None]).reshape(n * 5, 4, 3, 3)
    return F.conv2d(x.permute(1, 0, 2, 3).reshape(1, c * n, h, w), weights, padding=1, groups=n)


def written_to_images(x, style, weight):
    n, c, h, w = x.shape
    x = x + 1
    images, weights = F.pad(x, (1, 1, 1, 1)), weight * style[:, None, :, None, None]
    x.mul_(0)
    return F.conv2d(images.reshape(1, n * c, h + 2, w + 2), weights.reshape(n * 5, 4, 3, 3), groups=n)


def written_to_styles(x, style, weight):
    style = style + 1
    weights = weight * style[:, None, :, None, None]
    style.mul_(0)
    return joined(x, weights)


def written_to_the_result(x, style, weight):
    n, c, h, w = x.shape
    weights = (weight * style[:, None, :, None, None]).reshape(n * 5, 4, 3, 3)
    out = F.conv2d(x.reshape(1, n * c, h, w), weights, padding=1, groups=n)
    parts = out.view(n, 5, h, w)
    out.mul_(2)
    return parts


def mirrored(x, style, weight):
    n, c, h, w = x.shape
    weights = (weight * style[:, None, :, None, None]).reshape(n * 5, 4, 3, 3)
    x = F.pad(x, (1, 1, 1, 1), mode="reflect").reshape(1, n * c, h + 2, w + 2)
    return F.conv2d(x, weights, groups=n).reshape(n, 5, h, w)


def ones_around(x, style, weight):
    n, c, h, w = x.shape
    weights = (weight * style[:, None, :, None, None]).reshape(n * 5, 4, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), value=1.0).reshape(1, n * c, h + 2, w + 2), weights, groups=n)


def written_to_the_source(x, style, weight):
    x = x + 1
    out = joined(x, weight * style[:, None, :, None, None])
    x.mul_(0)
    return out, x


def written_to_a_part(x, style, weight):
    out = joined(x, weight * style[:, None, :, None, None])
    top = out[:, :, :1]
    top.zero_()
    return out


def written_to_a_part_of_the_weights(x, style, weight):
    weights = weight * style[:, None, :, None, None]
    weights[0].mul_(0)
    return joined(x, weights)


def returned_twice(x, style, weight):
    out = joined(x, weight * style[:, None, :, None, None])
    return out, out.add_(style[:, :1, None, None])


def sums_of_weights(x, style, weight):
    weights = weight * style[:, None, :, None, None]
    return joined(x, 1 / (weights.abs() + 1e-3) - weights + 2 * weights - (-weights))


def equal_weights(x, style, weight):
    return joined(x, weight * (weight == weight.round()) * style[:, None, :, None, None])


def weights_in_a_list(x, style, weight):
    weights = weight * style[:, None, :, None, None]
    return joined(x, torch.cat([weights, weights], 1)[:, ::2]), torch.stack([weights, weights])


def by_keywords(x, style, weight):
    n, c, h, w = x.shape
    weights = torch.mul(weight, other=style[:, None, :, None, None]).permute(dims=(0, 1, 2, 4, 3))
    norm = (weights * weights).sum(axis=(2, 3, 4), keepdims=True)
    weights = torch.div(weights, norm.sqrt(), rounding_mode=None).reshape(n * 5, 4, 3, 3)
    return F.conv2d(x.reshape(1, n * c, h, w), weights, padding=(1,), dilation=[1], stride=(1,), groups=n)


def smaller_and_viewed(x, style, weight):
    """What is blurred and of half the size is joined by a view, which needs it to lie that way."""
    n, c = x.shape[:2]
    kernel = weight[0, 0].flatten()[:2]
    x = F.conv2d(F.pad(x, (1, 1, 1, 1)), kernel[None, None, :, None].expand(c, 1, 2, 1), groups=c)[:, :, ::2, ::2]
    weights = (weight * style[:, None, :, None, None]).reshape(n * 5, 4, 3, 3)
    return F.conv2d(x.view(1, n * c, *x.shape[2:]), weights, padding=1, groups=n)


LOOKS = [written_to_the_source, written_to_a_part, written_to_a_part_of_the_weights, returned_twice, sums_of_weights]
LOOKS += [equal_weights, weights_in_a_list, by_keywords, smaller_and_viewed]
LOOKS += [other_at_each_element, of_pairs, of_columns, powers, absolute, also_returned, with_a_bias]
LOOKS += [samples_behind_channels, channels_first, written_to_images, written_to_styles, written_to_the_result]
LOOKS += [mirrored, ones_around]


@torch.no_grad()
@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look.__name__)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_what_looks_like_it(look, n):
    torch.manual_seed(0)
    network = prepared(Look(look))
    fast = fastgen.accelerate(network)
    x, style = torch.randn(n, 4, 6, 5), torch.randn(n, 4)
    for _ in range(2):
        torch.testing.assert_close(fast(x, style), network(x, style), rtol=1e-4, atol=1e-4)


class WithoutOutput(nn.Module):
    """What it writes to its input, nobody may do once more where the rest fails."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, 1, 1))

    def forward(self, x, style):
        x.mul_(0.5)
        n, c, h, w = x.shape
        weight = (self.weight * style.view(n, 1, -1, 1, 1)).transpose(1, 2).reshape(n * c, 3, 1, 1)
        y = F.conv_transpose2d(x.reshape(1, n * c, h, w), weight, padding=(1, 1), groups=n)
        return y.view(n, 3, y.shape[2], y.shape[3])


@torch.no_grad()
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_results_without_elements():
    torch.set_num_threads(2)  # with one, PyTorch refuses them
    network = WithoutOutput().eval()
    fast = fastgen.accelerate(network)
    assert fast.fastgen_report.fused
    for width in (3, 2):
        x, style = torch.randn(3, 2, 6, width), torch.randn(3, 2)
        ours = x.clone()
        torch.testing.assert_close(fast(ours, style), network(x, style))
        assert torch.equal(ours, x)
