"""Code for parts of a network, and for other arguments, that is made at the first call."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastgen
from fastgen.acceleration import rewrite
from fastgen.acceleration.program import Program

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(block(8, 6), block(6, 4), nn.Dropout())
        self.scale = nn.Conv2d(1, 1, 1)

    def forward(self, x, by=None):
        x = self.body(x)
        return x if by is None else x * by


def block(inputs, outputs):
    return nn.Sequential(nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU())


def make():
    torch.manual_seed(0)
    network = Network().eval()
    for parameter in network.parameters():
        parameter.normal_()
    return network, fastgen.accelerate(network), torch.randn(2, 8, 5, 4)


def made(module):
    return set(Program.of(module).sources)


def check(fast, network, *inputs):
    torch.testing.assert_close(fast(*inputs), network(*inputs), rtol=1e-5, atol=1e-5)


def test_parts():
    network, fast, x = make()
    assert made(fast) == {("x",), ("x", "by")}  # as a part has not been reached, it might be by the other arguments
    assert made(fast.body) == made(fast.body[0]) == set()
    check(fast.body, network.body, x)
    assert made(fast.body) == {("input",)} and made(fast.body[0]) == set()
    check(fast.body[0], network.body[0], x)
    assert made(fast.body[0]) == {("input",)}
    assert [entry.path for entry in fast.fastgen_report.fused] == ["body.0.0", "body.1.0"]
    assert [entry.path for entry in fast.fastgen_report.skipped] == ["scale"]


def test_other_arguments(monkeypatch):
    network, _, x = make()
    del network.scale
    traced = []
    original = rewrite.trace
    monkeypatch.setattr(rewrite, "trace", lambda *args: traced.append(args[1]) or original(*args))
    fast = fastgen.accelerate(network)
    assert traced == [("x",)]
    for _ in range(2):
        check(fast, network, x, torch.tensor(2.0))
    assert traced == [("x",), ("x", "by")] and made(fast) == set(traced)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(copied):
    network, fast, x = make()
    other = copied(fast.body)
    check(other, network.body, x)
    assert made(other) == {("input",)} and made(fast.body) == set()


def test_changes_before_the_first_call():
    network, fast, x = make()
    fast.body[1].train(), network.body[1].train()
    check(fast.body, network.body, x)
    assert made(fast.body) == set()
    fast.eval(), network.eval()
    check(fast.body, network.body, x)
    assert made(fast.body) == {("input",)}

    network, fast, x = make()
    for module in (network, fast):
        module.body[1][0].register_forward_hook(lambda module, inputs, output: output + 1)
    check(fast.body, network.body, x)
    assert made(fast.body) == set()


def test_compiled():
    network, fast, x = make()
    check(torch.compile(fast.body, fullgraph=True, backend="eager"), network.body, x)
    assert made(fast.body) == {("input",)}


def test_looked_at_by_others():
    network, fast, x = make()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert fast.body(x).shape == (2, 4, 20, 16)
    check(torch.export.export(fast.body, (x,)).module(), network.body, x)
    check(torch.jit.trace(fast.body, x, check_trace=False), network.body, x)
    assert made(fast.body) == set()
