"""What decoders with group norms have: upsampling before convolutions, norms by the input, x * sigmoid(x), sizes as
numbers, and shapes that are kept as attributes.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgen
from fastgen.acceleration import blocks
from fastgen.acceleration.program import Program

from .networks import prepared, z
from .test_left_alone import reasons, same, whats

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # of code that fails where the original does not

HOW = "in one pass, as a transposed convolution of what was upsampled"
BEFORE = "before the upsampling"


def how(fast, path):
    return next(entry.reason for entry in fast.fastgen_report.fused if entry.path == path)


class Upsampled(nn.Module):
    """A convolution after an upsampling by a function."""

    def __init__(self, *kernel, **how):
        super().__init__()
        self.conv, self.how = nn.Conv2d(10, 9, *kernel), how

    def forward(self, x):
        return torch.relu(self.conv(F.interpolate(x, **self.how)))


# Kernel and padding, and what comes before.
UPSAMPLED = {
    "3": ((3, 1, 1), {"scale_factor": 2}),
    "3, a float": ((3, 1, 1), {"scale_factor": 2.0, "mode": "nearest"}),
    "3, by three": ((3, 1, 1), {"scale_factor": 3, "mode": "nearest-exact"}),
    "3, by four": ((3, 1, 1), {"scale_factor": (4, 4)}),
    "3, along one axis": ((3, 1, 1), {"scale_factor": (2, 1), "recompute_scale_factor": True}),
    "3, no padding": ((3, 1), {"scale_factor": 2}),
    "3, most padding": ((3, 1, 2), {"scale_factor": 2}),
    "same": ((3, 1, "same"), {"scale_factor": 2}),
    "valid": ((3, 1, "valid"), {"scale_factor": 2}),
    "5": ((5, 1, 2), {"scale_factor": 2}),
    "4": ((4, 1, 1), {"scale_factor": 2}),
    "3x5": (((3, 5), 1, (1, 2)), {"scale_factor": (3, 2)}),
    "1": ((1,), {"scale_factor": 2}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", UPSAMPLED)
def test_upsampling(name):
    torch.manual_seed(0)
    kernel, options = UPSAMPLED[name]
    fast = same(Upsampled(*kernel, **options).eval(), z(10, 5, 7), z(10, 2, 2), z(10, 16, 9, n=1))
    assert how(fast, "conv") == (BEFORE if kernel == (1,) else HOW)
    (source,) = Program.of(fast).sources.values()
    assert ("interpolate" in source.text) == (kernel == (1,))


@torch.no_grad()
@pytest.mark.parametrize("up", [nn.Upsample(scale_factor=2), nn.UpsamplingNearest2d(scale_factor=2)])
def test_upsampling_layers_in_a_row(up):
    """Convolutions after upsampling, norms of weights and other blocks are one native call."""
    norm = nn.utils.spectral_norm(nn.Conv2d(8, 6, 3, padding=1))
    layers = [up, nn.Conv2d(5, 8, 3, padding=1), nn.BatchNorm2d(8, 0.8), nn.LeakyReLU(0.2, inplace=True)]
    layers += [up, norm, nn.SiLU(), nn.ConvTranspose2d(6, 6, 4, 2, 1), nn.ReLU(), up, nn.Conv2d(6, 3, 3, padding=1)]
    fast = same(prepared(nn.Sequential(*layers)), z(5, 4, 3), z(5, 2, 2, n=1))
    assert len(whats(fast)) == 4 and not reasons(fast)
    (source,) = Program.of(fast).sources.values()
    assert source.text.count("conv_bn_act_sequence(") == 1


def exactness(channels, scale):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Upsample(scale_factor=scale), nn.Conv2d(channels, channels, 3, padding=1)).eval()
    fast, x = fastgen.accelerate(network), z(channels, 12, 9)
    assert how(fast, "1") == HOW
    truth = copy.deepcopy(network).double()(x.double())
    return [(y.double() - truth).square().mean().sqrt() for y in (fast(x), network(x))]


@torch.no_grad()
@pytest.mark.parametrize("channels", [8, 64])
@pytest.mark.parametrize("scale", [2, 3])
def test_upsampling_is_as_exact(channels, scale):
    ours, theirs = exactness(channels, scale)
    assert ours <= 2 * theirs


def test_gradients_of_upsampling():
    torch.manual_seed(0)
    network = Upsampled(3, 1, 1, scale_factor=2).double().eval()
    fast, x = fastgen.accelerate(network), z(10, 4, 3).double().requires_grad_()
    found = [torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()]) for module in (network, fast)]
    torch.testing.assert_close(found[1], found[0])


@torch.no_grad()
def test_weights_after_upsampling_are_followed():
    torch.manual_seed(0)
    network = Upsampled(3, 1, 1, scale_factor=2).eval()
    fast = fastgen.accelerate(network)
    for change in (lambda w: w.mul_(2), lambda w: w.data.add_(1), lambda w: w[0].zero_()):
        x = z(10, 4, 3)
        fast(x)
        change(network.conv.weight)
        change(fast.conv.weight)
        torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_is_kept_in_inference_mode_is_served_later():
    weight = torch.randn(3, 4, 3, 3)
    with torch.inference_mode():
        first = blocks.upsampling_weight(weight, (2, 2))
    assert not first.is_inference()
    assert blocks.upsampling_weight(weight, (2, 2)) is first


class WrittenBetween(nn.Module):
    def __init__(self, write_source):
        super().__init__()
        self.up, self.conv, self.write_source = nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1), write_source

    def forward(self, x):
        x = x + 1
        y = self.up(x)
        (x if self.write_source else y).mul_(3)
        return self.conv(y)


class AlsoUsed(nn.Module):
    """The upsampled image is a skip, too."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        y = F.interpolate(x, scale_factor=2)
        return self.conv(y) + y


