from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import fastgen
from fastgen import models
from fastgen.acceleration.program import Program

from . import networks
from .networks import NETWORKS, make, prepared

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # of code that fails where the original does not

# What is fused: convolution, norm and activation of each.
FUSED = {
    "sequential": ["ConvTranspose2d + BatchNorm2d + ReLU"] * 2 + ["ConvTranspose2d + Tanh"],
    "control flow": ["ConvTranspose2d + BatchNorm2d + ReLU"] * 2 + ["ConvTranspose2d + Tanh"],
    "functional": [
        "ConvTranspose2d + BatchNorm2d + relu",
        "ConvTranspose2d + BatchNorm2d + leaky_relu",
        "ConvTranspose2d + BatchNorm2d + relu_",
        "ConvTranspose2d + tanh",
    ],
    "own parameters": ["conv_transpose2d + batch_norm + elu", "conv2d + sigmoid"],
    "shared activation": ["Conv2d + BatchNorm2d + ReLU"] * 3 + ["ConvTranspose2d + BatchNorm2d + ReLU"] * 2,
    "norms elsewhere": ["ConvTranspose2d + BatchNorm2d + relu", "ConvTranspose2d + BatchNorm2d + elu"],
    "pre-activation": ["Conv2d + BatchNorm2d + relu", "Conv2d", "ConvTranspose2d"],
    "pix2pix": [
        *(["Conv2d + BatchNorm2d + LeakyReLU"] * 2 + ["Conv2d + BatchNorm2d + ReLU"]),
        *["ConvTranspose2d + BatchNorm2d", "ConvTranspose2d + BatchNorm2d", "ConvTranspose2d + Tanh"],
    ],
    "unet": [
        "Conv2d + LeakyReLU",
        "Conv2d + InstanceNorm2d + ReLU",
        "ConvTranspose2d + BatchNorm2d + relu",
        "ConvTranspose2d + tanh",
    ],
    "resnet": [
        *["Conv2d + InstanceNorm2d + ReLU"] * 3,
        *["Conv2d + InstanceNorm2d", "Conv2d + InstanceNorm2d + ReLU", "Conv2d + InstanceNorm2d"],
        *["ConvTranspose2d + InstanceNorm2d + ReLU", "Conv2d + Tanh"],
    ],
    "vae": [
        "Conv2d + BatchNorm2d + LeakyReLU",
        "ConvTranspose2d + BatchNorm2d + LeakyReLU",
        "ConvTranspose2d + Sigmoid",
    ],
    "conditional": ["ConvTranspose2d + BatchNorm2d + ReLU"] * 2 + ["ConvTranspose2d + tanh"],
    "unconditional": ["ConvTranspose2d + BatchNorm2d + ReLU"] * 2 + ["ConvTranspose2d + tanh"],
    "eps and slope": [
        "Conv2d + BatchNorm2d + LeakyReLU",
        "ConvTranspose2d + BatchNorm2d + LeakyReLU",
        "ConvTranspose2d + LeakyReLU",
        "ConvTranspose2d + ELU",
        "Conv2d + Tanh",
    ],
    "two generators": ["ConvTranspose2d + BatchNorm2d + ReLU", "ConvTranspose2d + Tanh", "ConvTranspose2d + Tanh"],
    "opaque part": ["ConvTranspose2d + BatchNorm2d + relu", "ConvTranspose2d + tanh"],
    "norms of weights": [
        "ConvTranspose2d + relu",
        "ConvTranspose2d + BatchNorm2d + relu",
        "ConvTranspose2d + relu",
        "Conv2d + BatchNorm2d",
    ],
    "noise": ["ConvTranspose2d + BatchNorm2d + ReLU"],
}


def run(network, inputs):
    """On copies, as some networks change their input; and with the same noise."""
    torch.manual_seed(7)
    return network(*(x.clone() for x in inputs))


def double(network, inputs):
    return copied(network).double(), tree_map(lambda x: x.double() if x.is_floating_point() else x, inputs)


def copied(network):
    """With what `weight_norm` leaves as an attribute, which deepcopy refuses where it has a gradient."""
    attributes = [value for module in network.modules() for value in vars(module).values()]
    return copy.deepcopy(network, {id(x): x.detach() for x in attributes if isinstance(x, torch.Tensor)})


def assert_same(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **tolerance)
    assert_same_layout(found, expected)


def assert_same_layout(found, expected):
    assert type(found) is type(expected)
    assert [x.is_contiguous() for x in tree_leaves(found)] == [x.is_contiguous() for x in tree_leaves(expected)]


@pytest.fixture(params=NETWORKS)
def name(request):
    return request.param


@torch.no_grad()
def test_what_is_fused(name):
    network, _ = make(name)
    assert [entry.what for entry in fastgen.accelerate(network).fastgen_report.fused] == FUSED[name]


