"""An accelerated module follows changes that are made to it afterwards, compiled or not."""

from __future__ import annotations

import copy
import dataclasses
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgen
from fastgen.acceleration.program import Program

from .networks import prepared

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # of code that fails where the original does not


@dataclasses.dataclass
class Gains:
    first: float = 1.0
    unseen: float = dataclasses.field(default=1.0, compare=False)


class Slots:
    __slots__ = ("gain",)

    def __init__(self):
        self.gain = 1.0


class Network(nn.Module):
    """Reads what it computes with from all kinds of attributes."""

    def __init__(self):
        super().__init__()
        self.up, self.bn, self.act = nn.ConvTranspose2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.ReLU()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())])
        self.unused = nn.Conv2d(4, 4, 3, padding=1)
        self.gain, self.function = 1.0, torch.tanh

    def forward(self, x):
        x = self.blocks[0](self.act(self.bn(self.up(x))))
        x = F.conv2d(x, self.unused.weight, padding=self.unused.padding)
        return self.function(x * self.gain)


def other_block():
    torch.manual_seed(1)
    return prepared(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, eps=1.0), nn.ReLU()))


CHANGES = {
    "nothing": lambda m: None,
    "an option": lambda m: setattr(m.bn, "eps", 0.5),
    "an option of what is not called": lambda m: setattr(m.unused, "padding", (2, 2)),
    "a layer": lambda m: setattr(m, "act", nn.Sigmoid()),
    "a layer of a block": lambda m: m.blocks[0].__setitem__(2, nn.Tanh()),
    "a block": lambda m: m.blocks.__setitem__(0, other_block()),
    "a number": lambda m: setattr(m, "gain", 3.0),
    "a function": lambda m: setattr(m, "function", torch.sigmoid),
    "a hook": lambda m: m.bn.register_forward_hook(lambda module, args, output: output + 1),
    "a forward": lambda m: setattr(m.act, "forward", torch.tanh),
    "the forward of a block": lambda m: setattr(m.blocks[0], "forward", torch.tanh),
    "training": lambda m: m.bn.train(),
    "weights": lambda m: m.up.weight.data.mul_(2),
    "no bias": lambda m: setattr(m.up, "bias", None),
}


def calls_of_blocks(graph):
    return sum("bn_act" in str(node.target) for node in graph.nodes)


@torch.no_grad()
@pytest.mark.parametrize("copied", [False, True], ids=["", "of a copy"])
@pytest.mark.parametrize("name", CHANGES)
def test_changes(name, copied):
    network, x = prepared(Network()), torch.randn(2, 3, 5, 5)
    fast = fastgen.accelerate(network)
    fast = copy.deepcopy(fast) if copied else fast
    fast(x)
    CHANGES[name](network)
    CHANGES[name](fast)
    torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_changes_when_compiled(name):
    """Before it is compiled, and after."""
    network, x = prepared(Network()), torch.randn(2, 3, 5, 5)
    fast = fastgen.accelerate(network)
    graphs = []

    def backend(module, inputs):
        graphs.append(calls_of_blocks(module.graph))
        return module.forward

    compiled = torch.compile(fast, fullgraph=True, backend=backend)
    for size in (5, 7, 8):  # of which the last two are one symbol
        compiled(torch.randn(2, 3, size, size))
    assert set(graphs) == {3}
    CHANGES[name](network)
    CHANGES[name](fast)
    torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(fast, backend="eager")(x), network(x), rtol=1e-4, atol=1e-5)


CONFIGURATIONS = {
    "namespace": (types.SimpleNamespace(gain=1.0), lambda c: c.gain, lambda c: setattr(c, "gain", 3.0)),
    "dataclass": (Gains(), lambda c: c.first, lambda c: setattr(c, "first", 3.0)),
    "field that does not compare": (Gains(), lambda c: c.unseen, lambda c: setattr(c, "unseen", 3.0)),
    "slots": (Slots(), lambda c: c.gain, lambda c: setattr(c, "gain", 3.0)),
    "nested dict": ({"a": {"b": 1.0}}, lambda c: c["a"]["b"], lambda c: c["a"].update(b=3.0)),
    "nested list": ([[1.0]], lambda c: c[0][0], lambda c: c[0].__setitem__(0, 3.0)),
    "dict in a tuple": (({"b": 1.0},), lambda c: c[0]["b"], lambda c: c[0].update(b=3.0)),
    "namespace in a dict": (
        {"a": types.SimpleNamespace(gain=1.0)},
        lambda c: c["a"].gain,
        lambda c: setattr(c["a"], "gain", 3.0),
    ),
    "array": (np.array([1.0, 2.0]), lambda c: float(c[0]), lambda c: c.__setitem__(0, 3.0)),
}


