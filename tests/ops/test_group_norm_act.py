"""The fused group norm: plain PyTorch in float64, loops, layouts, threads, means far from zero, NaN."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

import fastgen
from fastgen import ops
from tests.instruction_sets import FUSED, ISAS, chosen
from tests.ops.test_conv2d_bn_act import assert_as_accurate, doubles
from tests.ops.test_conv_transpose2d_bn_act import ACTIVATIONS, all_activations

module = importlib.import_module("fastgen.ops.group_norm_act")  # the package has the function of this name

# N, C, H, W, and groups. Chunks have 16384 elements or more: "chunks" and those below have several, and a rest.
CASES = {
    "one of all": ((1, 1, 1, 1), 1),
    "one position": ((3, 6, 1, 1), 2),
    "one position, many channels": ((2, 320, 1, 1), 32),
    "one group": ((2, 10, 5, 7), 1),
    "instance": ((3, 6, 5, 7), 6),
    "one channel": ((2, 1, 9, 31), 1),
    "one line": ((2, 8, 1, 37), 4),
    "one column": ((2, 8, 37, 1), 4),
    "odd": ((2, 35, 11, 3), 7),
    "320 channels": ((2, 320, 4, 4), 32),
    "wide groups": ((1, 129, 6, 6), 3),
    "chunks": ((2, 64, 37, 31), 8),
    "chunks, odd": ((2, 6, 97, 101), 3),
    "chunks, instance": ((1, 24, 61, 53), 24),
    "chunks of few rows": ((1, 1030, 9, 9), 10),
}
SEVERAL = ["odd", "chunks", "chunks, odd", "chunks, instance"]

LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: torch.stack((t, -t), dim=-1).flatten(3)[..., ::2],
    "offset": lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),
    "cropped": lambda t: torch.nn.functional.pad(t, (1, 2, 3, 1))[:, :, 3:-1, 1:-2],
    "cropped channels_last": lambda t: LAYOUTS["channels_last"](t.repeat(1, 2, 2, 2))[:, : t.shape[1], : t.shape[2]],
    "expanded": lambda t: t[:1, :, :, :1].expand_as(t),
}

all_cases = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    """No calls that were served before; all threads that there are, however small the input."""
    monkeypatch.setattr(module, "_served", {})
    monkeypatch.setattr(module, "_worthwhile_threads", lambda elements, threads: threads)


def make(name, dtype=torch.float32, affine=True, mean=0.5, std=2.0):
    """input, weight, bias and groups."""
    shape, groups = CASES[name]
    x = (torch.randn(shape, dtype=torch.double) * std + mean).to(dtype)
    return [x, *(torch.randn(2, shape[1]).to(dtype) if affine else (None, None))], groups


def plain(tensors, groups, activation="none", eps=1e-3):
    """The definition, in the dtype of the tensors."""
    x, weight, bias = tensors
    return ACTIVATIONS[activation](torch.group_norm(x, groups, weight, bias, eps))


def fused(tensors, groups, activation="none", eps=1e-3):
    x, weight, bias = tensors
    return ops.group_norm_act(x, groups, weight, bias, eps=eps, activation=activation, negative_slope=-0.3, alpha=1.7)


@all_cases
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_float32_is_as_accurate_as_pytorch(name, affine):
    tensors, groups = make(name, affine=affine)
    output = fused(tensors, groups, "relu")
    assert_as_accurate(output, plain(tensors, groups, "relu"), plain(doubles(tensors), groups, "relu"))
    assert output.is_contiguous(memory_format=torch.channels_last)


@all_activations
@pytest.mark.parametrize("name", SEVERAL)
def test_activations_are_as_accurate_as_pytorch(name, activation):
    tensors, groups = make(name)
    truth = plain(doubles(tensors), groups, activation)
    assert_as_accurate(fused(tensors, groups, activation), plain(tensors, groups, activation), truth)


@all_cases
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)], ids=["f64", "f32"])
def test_every_instruction_set(name, isa, dtype, tolerance):
    tensors, groups = make(name, dtype)
    with chosen(isa):
        actual = fused(tensors, groups, "silu")
    torch.testing.assert_close(actual.double(), plain(doubles(tensors), groups, "silu"), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SEVERAL)
def test_bits_are_the_same_on_every_fused_instruction_set(name):
    results = []
    tensors, groups = make(name)
    for isa in FUSED:
        with chosen(isa):
            results.append(fused(tensors, groups, "gelu"))
    assert all(torch.equal(result, results[0]) for result in results)


@all_cases
def test_bfloat16_is_as_accurate_as_pytorch(name):
    tensors, groups = make(name, torch.bfloat16)
    ours, theirs = (f(tensors, groups, "silu") for f in (fused, plain))
    assert ours.dtype == torch.bfloat16
    assert_as_accurate(ours.double(), theirs.double(), plain(doubles(tensors), groups, "silu"))


@pytest.mark.parametrize("name", ["instance", "odd"])
def test_against_loops(name):
    (x, weight, bias), groups = make(name, torch.float64)
    size = x.shape[1] // groups
    expected = torch.empty_like(x)
    for n in range(len(x)):
        for g in range(groups):
            values = x[n, g * size : (g + 1) * size].flatten().tolist()
            mean = math.fsum(values) / len(values)
            var = math.fsum((value - mean) ** 2 for value in values) / len(values)
            for c in range(g * size, (g + 1) * size):
                expected[n, c] = (x[n, c] - mean) / math.sqrt(var + 1e-3) * weight[c] + bias[c]
    torch.testing.assert_close(fused([x, weight, bias], groups), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_means_far_from_zero(name, dtype):
    """The first rows, which everything is first seen from, may be far from the others."""
    tensors, groups = make(name, dtype, mean=1000.0, std=1.0)
    for start in (1000.0, 0.0):
        tensors[0][:, :, 0, :2] *= start / 1000.0
        truth = plain(doubles(tensors), groups)
        assert_as_accurate(fused(tensors, groups).double(), plain(tensors, groups).double(), truth)


def test_every_channel_has_another_mean():
    tensors, groups = make("chunks", mean=0.0, std=1.0)
    tensors[0] += torch.linspace(-1e4, 1e4, 64).view(-1, 1, 1)
    truth = plain(doubles(tensors), groups)
    assert_as_accurate(fused(tensors, groups), plain(tensors, groups), truth)


@pytest.mark.parametrize("value", [0.0, 3.7, 1e30, -1e-30])
def test_constant_inputs(value):
    """No variance, whatever the last bits of a mean."""
    (x, weight, bias), groups = make("chunks")
    actual = fused([torch.full_like(x, value), weight, bias], groups)
    torch.testing.assert_close(actual, bias.view(-1, 1, 1).expand_as(actual), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads_or_batch(name, dtype):
    tensors, groups = make(name, dtype)
    x, *rest = tensors
    expected = fused(tensors, groups, "tanh")
    for n in range(len(x)):
        assert torch.equal(fused([x[n : n + 1], *rest], groups, "tanh")[0], expected[n])
    several = [torch.cat([x] * 3), *rest]
    for threads in (2, 7):
        torch.set_num_threads(threads)
        assert torch.equal(fused(tensors, groups, "tanh"), expected), threads
        assert torch.equal(fused(several, groups, "tanh"), torch.cat([expected] * 3)), threads


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(name, layout, dtype):
    (x, *rest), groups = make(name, dtype)
    arranged = LAYOUTS[layout](x)
    expected = fused([arranged.contiguous(), *rest], groups, "elu")
    actual = fused([arranged, *rest], groups, "elu")
    assert torch.equal(actual, expected)
    assert actual.is_contiguous(memory_format=torch.channels_last)


def test_weights_of_any_strides():
    (x, weight, bias), groups = make("odd", torch.float64)
    apart = [torch.stack((t, -t), 1)[:, 0] for t in (weight, bias)]
    torch.testing.assert_close(fused([x, *apart], groups), plain([x, weight, bias], groups))
    torch.testing.assert_close(fused([x, weight, None], groups), plain([x, weight, None], groups))
    torch.testing.assert_close(fused([x, None, bias], groups), plain([x, None, bias], groups))


@all_activations
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_a_number(activation, value):
    """It spreads over its group, and no further."""
    tensors, groups = make("chunks")
    tensors[0][1, 9, 20, 5] = value
    actual = fused(tensors, groups, activation)
    assert torch.equal(actual.isnan(), plain(tensors, groups, activation).isnan())
    assert actual[1, 8:16].isnan().all()
    assert actual.isnan().sum() == actual[1, 8:16].numel()


def test_more_memory_than_the_allocator_keeps():
    x = torch.randn(1, 2, 2000, 2100)
    actual = fused([x, None, None], 1, "relu")
    torch.testing.assert_close(actual, plain([x, None, None], 1, "relu"))


def test_empty_batch():
    for backend in ("reference", "cpu"):
        with fastgen.backend(backend):
            assert ops.group_norm_act(torch.ones(0, 6, 3, 4), 2, activation="silu").shape == (0, 6, 3, 4)


def test_groups_of_one_element():
    x, bias = torch.randn(1, 5, 1, 1), torch.randn(5)
    assert torch.equal(ops.group_norm_act(x, 5, None, bias).flatten(), bias)
    plain = ops.group_norm_act(x.requires_grad_(), 5, None, bias)
    torch.testing.assert_close(plain.flatten(), bias, rtol=0, atol=1e-3)


def test_calls_like_earlier_ones_are_not_checked_again(monkeypatch):
    tensors, groups = make("chunks")
    expected = fused(tensors, groups, "relu")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_check", None)
        assert torch.equal(fused(tensors, groups, "relu"), expected)
        tensors[1].mul_(2)
        changed = fused(tensors, groups, "relu")
    torch.testing.assert_close(changed, plain(tensors, groups, "relu"), rtol=1e-4, atol=1e-4)
    assert torch.equal(fused(tensors, 2 * groups, "relu"), fused([t.clone() for t in tensors], 2 * groups, "relu"))
    with pytest.raises(TypeError, match="must have the dtype"):
        fused([tensors[0].double(), *tensors[1:]], groups, "relu")


def test_other_dtypes_are_left_to_pytorch():
    tensors, groups = make("odd", torch.half)
    torch.testing.assert_close(fused(tensors, groups, "silu"), plain(tensors, groups, "silu"))
    with fastgen.backend("cpu"), pytest.raises(RuntimeError, match="it takes float32, float64 and bfloat16"):
        fused(tensors, groups)


# Gradients, transforms, registration


def test_gradients_of_any_order():
    tensors, groups = make("odd", torch.float64)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    x = tensors[0]
    first, expected = (
        torch.autograd.grad(f(tensors, groups, "silu").square().sum(), x, create_graph=True)[0] for f in (fused, plain)
    )
    torch.testing.assert_close(first, expected)
    second, expected = (torch.autograd.grad(g.square().sum(), tensors[1])[0] for g in (first, expected))
    torch.testing.assert_close(second, expected)
    with torch.no_grad():
        torch.testing.assert_close(fused(tensors, groups, "silu"), plain(tensors, groups, "silu"))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend):
    for activation, affine in [("none", False), ("leaky_relu", True)]:
        tensors, groups = make("odd", affine=affine)
        with fastgen.backend(backend):
            opcheck(torch.ops.fastgen.group_norm_act.default, (*tensors, groups, 1e-5, activation, 0.2))


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(dynamic):
    (x, *rest), groups = make("odd")

    def function(x, *rest):
        return fused([x * 2.0, *rest], groups, "elu").sigmoid()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        x = torch.randn(batch, *x.shape[1:])
        torch.testing.assert_close(compiled(x, *rest), function(x, *rest))


def test_modes_see_the_operator():
    tensors, groups = make("odd")
    with FakeTensorMode() as mode:
        output = fused([mode.from_tensor(tensor) for tensor in tensors], groups)
        assert output.shape == tensors[0].shape
        assert output.is_contiguous(memory_format=torch.channels_last)


def test_autocast():
    tensors, groups = make("odd")
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(tensors, groups).dtype == plain(tensors, groups).dtype


image, ones = torch.ones(2, 6, 3, 4), torch.ones(6)
ERRORS = {
    "input a list": (([1.0], 2), {}, TypeError, "input must be a tensor, got list"),
    "weight a list": ((image, 2, [1.0]), {}, TypeError, "weight must be a tensor, got list"),
    "3-d": ((torch.ones(6, 3, 4), 2), {}, ValueError, r"input must be \[N, C, H, W\].*got \[6, 3, 4\]"),
    "empty": ((torch.ones(2, 6, 0, 4), 2), {}, ValueError, r"without empty dimensions but N, got \[2, 6, 0, 4\]"),
    "groups": ((image, 4), {}, ValueError, "num_groups must divide the 6 channels, got 4"),
    "no groups": ((image, 0), {}, ValueError, "num_groups must divide the 6 channels, got 0"),
    "weight": ((image, 2, torch.ones(5)), {}, ValueError, r"weight must be \[6\], got \[5\]"),
    "bias": ((image, 2, ones, torch.ones(6, 1)), {}, ValueError, r"bias must be \[6\], got \[6, 1\]"),
    "dtype": ((image, 2, ones.double()), {}, TypeError, "weight must have the dtype of the input, torch.float32"),
    "integers": ((image.int(), 2), {}, TypeError, "input must be of a floating dtype, got torch.int32"),
    "device": ((image, 2, ones.to("meta")), {}, ValueError, "weight must be on the device of the input, cpu, got meta"),
    "activation": ((image, 2), {"activation": "mish"}, ValueError, "activation must be one of none.*; got 'mish'"),
}


@pytest.mark.parametrize(("args", "options", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(args, options, error, message):
    with pytest.raises(error, match=message):
        ops.group_norm_act(*args, **options)