def after(up, *conv, **options):
    return nn.Sequential(up, nn.Conv2d(4, 4, *conv, **options))


KEPT_UPSAMPLING = {
    "bilinear": lambda: after(nn.Upsample(scale_factor=2, mode="bilinear"), 3),
    "a size": lambda: after(nn.Upsample(size=(8, 10)), 3),
    "a half": lambda: after(nn.Upsample(scale_factor=1.5), 3),
    "by five": lambda: after(nn.Upsample(scale_factor=5), 3),
    "steps": lambda: after(nn.Upsample(scale_factor=2), 3, stride=2),
    "gaps": lambda: after(nn.Upsample(scale_factor=2), 3, dilation=2),
    "groups": lambda: after(nn.Upsample(scale_factor=2), 3, groups=2),
    "wide padding": lambda: after(nn.Upsample(scale_factor=2), 3, padding=3),
    "uneven padding": lambda: after(nn.Upsample(scale_factor=2), 2, padding="same"),
    "written to": lambda: WrittenBetween(False),
    "source written to": lambda: WrittenBetween(True),
}


@torch.no_grad()
@pytest.mark.parametrize("name", KEPT_UPSAMPLING)
def test_upsampling_that_stays(name):
    torch.manual_seed(0)
    fast = same(KEPT_UPSAMPLING[name]().eval(), z(4, 4, 5))
    assert not any(entry.reason in (HOW, BEFORE) for entry in fast.fastgen_report.fused)


@torch.no_grad()
def test_upsampling_that_is_used_elsewhere():
    torch.manual_seed(0)
    fast = same(AlsoUsed().eval(), z(4, 4, 5))
    assert how(fast, "conv") == HOW


@torch.no_grad()
def test_upsampling_that_changes_later():
    torch.manual_seed(0)
    network = after(nn.Upsample(scale_factor=2), 3).eval()
    fast, x = fastgen.accelerate(network), z(4, 4, 5)
    for module in (network, fast):
        module[0].scale_factor = 3.0
    torch.testing.assert_close(fast(x), network(x))


