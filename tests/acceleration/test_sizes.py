"""Forwards that make integers of sizes, compare them, and take constants: the style of NVIDIA's StyleGAN2."""

from __future__ import annotations

import contextlib
import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import fastgen
from fastgen.acceleration import deferring
from fastgen.acceleration.program import Program
from fastgen.acceleration.scaled_weights import ScaledWeight

from .networks import prepared
from .official import Network
from .test_left_alone import reasons

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # of code that fails where the original does not


@pytest.fixture(autouse=True)
def small_weights(monkeypatch):
    """As if they were large."""
    monkeypatch.setattr(deferring, "_LEAST", 0)


def both(network, fast, *args, **options):
    """The results, which must come with the same random numbers."""
    results = []
    for module in (network, fast):
        torch.manual_seed(0)
        results.append(module(*args, **options))
        results.append(torch.rand(1))
    assert torch.equal(results[3], results[1])
    torch.testing.assert_close(results[2], results[0], rtol=1e-4, atol=1e-4)
    return results[0]


@pytest.fixture
def no_tensors(monkeypatch):
    """None of the weights of each sample is computed."""

    def refuse(self):
        raise AssertionError("the weights of each sample were computed")

    monkeypatch.setattr(ScaledWeight, "tensor", refuse)


CALLS = [{}, {"noise": "const"}, {"noise": "none"}, {"scale": 0.5, "noise": "const"}, {"gain": 2}, {"gain": 2.0}]


@torch.no_grad()
@pytest.mark.parametrize("kernel", [3, 1])
def test_official_style(kernel, no_tensors):
    torch.manual_seed(0)
    network = prepared(Network(kernel))
    fast = fastgen.accelerate(network)
    assert not fast.fastgen_report.skipped
    assert [entry.what for entry in fast.fastgen_report.fused] == ["conv2d", "conv_transpose2d", "conv2d"]
    program = Program.of(fast)
    for n in (1, 3, 2):
        for options in CALLS:
            both(network, fast, torch.randn(n, 2, 6), **options)
    several = 2 * len(CALLS)
    assert len(program.functions) == several and not program.tried - set(program.functions)
    assert {key for key, _ in program.others} <= {key for key in program.sources if program.sources[key].one_image}
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        both(network, other, torch.randn(3, 2, 6), noise="const")
        both(network, other, torch.randn(1, 2, 6))
    for module in (network, fast):
        module.layer0.weight.mul_(2)
        module.layer1.up = False
    both(network, fast, torch.randn(3, 2, 6), noise="const")


