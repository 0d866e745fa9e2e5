"""Shifted convolution: loops over the definition, the padded convolution in float64, gradients, what is not seen."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import fastgen
from fastgen import nn, ops
from fastgen.ops import causal_conv
from tests.instruction_sets import FUSED, ISAS, chosen


class Case(NamedTuple):
    shape: tuple[int, int, int, int]  # N, Cin, H, W
    out: int
    kernel: tuple[int, int]
    left: int

    def tensors(self, dtype=torch.float32):
        n, channels, height, width = self.shape
        x = torch.randn(self.shape, dtype=dtype)
        weight = torch.randn(self.out, channels, *self.kernel, dtype=dtype)
        return x, weight, torch.randn(self.out, dtype=dtype), torch.randn(n, self.out, height, width, dtype=dtype)


CASES = {
    "one of all": Case((1, 1, 1, 1), 1, (1, 1), 0),
    "1x1": Case((2, 17, 5, 3), 33, (1, 1), 0),
    "down": Case((2, 5, 7, 11), 19, (2, 3), 1),
    "down right": Case((3, 16, 8, 8), 32, (2, 2), 1),
    "down left": Case((2, 5, 4, 5), 6, (2, 2), 0),
    "gated": Case((2, 6, 7, 9), 20, (3, 5), 2),
    "first of the gated": Case((2, 3, 9, 10), 18, (4, 7), 3),
    "row": Case((2, 7, 3, 9), 10, (1, 4), 3),
    "column": Case((2, 7, 9, 3), 10, (4, 1), 0),
    "kernel larger than image": Case((2, 4, 2, 3), 5, (5, 9), 7),
    "one column": Case((3, 4, 17, 1), 6, (2, 3), 1),
    "wide": Case((1, 3, 2, 300), 5, (2, 3), 2),
    "several chunks": Case((5, 8, 24, 23), 9, (2, 3), 0),
    # Filtered in pairs of positions:
    "down pairs": Case((2, 33, 5, 6), 65, (2, 3), 1),
    "down pairs and one": Case((2, 32, 4, 13), 32, (2, 3), 1),
    "down right pairs": Case((2, 34, 4, 8), 48, (2, 2), 1),
    "down right pairs and one": Case((1, 32, 3, 15), 33, (2, 2), 1),
    "down left pairs": Case((1, 33, 3, 7), 32, (2, 2), 0),
    "pairs that start at the pixel": Case((2, 32, 3, 9), 34, (2, 3), 0),
    "pairs that end at the pixel": Case((2, 32, 3, 8), 34, (2, 3), 2),
    "pairs in several chunks": Case((2, 32, 30, 31), 34, (2, 2), 1),
}

all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
some_cases = pytest.mark.parametrize("name", ["gated", "several chunks", "down pairs", "pairs in several chunks"])


def padded(case):
    def function(x, weight, bias):
        top, columns = case.kernel[0] - 1, case.kernel[1] - 1
        return F.conv2d(F.pad(x, (case.left, columns - case.left, top, 0)), weight, bias)

    return function


def run(function, x, weight, bias, grad):
    """Output and gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))]


def native(case):
    def function(*leaves):
        with fastgen.backend("cpu"):
            return ops.shifted_conv2d(*leaves, left=case.left)

    return function


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["down", "down left", "row", "kernel larger than image"])
def test_against_loops(name, backend):
    case = CASES[name]
    x, weight, bias, _ = case.tensors(torch.float64)
    with fastgen.backend(backend):
        output = ops.shifted_conv2d(x, weight, bias, left=case.left)
    expected = bias.view(1, -1, 1, 1).expand(output.shape).clone()
    for n, o, y, x_, i, ky, kx in itertools.product(*map(range, (*output.shape, *weight.shape[1:]))):
        sy, sx = y + ky - (case.kernel[0] - 1), x_ + kx - case.left
        if 0 <= sy < case.shape[2] and 0 <= sx < case.shape[3]:
            expected[n, o, y, x_] += weight[o, i, ky, kx] * x[n, i, sy, sx]
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def rms(tensor):
    return float(tensor.square().mean().sqrt())


@all_cases
def test_float32_is_as_accurate_as_pytorch(case):
    tensors = case.tensors()
    expected = run(padded(case), *(tensor.double() for tensor in tensors))
    plain, actual = run(padded(case), *tensors), run(native(case), *tensors)
    for name, truth, theirs, ours in zip(("output", "input", "weight", "bias"), expected, plain, actual, strict=True):
        error, bound = rms(ours - truth), max(2 * rms(theirs - truth), 2**-23 * rms(truth))
        assert error <= bound, f"{name}: error {error:.2e}, plain PyTorch {rms(theirs - truth):.2e}"


