from __future__ import annotations

import contextlib
import copy
import itertools
import pickle

import pytest
import torch

import fastgen
from fastgen import nn, ops

ACTIVATIONS = {
    "none": None,
    "relu": torch.nn.ReLU(),
    "leaky_relu": torch.nn.LeakyReLU(0.2),
    "elu": torch.nn.ELU(0.5),
    "tanh": torch.nn.Tanh(),
    "sigmoid": torch.nn.Sigmoid(),
    "silu": torch.nn.SiLU(),
    "gelu": torch.nn.GELU(),
}


KINDS = {"transposed": (nn.ConvTransposeBNAct, torch.nn.ConvTranspose2d), "ordinary": (nn.ConvBNAct, torch.nn.Conv2d)}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True, params=[False, True], ids=["as chosen", "natively"])
def backend(request):
    """So small a layer is left to PyTorch, where it is an ordinary convolution."""
    with fastgen.backend("cpu") if request.param else contextlib.nullcontext():
        yield


def pair(activation="relu", batch_norm=True, kind="transposed", **options):
    """The layer and the Sequential that it replaces, with the same parameters."""
    fused, conv = KINDS[kind]
    options = {"stride": 2, "padding": 1, "bias": False, **options}
    norm_options = {
        name: options.pop(name) for name in ("momentum", "affine", "track_running_stats") if name in options
    }
    more = {"negative_slope": 0.2, "alpha": 0.5, **norm_options}
    layer = fused(5, 7, 4, **options, batch_norm=batch_norm, activation=activation, **more)
    members = [conv(5, 7, 4, **options)]
    if batch_norm:
        members.append(torch.nn.BatchNorm2d(7, **norm_options))
    if activation != "none":
        members.append(copy.deepcopy(ACTIVATIONS[activation]))
    plain = torch.nn.Sequential(*members)
    plain.load_state_dict(layer.state_dict())
    return layer.double(), plain.double()


def train_and_compare(layer, plain, steps=3):
    optimisers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (layer, plain)]
    for _ in range(steps):
        x = torch.randn(3, 5, 4, 6, dtype=torch.float64)
        for model, optimiser in zip((layer, plain), optimisers, strict=True):
            optimiser.zero_grad()
            model(x).sin().sum().backward()
            optimiser.step()
    for (name, ours), theirs in zip(layer.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), plain.eval()(x))


@kinds
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batch_norm", [True, False], ids=["norm", "no norm"])
def test_trains_as_the_sequential(activation, batch_norm, kind):
    train_and_compare(*pair(activation, batch_norm, kind))


@kinds
def test_approximate_gelu_is_not_the_exact_one(kind):
    layer, plain = pair("gelu", kind=kind)
    for model in (layer, plain):
        model[2].approximate = "tanh"
    x = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)


@kinds
@pytest.mark.parametrize("momentum", [None, 0.3])
def test_momentum(momentum, kind):
    train_and_compare(*pair(momentum=momentum, kind=kind))


@kinds
@pytest.mark.parametrize(("affine", "track"), [*itertools.product((True, False), repeat=2)])
def test_norm_options(affine, track, kind):
    train_and_compare(*pair(affine=affine, track_running_stats=track, kind=kind))


@kinds
@pytest.mark.parametrize("batch_norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_state_dicts_load_both_ways(batch_norm, bias, kind):
    layer, plain = pair(batch_norm=batch_norm, bias=bias, kind=kind)
    for tensor in plain.state_dict().values():
        tensor.add_(1)
    layer.load_state_dict(plain.state_dict())
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert all(map(torch.equal, layer.state_dict().values(), plain.state_dict().values()))


@kinds
def test_starts_like_the_sequential(kind):
    fused, conv = KINDS[kind]
    torch.manual_seed(3)
    layer = fused(3, 6, 3)
    torch.manual_seed(3)
    assert torch.equal(layer[0].weight, conv(3, 6, 3).weight)


@kinds
def test_loaded_weights_are_used(kind):
    (layer, _), (_, other) = pair(kind=kind), pair(kind=kind)
    x = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    layer.eval()(x)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), other.eval()(x))
    layer.float()
    torch.testing.assert_close(layer(x.float()), other(x).float(), rtol=1e-4, atol=1e-5)


@kinds
def test_one_member_in_training_mode(kind):
    layer, plain = pair(kind=kind)
    x = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    for model in (layer, plain):
        model.eval()[1].train()
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer[1].running_var, plain[1].running_var)


def test_output_size():
    layer, plain = pair()
    x = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    expected = plain[2](plain[1](plain[0](x, (9, 8))))
    torch.testing.assert_close(layer(x, output_size=(9, 8)), expected)
    with pytest.raises(ValueError, match="output size"):
        layer(x, output_size=(12, 8))