@pytest.mark.parametrize("n", [1, 2])
def test_official_style_in_other_modes(n):
    torch.manual_seed(0)
    network = prepared(Network())
    fast, ws = fastgen.accelerate(network), torch.randn(n, 2, 6)
    for mode in (torch.inference_mode(), torch.enable_grad(), torch.autocast("cpu", torch.bfloat16)):
        with mode, contextlib.suppress(AssertionError):  # of the original, in autocast
            expected = network(ws, noise="const")
            torch.testing.assert_close(fast(ws, noise="const"), expected, rtol=1e-4, atol=1e-4)
    gradients = []
    for module in (network, fast):
        module(ws, noise="none").square().sum().backward()
        gradients.append([p.grad for p in module.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3)
    for wrong in (torch.randn(n, 3, 6), torch.randn(n, 2, 5), torch.randn(n, 2)):
        with pytest.raises(AssertionError) as expected:
            network(wrong)
        with pytest.raises(AssertionError, match=str(expected.value)[:20]):
            fast(wrong)
    with pytest.raises(NotImplementedError):
        fast(ws, fused=False)
    with pytest.raises(TypeError):
        fast(ws, unknown=1)


# What becomes of sizes


class Takes(nn.Module):
    def __init__(self, take):
        super().__init__()
        self.conv, self.take = nn.Conv2d(3, 4, 3), take

    def forward(self, x):
        return torch.relu(self.conv(x)) * self.take(self, x)


TAKES = {
    "an integer": lambda m, x: int(x.shape[2]),
    "by method": lambda m, x: int(x.size(3)),
    "arithmetic": lambda m, x: (int(x.shape[2]) // 2 + 3 * int(x.shape[3])) % 7,
    "the same": lambda m, x: 2 if x.shape[2] == x[:, :1].shape[2] or int(x.shape[2]) != x.shape[2] else 3,
    "equal to itself": lambda m, x: 2 if int(x.shape[2]) != x.shape[2] else 3,
    "of a part": lambda m, x: x.shape[2:][1] + x.shape[-1],
    "in a table": lambda m, x: {5: 2}.get(int(x.shape[2]), 3),
    "in a set": lambda m, x: 2 if x.shape[2] in {5, 6} else 3,
    "as text": lambda m, x: int(str(x.shape[2])),
    "root": lambda m, x: float(np.sqrt(x.shape[2])),
    "integers of a kind": lambda m, x: int(torch.tensor(2.5)) if isinstance(x.shape[2], int) else 3,
    "of a repeated tensor": lambda m, x: m.conv.bias.unsqueeze(0).repeat([x.shape[0], 1]).shape[0],
    "of a clamped tensor": lambda m, x: x.reshape(x.shape[0], 3, 1, -1).clamp(torch.zeros(2, 1, 1)[0], x).shape[2],
    "of a sum": lambda m, x: (x[:, :, :1].reshape(x.shape[0], 3, 1, -1) + x).shape[2],
    "after a check": lambda m, x: checked(x).shape[3],
}


def checked(x):
    if x.shape[3] != 5:
        raise ValueError
    return x


@torch.no_grad()
@pytest.mark.parametrize("take", TAKES)
def test_sizes_in_forwards(take):
    torch.manual_seed(0)
    network = prepared(Takes(TAKES[take]))
    fast = fastgen.accelerate(network)
    for shape in [(1, 3, 5, 5), (2, 3, 6, 5), (3, 3, 7, 5)]:
        x = torch.randn(shape)
        try:
            expected = network(x)
        except RuntimeError:
            continue
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)


def test_int_as_a_dtype_leaves_the_module_alone():
    """Code that does more with `int` than call it must see the real one."""
    scope = {"__name__": "other_module", "torch": torch, "nn": nn}
    text = (
        "class Other(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.conv = nn.Conv2d(3, 3, 3)\n"
        "    def forward(self, x):\n        return self.conv(x) * int(x.shape[2]) * (type(3) is int)\n"
    )
    exec(compile(text, "other_module", "exec"), scope)
    fast = fastgen.accelerate(scope["Other"]().eval())
    assert "it makes a number of a size, which is not recorded" in reasons(fast)["conv"]


# Constants as arguments


class Chooses(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.seen = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), {"scale": 2.0}

    def forward(self, x, which=0, scale=None, **others):
        x = torch.relu(self.first(x)) if which == 0 else torch.tanh(self.second(x))
        if isinstance(scale, bool):
            x = x + 10
        return x if scale is None else x * scale * self.seen["scale"] + len(others)


@torch.no_grad()
def test_constants():
    network = prepared(Chooses())
    fast, x = fastgen.accelerate(network), torch.randn(2, 3, 6, 5)
    program = Program.of(fast)
    for options in (
        {"which": 1},
        {"scale": True},
        {"scale": 1},
        {"scale": 1.0},
        {"scale": 2, "other": "a"},
        {"which": 0},
    ):
        both(network, fast, x, **options)
        both(network, fast, x, **options)
    both(network, fast, x, 1, 3.0)
    both(network, fast, x, 1, 3.0)
    assert len(program.tried) == 6 and program.tried <= set(program.functions)
    both(network, fast, x, scale=np.float64(2.0))
    both(network, fast, x, other=[1])
    for module in (network, fast):
        module.seen["scale"] = 3.0
    for scale in (1, 5, 5):
        both(network, fast, x, scale=scale)
    assert len(program.tried) == 6
    for module in (network, fast):
        module.seen["scale"] = 2.0
        module.second.register_forward_hook(lambda m, args, y: y + 1)
    both(network, fast, x, which=1)


@torch.no_grad()
def test_numbers_that_change_at_every_call():
    network = prepared(Chooses())
    fast, x = fastgen.accelerate(network), torch.randn(2, 3, 6, 5)
    program = Program.of(fast)
    for i in range(100):
        both(network, fast, x, scale=float(i))
    assert not program.tried and len(program.asked) <= 64
    for i in range(40):
        both(network, fast, x, scale=float(i // 2))
    assert len(program.tried) == 16


@torch.no_grad()
def test_constants_and_training_mode():
    network = prepared(Chooses())
    fast, x = fastgen.accelerate(network), torch.randn(2, 3, 6, 5)
    both(network, fast.train(), x, which=1)
    assert not Program.of(fast).tried
    both(network, fast.eval(), x, which=1)
    assert not Program.of(fast).tried
    both(network, fast, x, which=1)
    assert len(Program.of(fast).tried) == 1


class AsksAfterNoise(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.conv(x + torch.randn_like(x))
        y = y.add_(1)
        return torch.relu(y) if x.shape[0] > 1 else torch.tanh(y)


@torch.no_grad()
def test_random_numbers_are_drawn_once():
    network = prepared(AsksAfterNoise())
    fast = fastgen.accelerate(network)
    assert fast.fastgen_report.fused
    for n in (1, 3, 1, 2):
        both(network, fast, torch.randn(n, 3, 6, 5))
    assert len(Program.of(fast).functions) == 2


def asserts_both(module, x):
    if not (x.shape[2] > 3 and x.shape[3] > 3):
        raise ValueError(f"too small: {x.shape}")
    return 2


@torch.no_grad()
def test_two_conditions_of_a_check():
    network = prepared(Takes(asserts_both))
    fast = fastgen.accelerate(network)
    assert fast.fastgen_report.fused
    torch.testing.assert_close(fast(torch.ones(1, 3, 5, 4)), network(torch.ones(1, 3, 5, 4)), rtol=1e-4, atol=1e-5)
    for shape in [(1, 3, 3, 5), (1, 3, 5, 3)]:
        with pytest.raises(ValueError, match="too small"):
            fast(torch.ones(shape))


class Repeats(nn.Module):
    """A constant for each image, by the length of the latents."""

    def __init__(self):
        super().__init__()
        self.constant = nn.Parameter(torch.randn(1, 4, 3, 3))
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, z):
        x = self.constant.repeat(len(z), 1, 1, 1)
        assert len(self.constant) == 1 and len(x.shape) == 4
        return torch.relu(self.norm(self.conv(x))) * z.view(len(z), -1, 1, 1)


@torch.no_grad()
def test_length_of_a_tensor():
    network = prepared(Repeats())
    fast = fastgen.accelerate(network)
    assert [entry.what for entry in fast.fastgen_report.fused] == ["Conv2d + BatchNorm2d + relu"]
    for n in (1, 3):
        both(network, fast, torch.randn(n, 4))


class RepeatsElsewhere(Repeats):
    """By a function of another file, which is not read as the module's own code."""

    def forward(self, z):
        return self.conv(self.constant.repeat(len_of(z), 1, 1, 1))


len_of = eval("lambda x: length(x)", {"length": len})


def test_length_of_a_tensor_in_code_of_others():
    fast = fastgen.accelerate(prepared(RepeatsElsewhere()))
    assert "tensor.shape[0]" in reasons(fast)["conv"]
