"""Published generators: exact in eval, with dropout that stays random, with statistics of the batch, at any size."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import fastgen

from .architectures import ARCHITECTURES, cyclegan, pix2pix
from .networks import prepared, z
from .test_accelerate import assert_same_layout, double, run

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # of code that fails where the original does not

# How many blocks are fused, and what is not, with a part of the reason.
REPORTS = {
    "dcgan": (4, {}),
    "pix2pix": (10, {}),
    "pix2pix, instances": (10, {}),
    "cyclegan": (19, {}),
    "cyclegan, batches": (10, {}),
    "vae": (7, {}),
    "sngan": (7, {}),
    "sngan, spectral": (7, {}),
    "sngan, conditional": (7, {}),
    "conditional": (3, {}),
    "stylegan": (8, {"blur": "by itself"}),
    "sagan": (7, {}),
    "srgan": (8, {"conv1.1": "no fused form", "blocks.0.2": "no fused form", "blocks.1.2": "no fused form"}),
    "latent": (44, {}),
    "vqvae": (7, {}),
}
RANDOM = ("vae",)  # draws in eval, too: another dtype draws other numbers


def make(name):
    torch.manual_seed(0)
    network, inputs = ARCHITECTURES[name]()
    return prepared(network), inputs


@pytest.fixture(params=ARCHITECTURES)
def name(request):
    return request.param


def assert_as_exact(network, fast, inputs):
    """At most twice the error of the original in float32 against float64, and of its layout."""
    theirs, ours = run(network, inputs), run(fast, inputs)
    exact_network, exact_inputs = double(network, inputs)
    for a, b, truth in zip(*map(tree_leaves, (ours, theirs, run(exact_network, exact_inputs))), strict=True):
        error, bound = [(x.double() - truth).square().mean().sqrt() for x in (a, b)]
        assert error <= 2 * bound + 2**-22 * truth.abs().max()  # of so few numbers one error may happen to be small
    assert_same_layout(ours, theirs)


@torch.no_grad()
def test_eval(name):
    network, inputs = make(name)
    fast = fastgen.accelerate(network)
    if name in RANDOM:
        torch.testing.assert_close(run(fast, inputs), run(network, inputs))
    else:
        assert_as_exact(network, fast, inputs)


def test_reports(name):
    network, _ = make(name)
    fused, left = REPORTS[name]
    report = fastgen.accelerate(network).fastgen_report
    assert len(report.fused) == fused
    reasons = {entry.path: entry.reason for entry in report.skipped}
    assert all(part in reasons[path] for path, part in left.items())
    assert left or not reasons
    assert len(report.paths()) >= len([m for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)])


@torch.no_grad()
def test_training_mode_of_parts(name):
    """Dropout that is meant to be random, and norms on statistics of the batch, as at the test of pix2pix."""
    for kinds in ((nn.Dropout,), (nn.Dropout, nn.BatchNorm2d, nn.InstanceNorm2d)):
        network, inputs = double(*make(name))
        chosen = [module for module in network.modules() if isinstance(module, kinds)]
        for module in chosen:
            module.train()
        fast = fastgen.accelerate(network)
        results = [(run(network, inputs), network.state_dict()), (run(fast, inputs), fast.state_dict())]
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
        assert [module.training for module in fast.modules()] == [module.training for module in network.modules()]
        if any(isinstance(module, nn.Dropout) and module.p > 0 for module in chosen):
            assert not torch.equal(fast(*inputs), fast(*inputs))


def test_gradients(name):
    network, inputs = double(*make(name))
    gradients = []
    for module in (network, fastgen.accelerate(network)):
        sum(x.square().sum() for x in tree_leaves(run(module, inputs))).backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-7, atol=1e-7)


@torch.no_grad()
def test_copies(name):
    network, inputs = make(name)
    fast = fastgen.accelerate(network)
    expected = run(fast, inputs)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        torch.testing.assert_close(run(other, inputs), expected, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["pix2pix", "cyclegan", "sngan, spectral", "sagan", "vqvae"])
def test_compiles(name):
    network, inputs = make(name)
    compiled = torch.compile(fastgen.accelerate(network), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, inputs), run(network, inputs), rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("make_network", [cyclegan, pix2pix], ids=["cyclegan", "pix2pix"])
def test_wide_networks_are_as_exact(make_network):
    """Errors grow with the number of channels, and not alike in all of PyTorch's convolutions."""
    torch.manual_seed(0)
    network = prepared(make_network(nn.BatchNorm2d, width=32))
    assert_as_exact(
        network, fastgen.accelerate(network), (z(3, 16, 16, n=1) if make_network is cyclegan else z(3, 32, 32, n=1),)
    )


@torch.no_grad()
def test_sizes_in_turn():
    network, _ = make("cyclegan, batches")
    fast = fastgen.accelerate(network)
    for height, width in [(8, 12), (16, 8), (8, 12), (20, 24), (12, 12)]:
        for batch in (1, 3):
            images = (z(3, height, width, n=batch),)
            torch.testing.assert_close(run(fast, images), run(network, images), rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_transforms():
    """`torch.func` and forward-mode differentiation see PyTorch's own operators."""
    network, (latents,) = double(*make("dcgan"))
    fast, direction = fastgen.accelerate(network), torch.randn_like(latents)
    for transformed in (
        lambda module: torch.func.vmap(module)(latents[:, None]),
        lambda module: torch.func.jvp(module, (latents,), (direction,)),
        lambda module: torch.func.grad(lambda x: module(x).sum())(latents),
    ):
        torch.testing.assert_close(transformed(fast), transformed(network))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(latents, direction)
        tangents = [torch.autograd.forward_ad.unpack_dual(module(dual)).tangent for module in (fast, network)]
        torch.testing.assert_close(*tangents)
