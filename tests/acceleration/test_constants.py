"""Weights that are computed from parameters alone."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgen
from fastgen.acceleration import constants

from .networks import prepared
from .test_architectures import assert_as_exact
from .test_left_alone import reasons, whats

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # of code that fails where the original does not


class SharedGain(nn.Module):
    """One small tensor of many weights, and weights that are views."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(6)])

    def forward(self, x):
        for conv in self.convs:
            x = F.conv2d(x, self.gain * conv.weight, conv.bias, padding=1)
        return F.conv2d(x, self.convs[0].weight.transpose(2, 3)[:, :4])


@torch.no_grad()
def test_constants_are_kept_and_freed(monkeypatch):
    network = prepared(SharedGain())
    fast, x = fastgen.accelerate(network), torch.randn(1, 4, 6, 5)
    torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(constants, "_compute", None)  # not again
    torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-4)
    weights = [weakref.ref(parameter) for parameter in fast.parameters()]
    del fast
    gc.collect()
    assert not any(weight() is not None for weight in weights)


class Equalised(nn.Module):
    def __init__(self, weigh, kernel=3):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4, kernel, kernel)), nn.Parameter(torch.randn(6))
        self.weigh, self.norm = weigh, nn.BatchNorm2d(6)

    def forward(self, x):
        return F.relu(self.norm(F.conv2d(x, self.weigh(self.weight), self.bias * 0.5, padding=1)))


def standardised(w):
    return (w - w.mean(dim=(1, 2, 3), keepdim=True)) / (w.std(dim=[1, 2, 3], keepdim=True) + 1e-5)


CONSTANTS = {
    "scaled": lambda w: w * 0.3,
    "standardised": standardised,
    "normalised": lambda w: F.normalize(w, dim=1),
    "parts": lambda w: w[:, :, 1:2, :].expand(-1, -1, 3, -1).flip(2, 3) + w.transpose(2, 3),
    "sizes": lambda w: w.reshape(w.shape[0], -1, w.size(2), 3) / w.numel(),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", CONSTANTS)
def test_constant_weights(kind):
    torch.manual_seed(0)
    network = prepared(Equalised(CONSTANTS[kind]))
    fast, x = fastgen.accelerate(network), (torch.randn(2, 4, 7, 5),)
    assert whats(fast) == ["conv2d + BatchNorm2d + relu"]
    assert_as_exact(network, fast, x)
    for other in (copy.deepcopy(fast), torch.compile(fast, backend="aot_eager", fullgraph=True)):
        torch.testing.assert_close(other(*x), network(*x), rtol=1e-4, atol=1e-4)
    for module in (network, fast):
        module.weight.add_(0.1)
    torch.testing.assert_close(fast(*x), network(*x), rtol=1e-4, atol=1e-4)
    with torch.enable_grad():
        gradients = []
        for module in (network, fast):
            module(*x).square().sum().backward()
            gradients.append(module.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3)


def changed_in_part(w):
    scaled = w * 0.5
    scaled[0].mul_(0)
    return scaled


def changed_by_a_view(w):
    scaled = w * 0.5
    part = scaled.view(6, -1)[:, :2]
    part += 1
    return scaled


def changed_in_place(w):
    scaled = w * 0.5
    scaled.add_(1)
    return scaled


def random_weights(w):
    return w + torch.rand(1)


@pytest.mark.parametrize(
    "weigh", [changed_in_place, changed_in_part, changed_by_a_view, random_weights], ids=lambda weigh: weigh.__name__
)
def test_weights_that_are_no_constants(weigh):
    network = prepared(Equalised(weigh))
    fast, x = fastgen.accelerate(network), torch.randn(2, 4, 7, 5)
    assert "its weights are computed in forward" in reasons(fast).values()
    for module in (network, fast):
        torch.manual_seed(1)
        result = module(x)
        expected = result if module is network else expected  # noqa: F821
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