@all_cases
@pytest.mark.parametrize("isa", ISAS)
def test_float64_on_every_instruction_set(case, isa):
    tensors = case.tensors(torch.float64)
    expected = run(padded(case), *tensors)
    with chosen(isa):
        actual = run(native(case), *tensors)
    for ours, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


@some_cases
def test_bits_are_the_same_on_every_fused_instruction_set(name):
    case = CASES[name]
    tensors, results = case.tensors(), []
    for isa in FUSED:
        with chosen(isa):
            results.append(run(native(case), *tensors))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@some_cases
def test_bits_do_not_depend_on_threads(name, monkeypatch):
    monkeypatch.setattr(causal_conv, "_MIN_THREAD_WORK", 1)
    case = CASES[name]
    tensors = case.tensors()
    one = run(native(case), *tensors)
    for threads in (2, 3, 7, 19):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, run(native(case), *tensors), one)), threads


@some_cases
def test_bits_do_not_depend_on_the_batch(name):
    case = CASES[name]
    x, weight, bias, grad = case.tensors()
    output, grad_input, *_ = run(native(case), x, weight, bias, grad)
    for n in range(case.shape[0]):
        alone = run(native(case), x[n : n + 1], weight, bias, grad[n : n + 1])
        assert torch.equal(alone[0][0], output[n])
        assert torch.equal(alone[1][0], grad_input[n])


@all_cases
def test_nothing_outside_the_window_is_read(case):
    """NaN elsewhere leaves a position as it was, bit for bit, and its gradient reaches nothing else."""
    x, weight, bias, grad = case.tensors()
    height, width = case.shape[2:]
    expected, expected_grad, *_ = run(native(case), x, weight, bias, grad)
    for y, at in {(0, 0), (height // 2, width // 2), (height - 1, width - 1), (height // 2, width - 1)}:
        rows = slice(max(0, y - case.kernel[0] + 1), y + 1)
        columns = slice(max(0, at - case.left), at - case.left + case.kernel[1])
        hidden = torch.full_like(x, torch.nan)
        hidden[:, :, rows, columns] = x[:, :, rows, columns]
        assert torch.equal(native(case)(hidden, weight, bias)[:, :, y, at], expected[:, :, y, at])
        readers = slice(y, y + case.kernel[0]), slice(max(0, at + case.left + 1 - case.kernel[1]), at + case.left + 1)
        other = torch.full_like(grad, torch.nan)
        other[:, :, readers[0], readers[1]] = grad[:, :, readers[0], readers[1]]
        found = run(native(case), x, weight, bias, other)[1]
        assert torch.equal(found[:, :, y, at], expected_grad[:, :, y, at])


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "channels sliced"])
@pytest.mark.parametrize("name", ["down pairs", "down right", "first of the gated"])
def test_layouts_give_the_same_bits(name, layout):
    arrange = {
        "contiguous": lambda t: t.contiguous(),
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": lambda t: torch.stack((t, -t), dim=-1).flatten(3)[..., ::2],
        "channels sliced": lambda t: torch.cat((t, -t), dim=1).to(memory_format=torch.channels_last)[:, : t.shape[1]],
    }[layout]
    case = CASES[name]
    x, weight, bias, grad = case.tensors()
    expected = run(native(case), x.contiguous(memory_format=torch.channels_last), weight, bias, grad)
    actual = run(native(case), arrange(x), arrange(weight), bias, arrange(grad))
    assert all(map(torch.equal, actual, expected))
    assert actual[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["down", "down left", "row"])
def test_derivatives(name):
    case = CASES[name]._replace(shape=(2, 2, 3, 4), out=2)
    leaves = [tensor.requires_grad_() for tensor in case.tensors(torch.float64)[:3]]
    assert torch.autograd.gradcheck(native(case), leaves)
    assert torch.autograd.gradgradcheck(lambda *leaves: ops.shifted_conv2d(*leaves, left=case.left), leaves)