@kinds
def test_foreign_members_and_hooks_are_respected(kind):
    layer, plain = pair(batch_norm=False, kind=kind)
    x = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    expected = plain(x)
    layer[0].register_forward_hook(lambda module, args, output: output * 2)
    torch.testing.assert_close(layer(x), expected * 2)
    calls = []
    watched, plain = pair(kind=kind)
    for module in (watched, plain):
        module[0].register_full_backward_hook(lambda *_: calls.append("backward"))
        module[1].register_full_backward_pre_hook(lambda *_: calls.append("before"))
        module(x).sum().backward()
    assert calls == ["before", "backward"] * 2
    changed, _ = pair(kind=kind)
    changed[1] = torch.nn.InstanceNorm2d(7)
    torch.testing.assert_close(changed(x), torch.nn.Sequential(*changed)(x))


@kinds
def test_parametrised_weights_are_computed_each_time(kind):
    layer, _ = pair(batch_norm=False, kind=kind)
    torch.nn.utils.parametrizations.weight_norm(layer[0])
    x = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(layer(x), torch.nn.Sequential(*layer)(x))
        with torch.no_grad():
            layer[0].parametrizations.weight.original0.mul_(2)


@kinds
def test_copies_pickles_and_slices(kind):
    layer, plain = pair(kind=kind)
    x = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    expected = plain.eval()(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other.eval()(x), expected)
    torch.testing.assert_close(layer.eval()[:2](x), plain[:2](x))


def test_is_the_operation():
    layer = nn.ConvTransposeBNAct(5, 7, 3, (2, 1), activation="tanh", eps=0.8).eval()
    x = torch.randn(2, 5, 4, 4)
    norm = layer[1]
    tensors = (layer[0].weight, layer[0].bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    expected = ops.conv_transpose2d_bn_act(x, *tensors, stride=(2, 1), activation="tanh", eps=0.8)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


def test_is_the_ordinary_operation():
    layer = nn.ConvBNAct(5, 7, 3, (2, 1), "valid", activation="tanh", eps=0.8).eval()
    x, norm = torch.randn(2, 5, 6, 4), layer[1]
    tensors = (layer[0].weight, layer[0].bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    expected = ops.conv2d_bn_act(x, *tensors, stride=(2, 1), activation="tanh", eps=0.8)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


def test_paddings_and_images_without_a_batch():
    layer = nn.ConvBNAct(5, 7, 3, padding="same", dilation=2, batch_norm=False)
    x = torch.randn(2, 5, 6, 4)
    torch.testing.assert_close(layer(x), torch.nn.Sequential(*layer)(x))
    transposed = nn.ConvTransposeBNAct(5, 7, 3, batch_norm=False)
    for other in (layer, transposed):
        torch.testing.assert_close(other(x[0]), torch.nn.Sequential(*other)(x[0]))
    layer[0] = torch.nn.Conv2d(5, 7, 3, padding=1, padding_mode="reflect")
    torch.testing.assert_close(layer(x), torch.nn.Sequential(*layer)(x))


def test_bfloat16_modules():
    layer = nn.ConvTransposeBNAct(6, 7, 4, 2, 1).eval()
    x = torch.randn(2, 6, 5, 4)
    half = copy.deepcopy(layer).bfloat16()
    with torch.no_grad(), fastgen.backend("cpu"):
        output = half(x.bfloat16())
        torch.testing.assert_close(output, layer(x).bfloat16(), rtol=0.03, atol=0.03)
    with fastgen.backend("auto"):
        half.train()(x.bfloat16()).sum().backward()
    assert half[0].weight.grad.dtype == torch.bfloat16


@kinds
def test_compiles(kind):
    layer, _ = pair(kind=kind)
    x = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    compiled = torch.compile(layer.eval(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


@kinds
def test_members_of_other_dtypes(kind):
    """As a BatchNorm that is left in float32."""
    fused, _ = KINDS[kind]
    layer, x = fused(6, 8, 3).bfloat16(), torch.randn(2, 6, 5, 5).bfloat16()
    layer[1].float()
    assert torch.equal(layer(x), torch.nn.Sequential(*copy.deepcopy(layer))(x))


def test_errors():
    with pytest.raises(ValueError, match=r"activation must be one of none, relu.*got 'mish'"):
        nn.ConvTransposeBNAct(3, 6, 3, activation="mish")
    with pytest.raises(ValueError, match="more than one value per channel"):
        nn.ConvTransposeBNAct(3, 6, 1)(torch.ones(1, 3, 1, 1))
    with pytest.raises(ValueError, match=r"activation must be one of none, relu.*got 'mish'"):
        nn.ConvBNAct(3, 6, 3, activation="mish")
    with pytest.raises(ValueError, match="more than one value per channel"):
        nn.ConvBNAct(3, 6, 1)(torch.ones(1, 3, 1, 1))
