"""What must not be fused, or not be believed of a trace: the result is the original's, and the report says why."""

from __future__ import annotations

import contextlib
import copy
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgen
from fastgen import ops

from .networks import Checking, block, prepared

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # of code that fails where the original does not


def same(network, *inputs, seed=None):
    """Accelerates, compares two calls, and returns the result."""
    fast = fastgen.accelerate(network)
    for _ in range(2):
        for x in inputs:
            if seed is not None:
                torch.manual_seed(seed)
            expected = network(x.clone())
            if seed is not None:
                torch.manual_seed(seed)
            torch.testing.assert_close(fast(x.clone()), expected, rtol=1e-4, atol=1e-5)
    return fast


def reasons(fast):
    return {entry.path: entry.reason for entry in fast.fastgen_report.skipped}


def image(channels=3, size=5):
    return torch.randn(2, channels, size, size)


def whats(fast):
    return [entry.what for entry in fast.fastgen_report.fused]


@torch.no_grad()
def test_norms_in_training_mode():
    network = prepared(nn.Sequential(*block(3, 4), *block(4, 2)))
    network[1].train()
    fast = same(network, image())
    assert reasons(fast) == {"1": "in training mode: it normalises by its batch"}
    assert whats(fast) == ["ConvTranspose2d", "ConvTranspose2d + BatchNorm2d + ReLU"]


@torch.no_grad()
def test_all_in_training_mode():
    fast = same(prepared(block(3, 4)).train(), image())
    assert not fast.fastgen_report.fused
    assert reasons(fast) == {"0": "in training mode"}


@torch.no_grad()
@pytest.mark.parametrize("functional", [False, True])
def test_random_dropout(functional):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.dropout, self.relu = nn.ConvTranspose2d(3, 4, 4, 2, 1), nn.Dropout(0.5), nn.ReLU()

        def forward(self, x):
            x = self.up(x)
            return self.relu(F.dropout(x, 0.5) if functional else self.dropout(x))

    network = Noisy().eval()
    network.dropout.train()
    fast = same(network, image(), seed=3)
    assert whats(fast) == ["ConvTranspose2d"]
    assert not torch.equal(fast(image()), fast(image()))


class Trembling(nn.Module):
    def forward(self, weight):
        return weight + torch.randn_like(weight)


@torch.no_grad()
def test_weights_that_change():
    network = prepared(block(3, 4))
    nn.utils.parametrize.register_parametrization(network[0], "weight", Trembling(), unsafe=True)
    network.eval()
    fast = same(network, image(), seed=3)
    assert reasons(fast) == {"0": "parametrised by something other than weight_norm or spectral_norm"}
    network = prepared(block(3, 4))
    nn.utils.parametrizations.spectral_norm(network[0]).eval()
    network[0].parametrizations.weight[0].train()
    assert reasons(same(network, image())) == {"0": "its spectral norm is in training mode"}
    assert network[0].parametrizations.weight[0].training


@torch.no_grad()
@pytest.mark.parametrize("place", ["0", "1", "2", ""])
def test_hooks(place):
    network = nn.Sequential(nn.Sequential(), prepared(block(3, 4)))
    where = f"1.{place}".rstrip(".")
    network.get_submodule(where).register_forward_hook(lambda module, args, output: output + 1)
    fast = same(network.eval(), image())
    if place:
        assert "has hooks" in reasons(fast).values()


@torch.no_grad()
@pytest.mark.parametrize("place", ["0", "1", "2", ""])
def test_hooks_that_come_later(place):
    network = prepared(block(3, 4))
    fast = same(network, image())
    seen = []
    for module in (network, fast):
        module.get_submodule(place).register_forward_hook(lambda module, args, output: seen.append(output))
    x = image()
    torch.testing.assert_close(fast(x), network(x))
    torch.testing.assert_close(seen[0], seen[1])