@pytest.mark.parametrize("name", ["down", "down left", "first of the gated", "kernel larger than image", "1x1"])
def test_the_plain_gradient_operators(name):
    case = CASES[name]
    x, weight, bias, grad = case.tensors(torch.float64)
    _, *expected = run(padded(case), x, weight, bias, grad)
    with fastgen.backend("reference"):
        actual = [torch.ops.fastgen.shifted_conv2d_input_grad(grad, weight, case.left)]
        actual += torch.ops.fastgen.shifted_conv2d_weight_grad(grad, x, case.kernel, case.left)
    for ours, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_empty_batch(backend):
    x, weight, bias, _ = (tensor.requires_grad_() for tensor in Case((0, 4, 5, 6), 6, (2, 3), 1).tensors())
    with fastgen.backend(backend):
        output = ops.shifted_conv2d(x, weight, bias, left=1)
        output.sum().backward()
    assert output.shape == (0, 6, 5, 6)
    assert (weight.grad == 0).all()
    assert (bias.grad == 0).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend):
    x, weight, bias, grad = Case((2, 4, 5, 6), 6, (2, 3), 2).tensors()
    operators = torch.ops.fastgen
    with fastgen.backend(backend):
        opcheck(operators.shifted_conv2d.default, (x, weight, bias, 2))
        opcheck(operators.shifted_conv2d.default, (x, weight, None, 0))
        opcheck(operators.shifted_conv2d_input_grad.default, (grad, weight, 2))
        opcheck(operators.shifted_conv2d_weight_grad.default, (grad, x, [2, 3], 1))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(dynamic):
    def function(x, weight, bias):
        return ops.shifted_conv2d(x.relu(), weight, bias, left=1).sigmoid()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (2, 3):
        tensors = Case((n, 4, 5, 6), 6, (2, 3), 1).tensors()
        assert all(map(torch.equal, run(compiled, *tensors), run(function, *tensors)))


def test_reference_traces_to_plain_aten():
    x, weight, bias, _ = CASES["down"].tensors()
    with fastgen.backend("reference"):
        graph = make_fx(lambda x: ops.shifted_conv2d(x, weight, bias, left=1))(x).graph
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert "aten.convolution.default" in names
    assert not any("fastgen" in name for name in names)


def test_transforms_take_plain_pytorch():
    x, weight, bias, _ = CASES["down"].tensors()
    both = torch.vmap(lambda x: ops.shifted_conv2d(x[None], weight, bias, left=1)[0])(x)
    torch.testing.assert_close(both, ops.shifted_conv2d(x, weight, bias, left=1))


def test_many_rows_take_plain_pytorch():
    case = Case((1, 1, 3, 2), 1, (129, 1), 0)
    x, weight, bias, _ = case.tensors()
    torch.testing.assert_close(ops.shifted_conv2d(x, weight, bias, left=0), padded(case)(x, weight, bias))
    with fastgen.backend("cpu"), pytest.raises(RuntimeError, match="more than 128 rows"):
        ops.shifted_conv2d(x, weight, bias, left=0)


ERRORS = {
    "input 3-d": ({"input": torch.ones(4, 5, 6)}, ValueError, r"input must be \[N, Cin, H, W\].*got \[4, 5, 6\]"),
    "channels": ({"input": torch.ones(2, 3, 5, 6)}, ValueError, r"input must have 4 channels.*got 3"),
    "weight 3-d": ({"weight": torch.ones(6, 4, 3)}, ValueError, r"weight must be \[Cout, Cin, kh, kw\]"),
    "weight dtype": ({"weight": torch.ones(6, 4, 2, 3).double()}, TypeError, "torch.float32, got torch.float64"),
    "bias shape": ({"bias": torch.ones(5)}, ValueError, r"bias must be \[6\], got \[5\]"),
    "left too large": ({"left": 3}, ValueError, "left must be an integer from 0 to 2, a column of the kernel, got 3"),
    "left negative": ({"left": -1}, ValueError, "left must be an integer from 0 to 2"),
    "left no integer": ({"left": 0.5}, ValueError, "left must be an integer from 0 to 2.*got 0.5"),
}


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(changes, error, message):
    given = {"input": torch.ones(2, 4, 5, 6), "weight": torch.ones(6, 4, 2, 3), "bias": torch.ones(6), "left": 1}
    with pytest.raises(error, match=message):
        ops.shifted_conv2d(**{**given, **changes})


def test_layer():
    layer = nn.ShiftedConv2d(4, 6, (2, 3), left=1)
    plain = torch.nn.Conv2d(4, 6, (2, 3))
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(layer(x), plain(F.pad(x, (1, 1, 1, 0))))
    assert repr(layer) == "ShiftedConv2d(4, 6, kernel_size=(2, 3), left=1)"
    with pytest.raises(ValueError, match="left must be an integer from 0 to 2, got 3"):
        nn.ShiftedConv2d(4, 6, (2, 3), left=3)