@torch.no_grad()
def test_is_as_exact_as_the_original(name):
    """At most twice the error of PyTorch in float32 against float64."""
    network, inputs = make(name)
    torch.manual_seed(0)
    exact_network, exact_inputs = double(network, inputs)
    results = [run(network, inputs), run(fastgen.accelerate(network), inputs)]
    exact = run(exact_network, exact_inputs)
    if name == "noise":  # drawn in another dtype
        return assert_same(results[1], results[0], rtol=1e-5, atol=1e-5)
    errors = [
        [(x.double() - y).abs().max().item() for x, y in zip(tree_leaves(result), tree_leaves(exact), strict=True)]
        for result in results
    ]
    scale = [y.abs().max().item() for y in tree_leaves(exact)]
    assert all(ours <= 2 * theirs + 1e-7 * s for theirs, ours, s in zip(*errors, scale, strict=True)), errors
    assert_same_layout(results[1], results[0])


@torch.no_grad()
def test_in_double_it_is_the_original(name):
    network, inputs = double(*make(name))
    assert_same(run(fastgen.accelerate(network), inputs), run(network, inputs), rtol=1e-9, atol=1e-9)


def test_gradients(name):
    network, inputs = double(*make(name))
    fast = fastgen.accelerate(network)
    gradients = []
    for module in (network, fast):
        leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
        loss = sum((x.sin() * (i + 1)).sum() for i, x in enumerate(tree_leaves(run(module, leaves))))
        loss.backward()
        gradients.append([x.grad for x in leaves if x.is_floating_point()] + [p.grad for p in module.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_the_original_is_not_touched(name):
    network, inputs = make(name)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    states = [dict(module.__dict__) for module in network.modules()]
    fast = fastgen.accelerate(network)
    for parameter in fast.parameters():
        parameter.zero_()
    run(fast, inputs)
    assert [dict(module.__dict__) for module in network.modules()] == states
    assert all(map(torch.equal, network.state_dict().values(), before.values()))


@torch.no_grad()
def test_copies_pickles_and_files(name, tmp_path):
    network, inputs = make(name)
    fast = fastgen.accelerate(network)
    expected = run(fast, inputs)
    torch.save(fast, tmp_path / "fast.pt")
    others = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))]
    others += [torch.load(tmp_path / "fast.pt", weights_only=False)]
    for parameter in fast.parameters():
        parameter.zero_()  # that of the copies is their own
    for other in others:
        torch.testing.assert_close(run(other, inputs), expected, rtol=0, atol=0)
        assert programs(other) == programs(fast)
        assert all(program._holds() for program in held(other))
        assert str(other.fastgen_report) == str(fast.fastgen_report)


def held(network):
    return [module.forward.__self__ for module in network.modules() if "forward" in module.__dict__]


def programs(network):
    return [name for name, module in network.named_modules() if "forward" in module.__dict__]


