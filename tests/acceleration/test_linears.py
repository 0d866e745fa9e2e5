"""Linear layers in a row: the generators, decoders and mapping networks that are made of them."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgen
from fastgen.acceleration import linears


class Functional(nn.Module):
    """The same in functions, with a norm of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 12), nn.Linear(12, 7, bias=False)
        self.weight = nn.Parameter(torch.randn(3, 7))
        self.register_buffer("mean", torch.randn(12))
        self.register_buffer("var", torch.rand(12) + 0.5)

    def forward(self, x):
        x = F.elu(F.batch_norm(self.first(x), self.mean, self.var), 0.7)
        return torch.sigmoid(F.linear(F.relu(self.second(x)), self.weight))


class Elsewhere(nn.Module):
    """What the second layer takes is used once more, and its size is asked for."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))

    def forward(self, x):
        a, b, c, d, e = self.layers
        h = torch.relu(a(x))
        y = torch.tanh(c(b(h) * h.shape[1]))
        return d(torch.tanh(e(y))) + h


def generator(width=9):
    norm = nn.BatchNorm1d(2 * width, 0.8)
    return nn.Sequential(
        nn.Linear(5, width), nn.LeakyReLU(0.2, inplace=True), nn.Dropout(0.3),
        nn.Linear(width, 2 * width), norm, nn.SiLU(),
        nn.Linear(2 * width, 11, bias=False), nn.Identity(), nn.Tanh(),
    )  # fmt: skip


def normed():
    return nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(5, 6)), nn.ReLU(), nn.utils.weight_norm(nn.Linear(6, 7))
    )


# As where the rewritten code fails and the original does not.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

NETWORKS = {"generator": generator, "functions": Functional, "elsewhere": Elsewhere, "normed": normed}
INPUTS = {"elsewhere": 6}
FUSED = {"generator": 3, "functions": 3, "elsewhere": 3, "normed": 2}


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    monkeypatch.setattr(linears, "_LEAST_WEIGHTS", 0)


def make(name):
    network = NETWORKS[name]().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight)
    return network


def native_calls(monkeypatch):
    """What is computed natively from now on."""
    calls, call = [], linears.conv_bn_act_sequence
    monkeypatch.setattr(linears, "call_known", lambda *_: None)
    monkeypatch.setattr(linears, "conv_bn_act_sequence", lambda *args: calls.append(args) or call(*args))
    return calls


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_original(name, dtype):
    network = make(name).to(dtype)
    fast = fastgen.accelerate(network)
    assert len(fast.fastgen_report.fused) == FUSED[name]
    for rows in (1, 3, 64, 65, 3):
        x = torch.randn(rows, INPUTS.get(name, 5), dtype=dtype)
        before = x.clone()
        torch.testing.assert_close(fast(x), network(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(x, before)


@torch.no_grad()
def test_is_native_for_a_few_rows_alone(monkeypatch):
    fast, calls = fastgen.accelerate(make("generator")), native_calls(monkeypatch)
    for rows, count in ((64, 1), (65, 0), (0, 0)):
        calls.clear()
        assert fast(torch.randn(rows, 5)).shape == (rows, 11)
        assert len(calls) == count
    with pytest.raises(RuntimeError, match="running_mean"):  # BatchNorm1d takes the wrong dimension, as in the original
        fast(torch.randn(2, 3, 5))
    for fast_half in (fast.half(), fast.bfloat16()):
        fast_half(torch.randn(4, 5).to(next(fast_half.parameters()).dtype))
    assert not calls


@torch.no_grad()
def test_rows_of_several_dimensions(monkeypatch):
    network = make("normed")
    fast, calls = fastgen.accelerate(network), native_calls(monkeypatch)
    strided = torch.randn(4, 5, 16).transpose(1, 2)
    for x, count in ((torch.randn(5), 1), (torch.randn(2, 3, 4, 5), 1), (strided, 1), (torch.randn(4, 17, 5), 0)):
        calls.clear()
        torch.testing.assert_close(fast(x), network(x))
        assert len(calls) == count


@torch.no_grad()
def test_a_row_does_not_depend_on_the_others():
    fast, x = fastgen.accelerate(generator(40).eval()), torch.randn(64, 5)
    whole = fast(x)
    for rows in (slice(0, 1), slice(7, 20), slice(63, 64)):
        assert torch.equal(fast(x[rows]), whole[rows])


CHANGES = {
    "in place": lambda weight: weight.mul_(2.0),
    "data": lambda weight: setattr(weight, "data", torch.randn_like(weight)),
    "past the version": lambda weight: weight.detach().numpy().__imul__(2.0),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("layer", [0, 3])
def test_changed_weights_are_followed(change, layer):
    fast, x = fastgen.accelerate(make("generator")), torch.randn(3, 5)
    before = fast(x)
    for _ in range(2):
        change(fast[layer].weight)
        network = make("generator")
        network.load_state_dict(fast.state_dict())
        torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(fast(x), before)


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_inference_tensors_and_tracing():
    with torch.inference_mode():
        network = make("generator")
        fast, x = fastgen.accelerate(network), torch.randn(3, 5)
        torch.testing.assert_close(fast(x), network(x))
    network, x = make("generator"), torch.randn(3, 5)
    fast = fastgen.accelerate(network)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), network(x))
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(fast, x)(x[:2]), network(x[:2]))
        torch.testing.assert_close(torch.func.vmap(fast)(x[:, None])[:, 0], network(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(x).dtype is torch.bfloat16


def test_gradients_flow():
    network = make("generator")
    fast, x = fastgen.accelerate(network), torch.randn(4, 5)
    fast(x.requires_grad_()).sum().backward()
    grads = [parameter.grad for parameter in fast.parameters()]
    ours, x.grad = x.grad, None
    network(x).sum().backward()
    torch.testing.assert_close(ours, x.grad)
    torch.testing.assert_close(grads, [parameter.grad for parameter in network.parameters()])


@torch.no_grad()
def test_nothing_is_kept_of_networks_that_are_gone():
    gc.collect()
    before = len(linears._kernels)
    fast = fastgen.accelerate(make("generator"))
    fast(torch.randn(2, 5))
    assert len(linears._kernels) == before + 1
    twin = copy.deepcopy(fast)
    del fast
    gc.collect()
    assert len(linears._kernels) == before
    assert twin(torch.randn(2, 5)).shape == (2, 11)


def test_small_networks_and_single_layers_are_left_alone(monkeypatch):
    single = nn.Sequential(nn.Linear(900, 900), nn.BatchNorm1d(900), nn.ReLU()).eval()
    assert not fastgen.accelerate(single).fastgen_report.fused
    monkeypatch.setattr(linears, "_LEAST_WEIGHTS", 1 << 19)
    assert not fastgen.accelerate(make("generator")).fastgen_report.fused
    assert len(fastgen.accelerate(generator(1000).eval()).fastgen_report.fused) == 3


def test_training_runs_the_forward_of_the_class():
    fast, x = fastgen.accelerate(make("generator")), torch.randn(8, 5)
    torch.manual_seed(0)
    trained = fast.train()(x)
    network = make("generator")
    network.load_state_dict(fast.state_dict())
    torch.manual_seed(0)
    torch.testing.assert_close(network.train()(x), trained)
