"""Forwards that write to what a fused block returned: whatever else shares the memory sees it, in any layout."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgen
from fastgen.ops import conv_sequence, known_convs, packed_weights

from .networks import dcgan_sequential

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # of code that fails where the original does not


def method(h, act):
    h.relu_()
    return h


def clamped(h, act):
    h.clamp_(0, 1)
    return h


def unknown_method(h, act):
    h.masked_fill_(h > 0.1, 2.0)
    return h


def module_in_place(h, act):
    return h + act(h)


def functional(h, act):
    return F.celu(h, inplace=True) + 2 * h


def dropout(h, act):
    F.dropout(h, 0.5, True, True)
    return h


def out(h, act):
    torch.exp(h, out=h)
    return h


def flat_view(h, act):
    flat = h.view(h.size(0), -1)
    flat -= flat.mean(1, keepdim=True)
    return h


def reshaped(h, act):
    h.reshape(h.size(0), -1).mul_(2)
    return h


def contiguous(h, act):
    h.contiguous().mul_(2)
    return h


def halves(h, act):
    a, b = h.chunk(2, 1)
    a.mul_(3)
    return torch.cat([b, a], 1) + h


def transposed(h, act):
    h = h + 1
    h.transpose(1, 2).mul_(2)
    return h


def through_data(h, act):
    h.data.mul_(2)
    return h


def later(h, act):
    flat = h.view(h.size(0), -1)
    h.mul_(2)
    return h + flat.sum()


def an_alias(h, act):
    same = h.add_(1)
    flat = same.view(h.size(0), -1)
    h.relu_()
    return same + flat.amax()


def reduced(h, act):
    return h * h.sum(2).view(h.size(0), -1).sum()


FORWARDS = {f.__name__: f for f in (
    method, clamped, unknown_method, module_in_place, functional, dropout, out, flat_view, reshaped, contiguous,
    halves, transposed, through_data, later, an_alias, reduced,
)}  # fmt: skip


class Writing(nn.Module):
    def __init__(self, forward, up):
        super().__init__()
        self.first = nn.ConvTranspose2d(3, 4, 4, 2, 1) if up else nn.Conv2d(3, 4, 3, padding=1)
        self.act, self.last, self.between = nn.Hardswish(inplace=True), nn.Conv2d(4, 4, 3, padding=1), forward

    def forward(self, x):
        return self.last(self.between(self.first(x), self.act))


@torch.no_grad()
@pytest.mark.parametrize("up", [True, False], ids=["transposed", "ordinary"])
@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS.keys())
def test_all_names_see_what_is_written(forward, up):
    network, x = Writing(forward, up).eval(), torch.randn(2, 3, 4, 5)
    fast = fastgen.accelerate(network)
    assert "forward" in fast.__dict__ and len(fast.fastgen_report.fused) == 2
    results = []
    for module in (network, fast):
        torch.manual_seed(1)
        results.append(module(x))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_no_copy_between_blocks(monkeypatch):
    """Activations in place, sums, concatenations and dropout in eval take what the blocks return as it is."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.ConvTranspose2d(4, 4, 3, 1, 1) for _ in range(3))
            self.relu, self.dropout = nn.ReLU(inplace=True), nn.Dropout(0.5)

        def forward(self, x):
            h = self.a(x)
            skip = F.leaky_relu_(h, 0.2)
            h = h + self.dropout(self.relu(self.b(skip)))
            h += skip
            return self.c(torch.cat([h, skip], 1)[:, ::2])

    fast = fastgen.accelerate(Plain().eval())
    text = fast.forward.__self__.sources[("x",)].text
    assert text.count("contiguous = True") == 1 and ".contiguous()" not in text  # what the caller gets


def added(x, y, v):
    y += 1
    return y


def through_a_view(x, y, v):
    v.zero_()
    return y


WRITES = {
    "sum": added,
    "view": through_a_view,
    "module": lambda x, y, v: nn.ReLU(inplace=True)(y),
    "function": lambda x, y, v: F.hardtanh(y, inplace=True),
    "out": lambda x, y, v: torch.exp(y, out=y),
}


@torch.no_grad()
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("fused", [False, True], ids=["elementwise", "block"])
def test_writes_between_blocks_in_a_row(write, fused):
    """To what the first of them takes: it must not be called later than it was."""

    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.a, self.b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            y = self.first(x) if fused else x * 2
            v = y[:, :2]
            h = self.a(y)
            y = write(x, y, v)
            return self.b(h) + y.mean()

    network, x = Between().eval(), torch.randn(2, 4, 9, 8)
    fast = fastgen.accelerate(copy.deepcopy(network))
    for _ in range(2):
        torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)


class Heads(nn.Module):
    """Of one trunk, called for each."""

    def __init__(self, width):
        super().__init__()
        self.trunk, self.a, self.b = (nn.Conv2d(width, width, 3, padding=1) for _ in range(3))

    def forward(self, x):
        return self.a(F.relu(self.trunk(x))), self.b(F.relu(self.trunk(x)))


@torch.no_grad()
def test_networks_that_begin_alike(monkeypatch):
    network, x = Heads(16).eval(), torch.randn(2, 16, 5, 6)
    fast = fastgen.accelerate(network)
    fast(x)
    monkeypatch.setattr(conv_sequence, "_first_time", None)  # both are known
    torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)