@torch.no_grad()
def test_state_dicts_load_both_ways(name):
    network, inputs = make(name)
    fast = fastgen.accelerate(network)
    run(fast, inputs)  # packs and folds
    other, _ = make(name)
    for key, tensor in other.state_dict().items():
        if tensor.is_floating_point():
            tensor.mul_(1.25) if "var" in key else tensor.add_(0.125)
    fast.load_state_dict(other.state_dict())
    network.load_state_dict(fast.state_dict())
    assert list(fast.state_dict()) == list(network.state_dict())
    torch.testing.assert_close(run(fast, inputs), run(network, inputs), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_moves(name):
    network, inputs = make(name)
    fast = fastgen.accelerate(network)
    run(fast, inputs)
    exact_network, exact_inputs = double(network, inputs)
    torch.testing.assert_close(run(fast.double(), exact_inputs), run(exact_network, exact_inputs), rtol=1e-9, atol=1e-9)
    assert all(program._holds() for program in held(fast))


@pytest.mark.parametrize("gradient", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", ["sequential", "functional", "unet", "conditional", "norms of weights", "resnet"])
def test_compiles(name, gradient):
    network, inputs = make(name)
    fast = fastgen.accelerate(network)
    with torch.set_grad_enabled(gradient):
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(run(compiled, inputs), run(fast, inputs), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_inference_mode(name):
    network, inputs = make(name)
    fast = fastgen.accelerate(network)
    with torch.inference_mode():
        torch.testing.assert_close(run(fast, inputs), run(network, inputs), rtol=1e-4, atol=1e-4)


def test_optimiser_steps_are_followed():
    network, inputs = double(*make("norms of weights"))
    fast = fastgen.accelerate(network)
    for _ in range(2):
        for module in (network, fast):
            optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
            optimiser.zero_grad()
            run(module, inputs).square().mean().backward()
            optimiser.step()
        with torch.no_grad():
            torch.testing.assert_close(run(fast, inputs), run(network, inputs), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_training_mode_runs_the_original():
    network, inputs = make("sequential")
    fast = fastgen.accelerate(network)
    expected = run(fast, inputs)
    for module in (network, fast):
        module.train()
    torch.testing.assert_close(run(fast, inputs), run(network, inputs), rtol=0, atol=0)
    torch.testing.assert_close(fast[1].running_mean, network[1].running_mean, rtol=0, atol=0)
    assert not torch.equal(run(fast.eval(), inputs), expected)  # the statistics have moved
    torch.testing.assert_close(run(fast, inputs), run(network.eval(), inputs))
    assert all(program._holds() for program in held(fast))


@torch.no_grad()
def test_training_mode_when_compiled():
    network, inputs = make("sequential")
    compiled = torch.compile(fastgen.accelerate(network), fullgraph=True, backend="aot_eager")
    run(compiled, inputs)
    torch.testing.assert_close(run(compiled.train(), inputs), run(network.train(), inputs))


@torch.no_grad()
def test_it_is_the_module_that_it_was():
    network, (images,) = make("vae")
    fast = fastgen.accelerate(network)
    assert type(fast) is networks.VAE
    latents = torch.randn(2, 3)
    torch.testing.assert_close(fast.decode(latents), network.decode(latents))
    assert "forward" in fast.decoder.__dict__
    torch.testing.assert_close(fast(x=images), network(images))
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        fast(y=images)


@torch.no_grad()
def test_arguments():
    network, (latents, labels) = make("conditional")
    fast = fastgen.accelerate(network)
    for args, kwargs in [((latents, labels), {}), ((latents,), {"labels": labels}), ((), {"z": latents})]:
        torch.testing.assert_close(fast(*args, **kwargs), network(*args, **kwargs))
        torch.testing.assert_close(fast(*args, features=True, **kwargs), network(*args, features=True, **kwargs))
    for wrong in [(latents, labels, True), (), (latents[:, :2],), ("no tensor",)]:
        with pytest.raises((TypeError, RuntimeError, AttributeError)) as expected:
            network(*wrong)
        with pytest.raises(type(expected.value)) as found:
            fast(*wrong)
        assert str(found.value) == str(expected.value)


@torch.no_grad()
def test_arguments_that_are_none_and_more_than_are_named():
    """As in residual blocks of diffusers and of taming transformers, whose `temb` is None in decoders."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x, temb, *args, **kwargs):
            x = torch.relu(self.conv1(x))
            if temb is not None:
                x = x + self.projection(temb)
            for value in (*args, *kwargs.values()):
                x = x + value
            return self.conv2(x)

    network, x = networks.prepared(Block()).double(), torch.randn(2, 3, 4, 5).double()
    fast, same = fastgen.accelerate(network), {"rtol": 1e-9, "atol": 1e-9}
    assert [entry.what for entry in fast.fastgen_report.fused] == ["Conv2d + relu", "Conv2d"]
    assert list(Program.of(fast).sources) == [("x",)]
    torch.testing.assert_close(fast(x, None), network(x, None), **same)
    torch.testing.assert_close(fast(x, temb=None), network(x, None), **same)
    torch.testing.assert_close(fast(x, None, 1.0, last=2.0), network(x, None, 1.0, last=2.0), **same)
    network.projection = fast.projection = nn.Identity()
    torch.testing.assert_close(fast(x, x), network(x, x), **same)
    for wrong in ((x,), (x, "no tensor")):
        with pytest.raises(TypeError) as expected:
            network(*wrong)
        with pytest.raises(TypeError) as found:
            fast(*wrong)
        assert str(found.value) == str(expected.value)


@torch.no_grad()
def test_other_outputs_and_inputs():
    network = networks.prepared(networks.KeywordInputs())
    left, right = torch.randn(2, 3, 4, 4), torch.randn(2, 2, 4, 4)
    found, expected = fastgen.accelerate(network)(left, right=right), network(left, right=right)
    assert type(found) is type(expected)
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_noise_is_drawn_at_every_call():
    network, inputs = make("noise")
    fast = fastgen.accelerate(network)
    assert not torch.equal(fast(*inputs), fast(*inputs))


@torch.no_grad()
def test_twice():
    network, inputs = make("functional")
    once = fastgen.accelerate(network)
    twice = fastgen.accelerate(once)
    assert twice.fastgen_report == once.fastgen_report
    torch.testing.assert_close(run(twice, inputs), run(once, inputs), rtol=0, atol=0)


@torch.no_grad()
def test_our_own_models():
    model = fastgen.models.DCGAN(image_shape=(1, 16, 16), latent_dim=5, num_filters=4).eval()
    fast = fastgen.accelerate(model)
    assert "generator.blocks.0.0" in fast.fastgen_report.paths()
    assert (fast.sample(3, seed=1).int() - model.sample(3, seed=1).int()).abs().max() <= 1
    (source,) = {source.text for source in Program.of(fast.generator).sources.values() if "labels" not in source.text}
    assert source.count("conv_bn_act_sequence(") == 1 and "conv_transpose2d_bn_act(" not in source


@torch.no_grad()
def test_our_own_blocks():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = fastgen.nn.ConvTransposeBNAct(4, 6, 3, 2, 1, activation="none")
            self.last = fastgen.nn.ConvTransposeBNAct(6, 2, 3, batch_norm=False, activation="tanh")

        def forward(self, x):
            return self.last(torch.relu(self.block(x, output_size=(8, 8))))

    network, x = Network().eval(), torch.randn(3, 4, 4, 4)
    fast = fastgen.accelerate(network)
    fused = ["ConvTranspose2d + BatchNorm2d + relu", "ConvTranspose2d + Tanh"]
    assert [entry.what for entry in fast.fastgen_report.fused] == fused
    torch.testing.assert_close(fast(x), network(x), rtol=1e-5, atol=1e-6)
    block = fastgen.accelerate(network.block)
    assert Program.of(block) is not None
    torch.testing.assert_close(block(x), network.block(x), rtol=1e-5, atol=1e-6)
    assert block(x, (8, 8)).shape == (3, 6, 8, 8)
    network.block.train()  # its statistics are those of the batch, in one call of its own
    fast, expected = fastgen.accelerate(network), network(x)
    assert [entry.what for entry in fast.fastgen_report.fused] == fused[1:]
    torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_our_own_blocks_with_hooks_and_other_forwards():
    class Doubled(fastgen.nn.ConvTransposeBNAct):
        def in_turn(self, input, output_size=None):
            return 2 * super().in_turn(input, output_size)

    blocks = nn.Sequential(Doubled(3, 4, 3), fastgen.nn.ConvTransposeBNAct(4, 2, 3)).eval()
    blocks[1].register_forward_hook(lambda module, inputs, output: output + 1)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(fastgen.accelerate(blocks)(x), blocks(x), rtol=1e-5, atol=1e-6)


def test_report_is_a_table():
    network, _ = make("opaque part")
    lines = str(fastgen.accelerate(network).fastgen_report).splitlines()
    assert lines[0].split() == ["where", "what", "how,", "or", "why", "not"]
    assert lines[1].split() == ["fused", "up", "ConvTranspose2d", "+", "BatchNorm2d", "+", "relu", "in", "one", "pass"]
    assert str(fastgen.accelerate(nn.ReLU()).fastgen_report) == "nothing found that could be fused"


def test_errors():
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got function"):
        fastgen.accelerate(lambda x: x)
    with pytest.raises(TypeError, match="accelerate the module first, then compile it"):
        fastgen.accelerate(torch.compile(nn.ReLU()))


def test_saved_state():
    network, _ = make("resnet")
    fast, file = fastgen.accelerate(network), io.BytesIO()
    torch.save(fast.state_dict(), file)
    file.seek(0)
    network.load_state_dict(torch.load(file, weights_only=True))
    assert [p.requires_grad for p in fast.parameters()] == [p.requires_grad for p in network.parameters()]


class OwnOperations(nn.Module):
    """Calls operations of this library itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 4)
        self.norm, self.groups = nn.BatchNorm2d(6), nn.GroupNorm(2, 8)

    def forward(self, x):
        x = fastgen.ops.conv2d_bn_act(x, self.conv.weight, self.conv.bias, padding=1, activation="elu", alpha=0.5)
        x = fastgen.ops.group_norm_act(x, 2, self.groups.weight, self.groups.bias, activation="silu")
        norm = self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias
        options = {"stride": 2, "padding": 1, "activation": "leaky_relu", "negative_slope": 0.3}
        return torch.tanh(fastgen.ops.conv_transpose2d_bn_act(x, self.up.weight, self.up.bias, *norm, **options))


@torch.no_grad()
def test_own_operations_are_recorded():
    network = prepared(OwnOperations())
    fast, x = fastgen.accelerate(network), torch.randn(2, 3, 6, 5)
    torch.testing.assert_close(fast(x), network(x))
    whats = ["conv2d + elu", "group_norm + silu", "conv_transpose2d + batch_norm + leaky_relu"]
    assert [entry.what for entry in fast.fastgen_report.fused] == whats and not fast.fastgen_report.skipped
    network = models.VQVAE(image_shape=(3, 8, 8), num_filters=8, latent_dim=4, num_codes=5).eval()
    fast = fastgen.accelerate(network)
    z = torch.randn(2, 4, 2, 2)
    torch.testing.assert_close(fast.decoder(z), network.decoder(z))
    assert len(fast.fastgen_report.fused) == 14