class Configured(nn.Module):
    def __init__(self, configuration, read):
        super().__init__()
        self.up, self.configuration, self.read = nn.ConvTranspose2d(3, 4, 4, 2, 1), configuration, read

    def forward(self, x):
        return torch.relu(self.up(x)) * self.read(self.configuration)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_nested_configurations(name):
    configuration, read, edit = CONFIGURATIONS[name]
    network, x = prepared(Configured(copy.deepcopy(configuration), read)), torch.randn(2, 3, 5, 5)
    fast = fastgen.accelerate(network)
    program = Program.of(fast)
    assert program._holds() and Program.of(copy.deepcopy(fast))._holds()
    torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)
    edit(network.configuration)
    edit(fast.configuration)
    assert not program._holds()
    torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(fast, backend="eager")
    torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_configurations_that_hold_themselves_and_too_much():
    configuration = types.SimpleNamespace(gain=1.0)
    configuration.own = configuration
    network, x = prepared(Configured(configuration, lambda c: c.own.gain)), torch.randn(2, 3, 5, 5)
    fast = fastgen.accelerate(network)
    assert Program.of(fast)._holds()
    torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)
    network.configuration.all = [[i] for i in range(2000)]
    network.conv = nn.Conv2d(4, 4, 3)
    (entry,) = [entry for entry in fastgen.accelerate(network).fastgen_report.skipped if entry.path == "conv"]
    assert entry.reason.endswith("its attribute 'configuration' holds too much to be compared at every call")


@torch.no_grad()
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_hooks_that_compute_weights(norm):
    """They replace the weight as they run, which is no change."""
    network, x = prepared(nn.Sequential(norm(nn.ConvTranspose2d(3, 4, 4, 2, 1)), nn.ReLU())), torch.randn(2, 3, 5, 5)
    fast = fastgen.accelerate(network)
    for module in (network, fast):
        module.train()(x)
        module.eval()
    assert Program.of(fast)._holds() and Program.of(copy.deepcopy(fast))._holds()
    torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)


class AsksForKinds(nn.Module):
    """As the decoder of DALL-E, which asks for the device of its weights, and that of diffusers, for their dtype."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(3, 3, 3, 3)), nn.Parameter(torch.randn(3))
        self.up, self.double_gain = nn.ConvTranspose2d(3, 3, 4, 2, 1), 2.0

    def forward(self, x):
        x = F.conv2d(x, self.w.half(), self.b.half()) if "cuda" in self.w.device.type else F.conv2d(x, self.w, self.b)
        x = torch.relu(self.up(x.to(next(self.up.parameters()).dtype)))
        return x * self.double_gain if self.up.weight.dtype == torch.float64 else x


@torch.no_grad()
def test_dtypes_and_devices_that_forward_decides_by():
    network, x = prepared(AsksForKinds()), torch.randn(2, 3, 5, 5)
    fast = fastgen.accelerate(network)
    assert [entry.what for entry in fast.fastgen_report.fused] == ["conv2d", "ConvTranspose2d + relu"]
    program = Program.of(fast)
    assert program._holds() and Program.of(copy.deepcopy(fast))._holds()
    torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-5)
    fast.double(), network.double()
    assert not program._holds()
    torch.testing.assert_close(fast(x.double()), network(x.double()), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(compiled(x.double()), network(x.double()), rtol=1e-9, atol=1e-9)
    again = fastgen.accelerate(network)
    torch.testing.assert_close(again(x.double()), network(x.double()), rtol=1e-9, atol=1e-9)
    fast.float()
    assert program._holds()


class FollowsKinds(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 3, 4, 2, 1)

    def forward(self, x):
        return torch.relu(self.up(x.to(self.up.weight.dtype))).to(next(self.parameters()).dtype)


@torch.no_grad()
def test_dtypes_that_are_passed_on_are_followed():
    network, x = prepared(FollowsKinds()), torch.randn(2, 3, 5, 5)
    fast = fastgen.accelerate(network)
    fast.double(), network.double()
    assert Program.of(fast)._holds()
    torch.testing.assert_close(fast(x), network(x), rtol=1e-9, atol=1e-9)