# Norms by the input


class Functions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 6, 3), nn.Parameter(torch.randn(6))

    def forward(self, x):
        h = F.group_norm(self.conv(x), 3, self.scale, eps=1e-3)
        return F.leaky_relu(F.instance_norm(h, weight=self.scale), 0.1)


NORMS = {
    "group": (lambda: nn.GroupNorm(2, 4), ["GroupNorm + ReLU"]),
    "group, no scale": (lambda: nn.GroupNorm(4, 4, affine=False), ["GroupNorm + ReLU"]),
    "instance": (lambda: nn.InstanceNorm2d(4), ["InstanceNorm2d + ReLU"]),
    "instance, of any channels": (lambda: nn.InstanceNorm2d(4, eps=0.1), ["InstanceNorm2d + ReLU"]),
    "instance, scaled": (lambda: nn.InstanceNorm2d(4, affine=True), ["InstanceNorm2d + ReLU"]),
}


@torch.no_grad()
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("conv", [nn.Conv2d, nn.ConvTranspose2d])
def test_norms_by_the_input(name, conv):
    torch.manual_seed(0)
    make, expected = NORMS[name]
    network = nn.Sequential(conv(3, 4, 3), make(), nn.ReLU()).eval()
    for value in network[1].parameters():
        nn.init.normal_(value)
    fast = same(network, z(3, 5, 4), z(3, 4, 4, n=1))
    assert whats(fast) == [conv.__name__, *expected] and not reasons(fast)


@torch.no_grad()
def test_norms_as_functions():
    torch.manual_seed(0)
    fast = same(Functions().eval(), z(3, 8, 9))
    assert whats(fast) == ["Conv2d", "group_norm", "instance_norm + leaky_relu"]


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 5), (2, 4, 3, 3, 2)])
def test_group_norms_of_other_than_images(shape):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)

        def forward(self, x, image):
            return F.elu(self.norm(x), 0.5) + self.conv(image).mean()

    network, inputs = Both().eval(), (torch.randn(shape), z(3, 4, 4))
    torch.testing.assert_close(fastgen.accelerate(network)(*inputs), network(*inputs))


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(4), nn.GroupNorm(4, 4)])
def test_norms_of_one_pixel(norm):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), norm).eval()
    for module in (network, fastgen.accelerate(network)):
        with pytest.raises(ValueError, match=r"more than 1 (spatial element|value per channel)"):
            module(z(3, 3, 3, n=1))


@torch.no_grad()
def test_norms_in_float32_of_bfloat16():
    network = nn.Sequential(nn.Conv2d(8, 8, 3).bfloat16(), nn.GroupNorm(2, 8), nn.SiLU()).eval()
    x = z(8, 6, 6).bfloat16()
    torch.testing.assert_close(fastgen.accelerate(network)(x), network(x), rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_norms_left_to_themselves():
    """In training mode, with hooks, with running statistics that are updated."""
    training = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)).eval()
    training[1].train()
    hooked = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)).eval()
    hooked[1].register_forward_hook(lambda module, args, output: output + 1)
    updated = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True)).eval()
    updated[1].train()
    for network, reason in ((training, "in training mode"), (hooked, "has hooks"), (updated, "in training mode")):
        assert reasons(same(network, z(3, 5, 5)))["1"].startswith(reason)


# x * sigmoid(x)


class Gated(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.conv, self.norm, self.of = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), forward

    def forward(self, x):
        return self.of(self.norm(self.conv(x)))


def kept_gate(x):
    gate = torch.sigmoid(x)
    return x * gate + gate


def written_gate(x):
    gate = torch.sigmoid(x)
    x.add_(1)
    return x * gate