SEVERAL = {
    "indices": nn.MaxPool2d(2, return_indices=True),
    "indices, adaptive": nn.AdaptiveMaxPool2d(2, return_indices=True),
    "where": lambda h: torch.where(h > 0),
    "chunk": lambda h: h.chunk(2, 1),
    "flat positions": lambda h: [h.flatten(2), h.reshape(2, 8, -1), torch.flatten(h, 2).view(-1)],
}


@torch.no_grad()
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("layer", SEVERAL.values(), ids=SEVERAL.keys())
def test_several_results(layer, kernel):
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.layer = nn.Conv2d(3, 8, kernel), layer

        def forward(self, x):
            return self.layer(self.conv(x))

    network, x = Several().eval(), torch.randn(2, 3, 10, 12)
    fast = fastgen.accelerate(copy.deepcopy(network))
    for _ in range(2):
        results, expected = fast(x), network(x)
        assert [tensor.stride() for tensor in results] == [tensor.stride() for tensor in expected]
        torch.testing.assert_close(list(results), list(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kernel", [1, 3])
def test_an_image_without_a_batch(kernel):
    network, x = nn.Sequential(nn.Conv2d(3, 8, kernel), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval(), torch.randn(3, 9, 7)
    fast = fastgen.accelerate(network)
    for _ in range(2):
        torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)
    assert fast(x).stride() == network(x).stride()


COMPUTED = {
    "upsampling": lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3, padding=1)),
    "groups": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3)),
    "norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))),
}


@pytest.mark.parametrize("make", COMPUTED.values(), ids=COMPUTED.keys())
def test_computed_weights_die_with_their_network(make):
    gc.collect()
    before = len(packed_weights._computed), len(known_convs._kept)
    fast = fastgen.accelerate(make().eval())
    with torch.no_grad():
        for _ in range(3):
            fast(torch.randn(1, 8, 8, 8))
    assert (len(packed_weights._computed), len(known_convs._kept)) != before
    del fast
    gc.collect()
    assert (len(packed_weights._computed), len(known_convs._kept)) == before


TAKE_ANY = {
    "max": nn.MaxPool2d(2),
    "max, function": lambda h: F.max_pool2d(h, 2),
    "average": nn.AvgPool2d(2),
    "adaptive": nn.AdaptiveAvgPool2d(3),
    "adaptive, one": nn.AdaptiveAvgPool2d(1),
    "adaptive maximum": nn.AdaptiveMaxPool2d(3),
    "adaptive, function": lambda h: F.adaptive_avg_pool2d(h, 3),
    "hardswish": nn.Hardswish(inplace=True),
    "mish": F.mish,
    "relu6": lambda h: F.relu6(h, inplace=True),
    "shuffle": lambda h: F.pixel_shuffle(h, 2),
    "unshuffle": nn.PixelUnshuffle(2),
    "where": lambda h: torch.where(h > 0, h, 0.1 * h),
    "clamp": lambda h: torch.clamp(h, 0, 1),
    "method": lambda h: h.clamp_min(0.1).sqrt(),
    "power": lambda h: h**2,
}


@torch.no_grad()
@pytest.mark.parametrize("layer", TAKE_ANY.values(), ids=TAKE_ANY.keys())
def test_layers_that_take_any_strides(layer):
    """One copy, of what they return, where that is viewed as if it were contiguous."""

    class Viewed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.layer = nn.Conv2d(3, 8, 3), layer

        def forward(self, x):
            h = self.layer(self.conv(x))
            return h.view(h.size(0), -1)

    network, x = Viewed().eval(), torch.randn(2, 3, 10, 12)
    fast = fastgen.accelerate(copy.deepcopy(network))
    for _ in range(2):
        torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)
    text = fast.forward.__self__.sources[("x",)].text
    assert text.count(".contiguous()") == 1 and "contiguous = True" not in text


@torch.no_grad()
def test_a_generator_is_one_call_without_copies_or_getattr():
    network, (z,) = dcgan_sequential()
    network.eval()
    for module in (network, nn.Sequential(network, Contiguous())):
        fast = fastgen.accelerate(module)
        text = fast.forward.__self__.sources[("input",)].text
        assert "contiguous = True" in text and ".contiguous()" not in text
        assert "getattr(self" not in text and text.count("._parameters[") + text.count("._buffers[") == 11
        for _ in range(2):
            assert fast(z).is_contiguous()
            torch.testing.assert_close(fast(z), network(z), rtol=1e-4, atol=1e-5)


class Contiguous(nn.Module):
    def forward(self, x):
        return x.contiguous()


class Remembering(nn.Module):
    """Sets an attribute that it did not have."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 4, 4, 2, 1)

    def forward(self, x):
        self.features = self.up(x)
        return self.features.relu()


@torch.no_grad()
def test_attributes_that_forward_sets():
    fast = fastgen.accelerate(Remembering().eval())
    assert "forward" not in fast.__dict__
    fast(torch.randn(1, 3, 2, 2))
    assert fast.features.shape == (1, 4, 4, 4)