@torch.no_grad()
def test_hooks_on_all_modules():
    fast, seen = same(prepared(block(3, 4)), image()), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
    try:
        fast(image())
    finally:
        handle.remove()
    assert seen == [nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU, nn.Sequential]


@torch.no_grad()
def test_changes_that_come_later():
    x = image()
    for change in (
        lambda m: m.__setitem__(1, nn.GroupNorm(2, 4)),
        lambda m: setattr(m[0], "stride", (1, 1)),
        lambda m: setattr(m[1], "eps", 0.5),
        lambda m: m.append(nn.Tanh()),
        lambda m: setattr(m[0], "bias", None),
        lambda m: setattr(m[2], "forward", torch.tanh),
        lambda m: m[0].weight.data.mul_(2),
        lambda m: nn.init.ones_(m[0].weight),
        lambda m: setattr(m, "label", "anything"),
    ):
        network = prepared(block(3, 4, bias=True))
        fast = same(network, x)
        change(network)
        change(fast)
        torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)
    assert fast.forward.__self__._holds()  # a new attribute changes nothing


@torch.no_grad()
def test_attributes_that_forward_decides_by():
    class Fading(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.alpha = block(3, 3), 1.0

        def forward(self, x):
            y = self.up(x)
            return y if self.alpha >= 1 else self.alpha * y + (1 - self.alpha) * F.interpolate(x, scale_factor=2)

    network = prepared(Fading())
    fast, x = same(network, image()), image()
    network.alpha = fast.alpha = 0.3
    torch.testing.assert_close(fast(x), network(x))


@torch.no_grad()
def test_attributes_that_do_not_compare():
    """Two arrays are neither equal nor different."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.scale = block(3, 3), np.array([2.0, 2.0])

        def forward(self, x):
            return self.up(x) * float(self.scale[0])

    network = prepared(Scaled())
    fast, x = same(network, image()), image()
    network.scale, fast.scale = np.array([3.0, 2.0]), np.array([3.0, 2.0])
    torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)


class ConvByMean(nn.ConvTranspose2d):
    def forward(self, input):
        return F.conv_transpose2d(input, self.weight * input.mean(), self.bias, self.stride, self.padding)


class ByMean(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input - input.mean())


LEFT = {
    "computed weights": (lambda: ConvByMean(3, 4, 4, 2, 1), "its weights are computed in forward"),
    "reflection": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "padding_mode is 'reflect'"),
    "three-dimensional": (lambda: nn.Conv3d(2, 4, 1), "not a plain two-dimensional convolution"),
    "lazy": (lambda: nn.LazyConvTranspose2d(4, 3), "not a plain two-dimensional convolution"),
    "half": (lambda: nn.ConvTranspose2d(3, 4, 3).bfloat16(), "its tensors are not of one floating dtype and device"),
    "norm by the batch": (lambda: nn.Conv2d(3, 4, 3), "the norm after it is left alone, and takes it as it is"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", LEFT)
def test_convolutions_left_alone(name):
    make, reason = LEFT[name]
    norm = nn.BatchNorm3d if name == "three-dimensional" else nn.BatchNorm2d
    norm_layer = norm(4, track_running_stats=name != "norm by the batch")
    network = nn.Sequential(make(), norm_layer, nn.ReLU()).eval()
    fast = fastgen.accelerate(network)
    assert not fast.fastgen_report.fused
    assert reason in reasons(fast)["0"]
    x = torch.randn(1, 2, 3, 4, 5) if name == "three-dimensional" else image()
    if name == "lazy":
        fast(x)  # initialises
        network = copy.deepcopy(fast)
    if name != "half":  # BatchNorm takes no mixture either
        torch.testing.assert_close(fast(x), network(x))


NORMS = {
    "statistics of the batch": (lambda: nn.BatchNorm2d(4, track_running_stats=False), "it has no running statistics"),
    "a subclass": (lambda: ByMean(4), None),
}


@torch.no_grad()
@pytest.mark.parametrize("name", NORMS)
def test_norms_left_alone(name):
    make, reason = NORMS[name]
    network = prepared(nn.Sequential(nn.ConvTranspose2d(3, 4, 4, 2, 1), make(), nn.ReLU()))
    fast = same(network, image())
    assert whats(fast) == ["ConvTranspose2d"]
    assert reason is None or reasons(fast)["1"].startswith(reason)


@torch.no_grad()
def test_other_activations():
    fast = same(prepared(block(3, 4, nn.Hardtanh())), image())
    assert whats(fast) == ["ConvTranspose2d + BatchNorm2d"]
    assert reasons(fast) == {"2": "no fused form of this activation"}


@torch.no_grad()
def test_channels_by_themselves():
    """Of transposed convolutions; ordinary ones are fused."""
    network = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.ConvTranspose2d(6, 6, 4, 2, groups=6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2)),
    )
    torch.nn.utils.weight_norm(network[6])  # whose gain [6, 1, 1, 1] is no kernel
    fast = same(network.eval(), image(size=9))
    assert [entry.path for entry in fast.fastgen_report.fused] == ["0", "1", "6"]
    assert reasons(fast) == {"4": "of each channel by itself, where PyTorch is faster"}


@torch.no_grad()
def test_results_that_are_used_elsewhere():
    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.bn = nn.ConvTranspose2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            before = self.up(x)
            normed = self.bn(before)
            return torch.relu(normed) + before.mean(), normed

    fast = same(prepared(Reused()), image())
    assert whats(fast) == ["ConvTranspose2d"]
    assert reasons(fast)["bn"] == "what it takes is used elsewhere too"


# Forwards that a trace must not be believed of.


class Body(nn.Module):
    """Up-sampling by a factor of two, with layers as attributes."""

    def __init__(self):
        super().__init__()
        self.up, self.bn = nn.ConvTranspose2d(3, 3, 4, 2, 1), nn.BatchNorm2d(3)
        self.alone = block(3, 3)
        self.last, self.seen, self.calls = None, [], 0
        self.plain = torch.full((1,), 2.0)
        self.register_buffer("steps", torch.zeros(()))

    def body(self, x):
        return F.relu(self.bn(self.up(x)))


class SwitchesGradients(Body):
    def forward(self, x):
        with torch.no_grad():
            x = self.body(x)
        return self.alone(x)


class SwitchesAutocast(Body):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = self.body(x)
        return self.alone(x.float())


class KeepsResults(Body):
    def forward(self, x):
        self.last = self.body(x)
        return self.alone(self.last)


class CollectsResults(Body):
    def forward(self, x):
        self.seen.append(x)
        return self.alone(self.body(x))


class Counts(Body):
    def forward(self, x):
        self.calls += 1
        return self.alone(self.body(x)) * self.calls


class CountsInABuffer(Body):
    def forward(self, x):
        self.steps += 1
        return self.alone(self.body(x)) * self.steps


class DrawsInPython(Body):
    def forward(self, x):
        return self.alone(self.body(x)) if random.random() < 2 else x


class AsksForTheType(Body):
    def forward(self, x):
        x = self.body(x).roll(1, -1)  # not known to be a tensor's
        return self.alone(x) if isinstance(x, torch.Tensor) else x


class PlainTensor(Body):
    def forward(self, x):
        return self.alone(self.body(x)) * (self.plain + 1)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class CustomFunction(Body):
    def forward(self, x):
        return self.alone(Straight.apply(self.body(x)))


class AsksForGradients(Body):
    def forward(self, x):
        x = self.alone(self.body(x))
        return x if torch.is_grad_enabled() else 2 * x


class AsksForAutocast(Body):
    def forward(self, x):
        return self.alone(self.body(x)) * (2 if torch.is_autocast_enabled("cpu") else 1)


class AsksForInferenceMode(Body):
    def forward(self, x):
        x = self.alone(self.body(x))
        return x.clone() if torch.is_inference_mode_enabled() else x


class AnyArguments(Body):
    def forward(self, *args):
        return self.alone(self.body(*args))


UNBELIEVED = {
    SwitchesGradients: "it switches gradients or autocast on or off",
    SwitchesAutocast: "it switches gradients or autocast on or off",
    KeepsResults: "it changes attributes of its modules",
    CollectsResults: "it changes attributes of its modules",
    Counts: "it changes attributes of its modules",
    CountsInABuffer: "it changes its parameters or buffers",
    DrawsInPython: "it draws random numbers outside PyTorch's functions",
    AsksForTheType: "it asks for the type of a computed value",
    PlainTensor: "it computes with tensors that are neither inputs, parameters nor buffers",
    CustomFunction: "it calls an autograd.Function, which has a gradient of its own",
    AsksForGradients: "it asks whether gradients, inference mode or autocast are on",
    AsksForAutocast: "it asks whether gradients, inference mode or autocast are on",
    AsksForInferenceMode: "it asks whether gradients, inference mode or autocast are on",
    AnyArguments: "its forward names no arguments",
}


@pytest.mark.parametrize("kind", UNBELIEVED)
def test_forwards_that_are_not_replaced(kind):
    torch.manual_seed(0)
    network = prepared(kind())
    before, state = random.getstate(), torch.get_rng_state()
    fast = fastgen.accelerate(network)
    assert random.getstate() == before and torch.equal(torch.get_rng_state(), state)
    assert whats(fast) == ["ConvTranspose2d + BatchNorm2d + ReLU", "conv_transpose2d"]  # of what is called inside
    assert fast.seen == [] and fast.last is None and fast.calls == 0
    gradients = []
    for module in (network, fast):
        x = torch.linspace(-2, 2, 2 * 3 * 4 * 4).view(2, 3, 4, 4).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        gradients.append((y.detach(), x.grad if x.grad is not None else torch.zeros(())))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)
    assert len(fast.seen) == len(network.seen) and fast.calls == network.calls


@torch.no_grad()
@pytest.mark.parametrize("kind", UNBELIEVED)
def test_the_report_says_why(kind):
    class Inside(kind):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)  # cannot be accelerated by itself

    assert UNBELIEVED[kind] in reasons(fastgen.accelerate(prepared(Inside())))["conv"]


@pytest.mark.parametrize("kind", UNBELIEVED)
def test_without_gradients(kind):
    network, x = prepared(kind()), image()
    fast = fastgen.accelerate(network)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)


def test_parts_that_ask_for_modes():
    """They are one node; and one that asks without need is traced."""

    class Part(nn.Module):
        def __init__(self, always):
            super().__init__()
            self.up, self.checkpointing, self.always = nn.ConvTranspose2d(3, 3, 4, 2, 1), False, always

        def forward(self, x):
            if torch.is_grad_enabled() and (self.always or self.checkpointing):
                return self.up(x) + 1
            return torch.relu(self.up(x))

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts, self.last = nn.ModuleList([Part(False), Part(True)]), nn.ConvTranspose2d(3, 2, 3)

        def forward(self, x):
            for part in self.parts:
                x = part(x)
            return torch.tanh(self.last(x))

    network, x = prepared(Whole()), image()
    fast = fastgen.accelerate(network)
    assert whats(fast) == ["ConvTranspose2d + relu", "ConvTranspose2d + tanh", "conv_transpose2d"]
    torch.testing.assert_close(fast(x), network(x))
    with torch.no_grad():
        torch.testing.assert_close(fast(x), network(x))


@torch.no_grad()
def test_what_is_faithfully_recorded():
    network = prepared(Checking())
    fast = fastgen.accelerate(network)
    assert "forward" in fast.__dict__
    for args in [(image(),), (image(), image())]:
        torch.testing.assert_close(fast(*args), network(*args))
    for wrong in (image(4), torch.randn(3, 5, 5)):
        with pytest.raises((ValueError, AssertionError)) as expected:
            network(wrong)
        with pytest.raises(type(expected.value)) as found:
            fast(wrong)
        assert str(found.value).split("\n")[0] == str(expected.value).split("\n")[0]


class Maybe(nn.Module):
    """Cannot be traced, and does not always return a tensor."""

    def forward(self, x):
        return None if bool(x.mean() > 0) else x


@torch.no_grad()
def test_parts_that_do_not_return_a_tensor():
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.maybe, self.up = Maybe(), nn.ConvTranspose2d(3, 4, 4, 2, 1)

        def forward(self, x):
            found = self.maybe(x)
            return torch.relu(self.up(x if found is None else 2 * found))

    network, x = prepared(Asking()), image().abs()
    fast = fastgen.accelerate(network)
    torch.testing.assert_close(fast(-x), network(-x))
    with pytest.warns(RuntimeWarning, match="accelerated Asking failed where the original did not"):
        torch.testing.assert_close(fast(x), network(x))


@torch.no_grad()
def test_images_without_a_batch():
    network = nn.Sequential(nn.ConvTranspose2d(3, 4, 4), nn.InstanceNorm2d(4, track_running_stats=True), nn.ReLU())
    fast, x = fastgen.accelerate(prepared(network)), torch.randn(3, 5, 5)
    with pytest.warns(RuntimeWarning):
        torch.testing.assert_close(fast(x), network(x))


@torch.no_grad()
def test_autocast_channels_last_empty_and_half():
    network, x = prepared(nn.Sequential(*block(3, 4), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3))), image()
    fast = same(network, x, x[:0], x.contiguous(memory_format=torch.channels_last), x[:, :, ::2, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(x), network(x), rtol=0.1, atol=0.1)
    torch.testing.assert_close(fast.bfloat16()(x.bfloat16()), network.bfloat16()(x.bfloat16()), rtol=0.1, atol=0.1)


@torch.no_grad()
def test_other_weights_for_one_call():
    network, x = prepared(block(3, 4)), image()
    fast = same(network, x)
    other = {name: value + 0.5 for name, value in network.state_dict().items()}
    expected = torch.func.functional_call(network, other, (x,))
    torch.testing.assert_close(torch.func.functional_call(fast, other, (x,)), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_traced_by_others():
    network, x = prepared(nn.Sequential(block(3, 4), nn.Conv2d(4, 3, 3), nn.Tanh())), image()
    fast = fastgen.accelerate(network)
    for traced in (
        torch.jit.trace(fast, (x,)),
        torch.fx.symbolic_trace(fast),
        torch.export.export(fast, (x,)).module(),
    ):
        with contextlib.suppress(NotImplementedError):
            torch.testing.assert_close(traced(x), network(x), rtol=1e-4, atol=1e-5)


class Traced(nn.Module):
    """Blocks of which PyTorch itself does not warn, as it does of group norms."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 3))
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), *block(6, 4))
        self.own = fastgen.nn.ConvBNAct(4, 3, 3)

    def forward(self, x):
        return self.own(self.up(self.down(x)))


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.parametrize("gradients", [False, True], ids=["without gradients", "with gradients"])
def test_traced_by_jit_for_other_sizes(gradients):
    network = prepared(Traced())
    fast = fastgen.accelerate(network)
    assert not fast.fastgen_report.skipped
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(fast, image())
        for x in (image(), torch.randn(3, 3, 9, 12)):
            torch.testing.assert_close(traced(x), network(x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-4)


OPERATIONS = {
    "conv2d": lambda x, w: ops.conv2d_bn_act(x, w, padding="same", activation="relu"),
    "conv_transpose2d": lambda x, w: ops.conv_transpose2d_bn_act(x, w, stride=2, activation="elu", alpha=0.5),
    "group norm": lambda x, w: ops.group_norm_act(x, 2, activation="silu"),
}


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("gradients", [False, True], ids=["without gradients", "with gradients"])
def test_operations_traced_by_jit(operation, gradients):
    weight = torch.randn(4, 4, 3, 3, requires_grad=gradients)
    traced = torch.jit.trace(OPERATIONS[operation], (torch.randn(1, 4, 6, 5), weight))
    x = torch.randn(3, 4, 8, 9)
    torch.testing.assert_close(traced(x, weight), OPERATIONS[operation](x, weight), rtol=1e-4, atol=1e-4)


def test_second_derivatives_of_ordinary_convolutions():
    network = prepared(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3)))
    norms = []
    for module in (network, fastgen.accelerate(network)):
        x = torch.linspace(-1, 1, 75).view(1, 3, 5, 5).requires_grad_()
        (gradient,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        gradient.square().sum().backward()
        norms.append([gradient, module[0].weight.grad])
    torch.testing.assert_close(norms[1], norms[0])


def test_modules_that_cannot_be_copied():
    network = block(3, 4)
    network.stream = open(__file__)  # noqa: SIM115
    with network.stream, pytest.raises(TypeError, match="module cannot be copied: cannot pickle"):
        fastgen.accelerate(network)


# Without gradients or autocast as a whole


class Frozen(Body):
    @torch.no_grad()
    def forward(self, x):
        return self.alone(self.body(x))


class FrozenWithin(Body):
    def forward(self, x):
        assert x.shape[1] == 3
        n = x.shape[0]
        with torch.no_grad():
            x = self.alone(self.body(x)).view(n, -1)
        return x


class InFloat32(Body):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.alone(self.body(x.float()))


class FrozenInFloat32(Body):
    @torch.autocast("cpu", enabled=False)
    @torch.no_grad()
    def forward(self, x):
        return self.alone(self.body(x.float()))


AMBIENTS = {
    "gradients": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("kind", [Frozen, FrozenWithin, InFloat32, FrozenInFloat32])
@pytest.mark.parametrize("ambient", AMBIENTS)
def test_forwards_that_switch_off_all_that_they_compute_with(kind, ambient):
    torch.manual_seed(0)
    network = prepared(kind())
    fast = fastgen.accelerate(network)
    assert whats(fast) == ["ConvTranspose2d + BatchNorm2d + relu", "ConvTranspose2d + BatchNorm2d + ReLU"]
    with AMBIENTS[ambient]():
        for module in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            x = image().requires_grad_()
            y, expected = module(x), network(x)
            assert (y.dtype, y.requires_grad) == (expected.dtype, expected.requires_grad)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
            modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
            assert modes == (ambient in ("gradients", "autocast"), ambient == "autocast")
    if kind is Frozen:
        compiled = torch.compile(fast, backend="eager")
        torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-4)


class StraightAlone(Body):
    def forward(self, x):
        return Halved.apply(self, x)


class Halved(torch.autograd.Function):
    """Has a gradient of its own, where `no_grad` in its forward changes nothing."""

    @staticmethod
    def forward(ctx, module, x):
        with torch.no_grad():
            return module.alone(module.body(x))

    @staticmethod
    def backward(ctx, grad):
        return None, grad[:, :, ::4, ::4] / 2


class LeavesGradientsOff(Body):
    def forward(self, x):
        torch.set_grad_enabled(False)
        return self.alone(self.body(x))


@pytest.mark.parametrize("kind", [StraightAlone, LeavesGradientsOff])
def test_forwards_that_switch_off_more(kind):
    network = prepared(kind())
    fast, results = fastgen.accelerate(network), []
    for module in (network, fast):
        x = image().fill_(1.0).requires_grad_()
        with torch.enable_grad():
            y = module(x)
            results.append((y.detach(), y.requires_grad, torch.is_grad_enabled()))
        if y.requires_grad:
            y.sum().backward()
            results[-1] += (x.grad,)
    assert results[1][1:3] == results[0][1:3]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