GATES = {
    "swish": (lambda x: x * torch.sigmoid(x), True),
    "reversed": (lambda x: torch.sigmoid(x) * x, True),
    "methods": (lambda x: x.mul(x.sigmoid()), True),
    "function": (lambda x: torch.mul(F.sigmoid(x), x), True),
    "other factor": (lambda x: (x + 1) * torch.sigmoid(x), False),
    "gate is used": (kept_gate, False),
    "written between": (written_gate, False),
}


@torch.no_grad()
@pytest.mark.parametrize("name", GATES)
def test_silu_written_out(name):
    torch.manual_seed(0)
    function, known = GATES[name]
    fast = same(Gated(function).eval(), z(3, 5, 4))
    assert whats(fast) == ["Conv2d", "GroupNorm + silu" if known else "GroupNorm"]


@torch.no_grad()
@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(), nn.SiLU(inplace=True)])
def test_activations_of_decoders(act):
    torch.manual_seed(0)
    fast = same(
        nn.Sequential(nn.ConvTranspose2d(5, 6, 4, 2, 1), act, nn.Conv2d(6, 9, 3), copy.deepcopy(act)).eval(), z(5, 4, 4)
    )
    name = type(act).__name__
    assert whats(fast) == [f"ConvTranspose2d + {name}", f"Conv2d + {name}"]
    approximate = same(nn.Sequential(nn.ConvTranspose2d(5, 6, 4), nn.GELU("tanh")).eval(), z(5, 4, 4))
    assert whats(approximate) == ["ConvTranspose2d"]


# Sums


class Sum(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(4, 4, 3, padding=1), function

    def forward(self, x):
        return self.function(x, self.conv(x))


def kept_term(x, h):
    total = x + h
    return total, h


# What is summed, and whether it may be left where the convolution's result is.
SUMS = {
    "residual": (lambda x, h: x + h, True),
    "reversed": (lambda x, h: h.add(x), True),
    "function": (lambda x, h: torch.add(x, h) * 2, True),
    "broadcast": (lambda x, h: x[:, :1] + h, True),
    "larger": (lambda x, h: torch.stack([x, x]) + h, True),
    "another dtype": (lambda x, h: x.double() + h, True),
    "a number": (lambda x, h: h + 1, True),
    "itself": (lambda x, h: h + h, False),
    "used twice": (kept_term, False),
    "scaled": (lambda x, h: torch.add(x, h, alpha=2), False),
}


# Products and activations, and how many of them may be left there.
TAILS = {
    "chain": (lambda x, h: F.leaky_relu(h * x + 1, 0.3) * 1.5, 4),
    "by channel": (lambda x, h: torch.tanh(h * x[:, :, :1, :1]), 2),
    "reversed": (lambda x, h: x[:, :1] * h, 1),
    "methods": (lambda x, h: h.mul(0.5).sigmoid().relu(), 3),
    "elu": (lambda x, h: F.elu(h + x, alpha=0.5), 2),
    "squared": (lambda x, h: h * h, 0),
    "used twice": (lambda x, h: (h + x) * torch.tanh(h), 0),
    "in place already": (lambda x, h: F.relu(h * 2, inplace=True), 1),
    "larger": (lambda x, h: torch.stack([x, x]) * h, 1),
    "another dtype": (lambda x, h: torch.tanh(h * x.double()), 2),
}


@torch.no_grad()
@pytest.mark.parametrize("name", TAILS)
def test_products_and_activations(name):
    torch.manual_seed(0)
    function, in_place = TAILS[name]
    network, x = Sum(function).eval(), z(4, 5, 3)
    fast, before = fastgen.accelerate(network), x.clone()
    ((source,), expected) = Program.of(fast).sources.values(), network(x)
    assert source.text.count("_into(") == in_place
    torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
    with torch.enable_grad():
        torch.testing.assert_close(fast(x.requires_grad_()), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before)


@torch.no_grad()
@pytest.mark.parametrize("name", SUMS)
def test_sums(name):
    torch.manual_seed(0)
    function, in_place = SUMS[name]
    network = Sum(function).eval()
    fast = same(network, z(4, 5, 3))
    (source,) = Program.of(fast).sources.values()
    assert ("add_into" in source.text) == in_place
    x = z(4, 5, 3)
    before = x.clone()
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before)


