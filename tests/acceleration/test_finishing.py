"""Sums, activation, gain and clamping behind a convolution, in one pass over its result."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgen
from fastgen.acceleration import deferring, finishing
from fastgen.acceleration.deferred_images import Images
from fastgen.acceleration.finishing import finish

from .networks import prepared
from .test_modulated import Modulated, binomial, filter_channels

ACTIVATIONS = [("none", 0.0), ("relu", 0.0), ("leaky_relu", 0.2), ("elu", 0.7), ("tanh", 0.0), ("sigmoid", 0.0)]


@pytest.fixture
def native_calls(monkeypatch):
    calls = []
    original = finishing.native
    monkeypatch.setattr(finishing, "native", lambda *args: calls.append(args) or original(*args))
    return calls


def expected_of(x, scale, terms, activation, parameter, gain, limit):
    x = x if scale is None else x * scale
    for term in terms:
        x = x + term
    if activation != "none":
        act = {"leaky_relu": F.leaky_relu, "elu": F.elu}.get(activation)
        x = act(x, parameter) if act else getattr(torch, activation)(x)
    return (x * gain).clamp(-limit, limit)


def arguments(n, c, h, w, dtype, kind):
    noise = torch.randn(n if kind == "by sample" else 1, 1, h, w, dtype=dtype)
    bias = torch.randn(c, dtype=dtype).view(1, -1, 1, 1)
    terms = {"all": (noise, bias), "by sample": (bias, noise), "two of each": (noise[0, 0], bias, bias, noise)}
    return {**terms, "noise": (noise,), "bias": (bias[0],), "nothing": ()}[kind]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", ["all", "by sample", "two of each", "noise", "bias", "nothing"])
def test_one_pass(kind, layout, dtype, native_calls):
    torch.manual_seed(0)
    count = 0
    for n, c, h, w in [(1, 1, 1, 1), (2, 5, 3, 7), (3, 16, 4, 4), (1, 17, 1, 9), (2, 3, 40, 41), (1, 64, 64, 64)]:
        for activation, parameter in ACTIVATIONS[: 6 if c == 5 else 3]:
            x = torch.randn(n, c, h, w, dtype=dtype).contiguous(memory_format=layout)
            terms = arguments(n, c, h, w, dtype, kind)
            for scale in (None, torch.rand(n, c, 1, 1, dtype=dtype), torch.rand(1, 1, 1, 1, dtype=dtype)):
                for gain, limit in ((1.0, math.inf), (1.5, 0.5)):
                    expected = expected_of(x, scale, terms, activation, parameter, gain, limit)
                    value = Images(x.clone(memory_format=torch.preserve_format))
                    value.pending += [] if scale is None else [scale]
                    found = finish(value, terms, (False,) * len(terms), activation, parameter, gain, limit)
                    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
                    assert found.stride() == x.stride() and not value.pending
                    count += 1
    assert len(native_calls) == count


@torch.no_grad()
def test_values_that_are_no_numbers_stay():
    x = torch.tensor([math.nan, math.inf, -math.inf, 3.0]).view(1, 1, 2, 2)
    for limit in (1.0, math.inf):
        expected = F.leaky_relu(x, 0.5).clamp(-limit, limit)
        found = finish(x.clone(), (torch.zeros(1, 1, 1, 1),), (False,), "leaky_relu", 0.5, 1.0, limit)
        torch.testing.assert_close(found, expected, equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize(
    "term", [(2, 4, 1, 5), (2, 4, 6, 5), (2, 4, 1, 1), (4, 6, 1), (), (1, 1, 1, 5), (3, 2, 4, 6, 5)]
)
def test_other_terms(term, native_calls):
    """As they are, one by one."""
    x, other = torch.randn(2, 4, 6, 5), torch.randn(term)
    expected = F.relu(x + other) * 2
    torch.testing.assert_close(finish(x, (other,), (False,), "relu", 0.0, 2.0, math.inf), expected)
    assert not native_calls


@torch.no_grad()
def test_a_larger_term_of_a_method_is_an_error():
    x, other = torch.randn(1, 4, 6, 5), torch.randn(2, 4, 6, 5)
    with pytest.raises(RuntimeError):
        finish(x, (other,), (True,), "relu", 0.0, 1.0, math.inf)


class Styled(nn.Module):
    def __init__(self, body, **options):
        super().__init__()
        self.conv, self.body = Modulated(**options), body
        self.noise, self.bias = nn.Parameter(torch.randn(1, 1, 30, 30)), nn.Parameter(torch.randn(5))

    def forward(self, x, style):
        y = self.conv(x, style)
        return self.body(self, y, self.noise[:, :, : y.shape[2], : y.shape[3]], self.bias.view(1, -1, 1, 1))


def kept(module, y, noise, bias):
    z = y + noise
    return z, F.leaky_relu(z + bias, 0.2)


def written_between(module, y, noise, bias):
    bias = bias * 1
    z = y + bias
    bias.mul_(0)
    return F.leaky_relu(z + noise, 0.2) * 2


def returned_before(module, y, noise, bias):
    return y, F.leaky_relu(y + noise + bias, 0.2)


def in_place(module, y, noise, bias):
    return F.leaky_relu(y.add_(noise) + bias, 0.2).mul(1.4).clamp(-1, 1)


def a_sum_of_it(module, y, noise, bias):
    return F.relu(y + noise + y.mean((2, 3), keepdim=True))


BODIES = {
    "all": (lambda m, y, noise, bias: (F.leaky_relu(y + noise + bias, 0.2) * 2**0.5).clamp(-1.5, 1.5), 1),
    "other order": (lambda m, y, noise, bias: torch.tanh(bias + y + noise), 1),
    "no activation": (lambda m, y, noise, bias: y + bias + noise, 1),
    "another clamp": (lambda m, y, noise, bias: F.relu(y + noise + bias).clamp(-1, 2), 1),
    "twice": (lambda m, y, noise, bias: F.relu(F.relu(y + noise) + bias), 1),
    "by a tensor": (lambda m, y, noise, bias: F.relu(y + noise + bias) * m.bias[0], 1),
    "in place": (in_place, 1),
    "kept": (kept, 0),
    "written between": (written_between, 0),
    "returned before": (returned_before, 0),
    "a sum of it": (a_sum_of_it, 0),
}


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"filtered": filter_channels}, {"filtered": filter_channels, "downsample": True}]
)
@pytest.mark.parametrize("body", BODIES)
def test_networks(body, options, native_calls, monkeypatch):
    monkeypatch.setattr(deferring, "_LEAST", 0)
    torch.manual_seed(0)
    function, least = BODIES[body]
    network = prepared(Styled(function, **options))
    fast = fastgen.accelerate(network)
    for n in (1, 3):
        x, style = torch.randn(n, 6, 8, 7), torch.randn(n, 4)
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                for _ in range(2):
                    torch.testing.assert_close(fast(x, style), network(x, style), rtol=1e-4, atol=1e-4)
    assert len(native_calls) >= 8 * least


def test_gradients():
    network = prepared(Styled(BODIES["all"][0]).double())
    results = []
    for module in (network, fastgen.accelerate(network)):
        x, style = (torch.linspace(-1, 1, size).double() for size in (2 * 6 * 8 * 7, 8))
        module(x.view(2, 6, 8, 7), style.view(2, 4)).square().sum().backward()
        results.append([parameter.grad for parameter in module.parameters()])
    torch.testing.assert_close(results[1], results[0])


@torch.no_grad()
def test_a_scale_that_waits_is_applied_once():
    """By whichever view of the result asks first."""
    x, scale = torch.randn(2, 3, 4, 5), torch.rand(2, 3, 1, 1)
    value = Images(x.clone())
    value.pending.append(scale)
    views = value.view(1, 6, 4, 5), F.pad(value.view(6, 1, 4, 5), (1, 0, 0, 1))
    torch.testing.assert_close(views[1].tensor(), F.pad((x * scale).view(6, 1, 4, 5), (1, 0, 0, 1)))
    torch.testing.assert_close(views[0].tensor(), (x * scale).view(1, 6, 4, 5))
    torch.testing.assert_close(value.tensor(), x * scale)
    value = Images(x.clone())
    value.pending.append(scale)
    kernel = binomial(3)[None, None]
    filtered = F.conv2d(value.view(6, 1, 4, 5), kernel)
    assert filtered.pending and value.pending
    torch.testing.assert_close(filtered.tensor(), F.conv2d((x * scale).view(6, 1, 4, 5), kernel))
    torch.testing.assert_close(value.tensor(), x * scale)