def test_gradients_of_sums():
    network = Sum(SUMS["residual"][0]).double().eval()
    x = z(4, 5, 3).double().requires_grad_()
    found = [
        torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
        for module in (network, fastgen.accelerate(network))
    ]
    torch.testing.assert_close(found[1], found[0])


# Sizes as numbers, and shapes as attributes


class Numbers(nn.Module):
    def __init__(self, layer, take):
        super().__init__()
        self.conv, self.layer, self.take = nn.Conv2d(3, 8, 3), layer, take

    def forward(self, x):
        h = self.layer(self.conv(x))
        return h * self.take(h)


@torch.no_grad()
@pytest.mark.parametrize(
    "layer", [nn.Conv2d(8, 5, 1), nn.ConvTranspose2d(8, 5, 1), nn.BatchNorm2d(8), nn.GroupNorm(2, 8)]
)
def test_numbers_of_channels(layer):
    torch.manual_seed(0)
    for take in (lambda h: int(h.shape[1]) ** -0.5, lambda h: float(h.size(1)), lambda h: int(h.size()[1])):
        assert whats(same(Numbers(copy.deepcopy(layer), take).eval(), z(3, 5, 4)))[0].startswith("Conv2d")


def test_other_numbers_of_sizes():
    for take in (lambda h: float(h.shape[2]), lambda h: float((h + 1).shape[1]), lambda h: int(h.sum())):
        fast = fastgen.accelerate(Numbers(nn.Conv2d(8, 5, 3), take).eval())
        assert not fast.fastgen_report.fused
        assert "it makes a number of a size, which is not recorded" in reasons(fast)["conv"]


class KeepsShapes(nn.Module):
    """As the decoders of VQGAN and latent diffusion do."""

    def __init__(self):
        super().__init__()
        self.conv, self.inner, self.last_size = nn.Conv2d(4, 4, 3, padding=1), nn.ModuleList([Inner()]), None

    def forward(self, x):
        self.last_size = x.size()
        return self.inner[0](self.conv(x))


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        self.last_z_shape = x.shape
        return self.conv(x)


class ReadsShapes(KeepsShapes):
    def forward(self, x):
        scale = 1 if self.last_size is None else 2
        return super().forward(x) * scale


@torch.no_grad()
@pytest.mark.parametrize("called_before", [False, True])
def test_shapes_kept_as_attributes(called_before):
    torch.manual_seed(0)
    network = KeepsShapes().eval()
    if called_before:
        network(z(4, 2, 2))
    fast = fastgen.accelerate(network)
    assert whats(fast) == ["Conv2d", "Conv2d"]
    copies = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))]
    for module in (fast, *copies, torch.compile(fast, fullgraph=True, backend="aot_eager")):
        for size in (5, 3):
            x = z(4, size, 4)
            torch.testing.assert_close(module(x), network(x), rtol=1e-4, atol=1e-5)
            seen = getattr(module, "_orig_mod", module)
            assert seen.last_size == seen.inner[0].last_z_shape == x.shape
            assert Program.of(seen)._holds()
    fast.inner[0].conv.stride = (2, 2)
    assert not Program.of(fast)._holds()


class ReadsByName(KeepsShapes):
    def forward(self, x):
        scale = 2 if getattr(self, "last_size", None) else 1
        return super().forward(x) * scale


@torch.no_grad()
@pytest.mark.parametrize("kind", [ReadsShapes, ReadsByName])
def test_shapes_that_a_forward_reads(kind):
    """Found by the first call, they decide what the second returns."""
    network = kind().eval()
    fast, x = fastgen.accelerate(network), z(4, 3, 3)
    for _ in range(3):
        torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)
    assert "it changes attributes of its modules" in reasons(fast)["conv"]
