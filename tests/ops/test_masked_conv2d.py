"""Masked convolution: loops over the definition of the mask, the reference in float64, gradients, layouts, threads."""

from __future__ import annotations

import itertools
import logging
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import fastgen
from fastgen import backends, ops
from fastgen.ops import causal_conv
from tests.instruction_sets import FUSED, ISAS, chosen


class Case(NamedTuple):
    mask_type: str
    shape: tuple[int, int, int, int]  # N, Cin, H, W
    out: int
    kernel: tuple[int, int]
    colors: int = 1
    splits: int = 1

    @property
    def mask(self):
        return {"mask_type": self.mask_type, "colors": self.colors, "splits": self.splits}

    def tensors(self, dtype=torch.float32):
        n, channels, height, width = self.shape
        x = torch.randn(self.shape, dtype=dtype)
        weight = torch.randn(self.out, channels, *self.kernel, dtype=dtype)
        return x, weight, torch.randn(self.out, dtype=dtype), torch.randn(n, self.out, height, width, dtype=dtype)


CASES = {
    "one of all": Case("B", (1, 1, 1, 1), 1, (1, 1)),
    "nothing open": Case("A", (2, 3, 2, 2), 4, (1, 1)),
    "1x1": Case("B", (2, 17, 5, 3), 33, (1, 1)),
    "1x1 colors": Case("B", (2, 9, 5, 3), 30, (1, 1), colors=3, splits=2),
    "3x3 A": Case("A", (2, 5, 7, 11), 19, (3, 3)),
    "3x3 B": Case("B", (3, 16, 8, 8), 32, (3, 3)),
    "3x3 A colors": Case("A", (2, 6, 5, 4), 12, (3, 3), colors=3, splits=2),
    "3x3 B colors": Case("B", (2, 36, 5, 13), 34, (3, 3), colors=3),
    "7x7 A rgb": Case("A", (2, 3, 9, 10), 48, (7, 7), colors=3),
    "7x7 A grey": Case("A", (2, 1, 13, 6), 20, (7, 7)),
    "1x5": Case("B", (2, 7, 3, 9), 10, (1, 5), colors=2),
    "5x1": Case("A", (2, 7, 9, 3), 10, (5, 1), colors=2),
    "kernel larger than image": Case("B", (2, 4, 2, 3), 5, (7, 9)),
    "wide": Case("B", (1, 3, 2, 300), 5, (3, 3)),
    "one column": Case("B", (3, 4, 17, 1), 6, (3, 3)),
    "uneven colors": Case("B", (2, 5, 4, 4), 14, (3, 3), colors=4, splits=2),
    "more colors than channels": Case("A", (1, 2, 4, 4), 3, (3, 3), colors=5),
    "many splits": Case("B", (1, 8, 4, 5), 40, (3, 3), colors=2, splits=5),
    "several chunks": Case("B", (5, 8, 24, 23), 9, (3, 3)),
    # Filtered in pairs of positions:
    "3x3 B pairs": Case("B", (2, 33, 5, 6), 65, (3, 3)),
    "3x3 B pairs and one": Case("B", (2, 32, 4, 13), 32, (3, 3)),
    "3x3 A pairs": Case("A", (1, 35, 5, 15), 32, (3, 3)),
    "3x3 A pairs colors": Case("A", (2, 36, 4, 7), 48, (3, 3), colors=3, splits=2),
    "3x3 B pairs colors": Case("B", (2, 34, 4, 12), 50, (3, 3), colors=3),
    "pairs in several chunks": Case("B", (2, 32, 30, 31), 34, (3, 3)),
    "pairs in two rows": Case("B", (2, 32, 2, 12), 48, (3, 3)),
}

all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def is_open(case, o, i, y, x):
    """The mask, one weight at a time, in the words of the paper."""
    centre_y, centre_x = case.kernel[0] // 2, case.kernel[1] // 2
    if (y, x) != (centre_y, centre_x):
        return y < centre_y or (y == centre_y and x < centre_x)
    part = case.out // case.splits
    source, reader = i * case.colors // case.shape[1], (o % part) * case.colors // part
    return source < reader if case.mask_type == "A" else source <= reader


def loop_mask(case):
    shape = (case.out, case.shape[1], *case.kernel)
    return torch.tensor([is_open(case, *at) for at in itertools.product(*map(range, shape))]).view(shape)


def conv64(x, weight, bias, case):
    """The definition in float64, over the mask from loops."""
    padding = (case.kernel[0] // 2, case.kernel[1] // 2)
    weight = weight.double() * loop_mask(case)
    return torch.nn.functional.conv2d(x.double(), weight, bias.double(), padding=padding)


def run(case, function, x, weight, bias, grad):
    """Output and gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))]


def native(case):
    def function(*leaves):
        with fastgen.backend("cpu"):
            return ops.masked_conv2d(*leaves, **case.mask)

    return function


@all_cases
def test_conv_mask(case):
    mask = ops.conv_mask((case.out, case.shape[1], *case.kernel), case.mask_type, case.colors, case.splits)
    assert torch.equal(mask, loop_mask(case))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["3x3 A colors", "5x1", "kernel larger than image", "uneven colors"])
def test_against_loops(name, backend):
    case = CASES[name]
    x, weight, bias, _ = case.tensors(torch.float64)
    with fastgen.backend(backend):
        output = ops.masked_conv2d(x, weight, bias, **case.mask)
    expected = bias.view(1, -1, 1, 1).expand(output.shape).clone()
    ph, pw = case.kernel[0] // 2, case.kernel[1] // 2
    sizes = (*output.shape, case.shape[1], *case.kernel)
    for n, o, y, x_, i, ky, kx in itertools.product(*map(range, sizes)):
        sy, sx = y + ky - ph, x_ + kx - pw
        if is_open(case, o, i, ky, kx) and 0 <= sy < case.shape[2] and 0 <= sx < case.shape[3]:
            expected[n, o, y, x_] += weight[o, i, ky, kx] * x[n, i, sy, sx]
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@all_cases
def test_float32_is_as_accurate_as_pytorch(case):
    tensors = case.tensors()
    expected = run(case, lambda *leaves: conv64(*leaves, case), *(tensor.double() for tensor in tensors))
    plain = run(case, lambda *leaves: conv64_as_float32(*leaves, case), *tensors)
    actual = run(case, native(case), *tensors)
    for name, truth, theirs, ours in zip(("output", "input", "weight", "bias"), expected, plain, actual, strict=True):
        error, bound = rms(ours - truth), max(2 * rms(theirs - truth), 2**-23 * rms(truth))
        assert error <= bound, f"{name}: error {error:.2e}, plain PyTorch {rms(theirs - truth):.2e}"


def rms(tensor):
    return float(tensor.square().mean().sqrt())


def conv64_as_float32(x, weight, bias, case):
    padding = (case.kernel[0] // 2, case.kernel[1] // 2)
    return torch.nn.functional.conv2d(x, weight * loop_mask(case), bias, padding=padding)


@all_cases
@pytest.mark.parametrize("isa", ISAS)
def test_float64_on_every_instruction_set(case, isa):
    tensors = case.tensors(torch.float64)
    expected = run(case, lambda *leaves: conv64(*leaves, case), *tensors)
    with chosen(isa):
        actual = run(case, native(case), *tensors)
    for ours, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["3x3 B colors", "7x7 A rgb", "several chunks", "pairs in several chunks", "3x3 A pairs colors"]
)
def test_bits_are_the_same_on_every_fused_instruction_set(name):
    case = CASES[name]
    tensors, results = case.tensors(), []
    for isa in FUSED:
        with chosen(isa):
            results.append(run(case, native(case), *tensors))
    for result, first in zip(results[1:], itertools.repeat(results[0])):
        assert all(map(torch.equal, result, first))


@pytest.mark.parametrize(
    "name", ["3x3 B colors", "7x7 A rgb", "several chunks", "wide", "pairs in several chunks", "3x3 A pairs colors"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bits_do_not_depend_on_threads(name, dtype, monkeypatch):
    monkeypatch.setattr(causal_conv, "_MIN_THREAD_WORK", 1)
    case = CASES[name]
    tensors = case.tensors(dtype)
    one = run(case, native(case), *tensors)
    for threads in (2, 3, 7, 19):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, run(case, native(case), *tensors), one)), threads


@pytest.mark.parametrize("name", ["3x3 B colors", "several chunks", "pairs in several chunks", "3x3 A pairs colors"])
def test_bits_do_not_depend_on_the_batch(name):
    case = CASES[name]
    x, weight, bias, grad = case.tensors()
    output, grad_input, *_ = run(case, native(case), x, weight, bias, grad)
    for n in range(case.shape[0]):
        alone = run(case, native(case), x[n : n + 1], weight, bias, grad[n : n + 1])
        assert torch.equal(alone[0][0], output[n])
        assert torch.equal(alone[1][0], grad_input[n])


@pytest.mark.parametrize("name", [name for name in CASES if "3x3" in name or "7x7" in name])
def test_nothing_hidden_is_read(name):
    """NaN at later positions, and other values of hidden colours, leave a position as it was, bit for bit."""
    case = CASES[name]
    x, weight, bias, _ = case.tensors()
    function = native(case)
    expected = function(x, weight, bias).flatten(2)
    height, width = x.shape[2:]
    for position in {0, width // 2, width - 1, height // 2 * width + width // 2}:
        hidden = x.clone()
        hidden.flatten(2)[..., position + 1 :] = torch.nan
        output = function(hidden, weight, bias).flatten(2)
        assert torch.equal(output[..., : position + 1], expected[..., : position + 1])
        for channel in range(0, case.out, 7):
            closed = [not is_open(case, channel, i, *(k // 2 for k in case.kernel)) for i in range(x.shape[1])]
            other = hidden.clone()
            other.flatten(2)[:, torch.tensor(closed), position] += 3.7
            output = function(other, weight, bias).flatten(2)
            assert torch.equal(output[:, channel, position], expected[:, channel, position])


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: torch.stack((t, -t), dim=-1).flatten(3)[..., ::2],
    "channels sliced": lambda t: torch.cat((t, -t), dim=1).contiguous(memory_format=torch.channels_last)[
        :, : t.shape[1]
    ],
    "offset": lambda t: torch.cat((torch.zeros(1), t.flatten()))[1:].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["3x3 B colors", "1x1", "7x7 A rgb"])
def test_layouts_give_the_same_bits(name, layout):
    case = CASES[name]
    x, weight, bias, grad = case.tensors()
    expected = run(case, native(case), x, weight, bias, grad)
    arrange = LAYOUTS[layout]
    actual = run(case, native(case), arrange(x), arrange(weight), bias, arrange(grad))
    assert all(map(torch.equal, actual, expected))
    assert actual[0].is_contiguous(memory_format=torch.channels_last)


def test_expanded_inputs():
    x = torch.randn(1, 1, 5, 6, dtype=torch.float64).expand(3, 4, 5, 6)
    weight = torch.randn(1, 4, 3, 3, dtype=torch.float64).expand(6, 4, 3, 3)
    bias = torch.ones(1, dtype=torch.float64).expand(6)
    case = Case("B", (3, 4, 5, 6), 6, (3, 3), colors=2)
    grad = torch.ones((), dtype=torch.float64).expand(3, 6, 5, 6)
    expected = run(case, lambda *leaves: conv64(*leaves, case), x, weight, bias, grad)
    for ours, truth in zip(run(case, native(case), x, weight, bias, grad), expected, strict=True):
        torch.testing.assert_close(ours, truth)


def test_offsets_beyond_32_bits():
    memory = torch.from_numpy(np.zeros(2**31 + 64, np.float32))  # touched at both ends alone
    x = memory.as_strided((2, 1, 4, 4), (2**31, 16, 4, 1))
    x.copy_(torch.randn(2, 1, 4, 4))
    weight = torch.randn(3, 1, 3, 3)
    assert torch.equal(ops.masked_conv2d(x, weight, mask_type="B"), ops.masked_conv2d(x.clone(), weight, mask_type="B"))


def test_closed_weights_are_neither_read_nor_trained():
    case = CASES["3x3 A colors"]
    x, weight, bias, grad = case.tensors()
    closed = ~loop_mask(case)
    expected = run(case, native(case), x, weight, bias, grad)
    actual = run(case, native(case), x, weight.masked_fill(closed, float("nan")), bias, grad)
    assert all(map(torch.equal, actual, expected))
    assert (actual[2][closed] == 0).all()


@pytest.mark.parametrize("name", ["3x3 A colors", "uneven colors", "1x1 colors", "nothing open"])
def test_gradcheck(name):
    case = CASES[name]
    leaves = [tensor.requires_grad_() for tensor in case.tensors(torch.float64)[:3]]
    assert torch.autograd.gradcheck(native(case), leaves)


@pytest.mark.parametrize("needs", [*itertools.product((False, True), repeat=3)], ids=str)
def test_only_the_gradients_asked_for(needs, monkeypatch):
    calls, run = [], causal_conv._run
    monkeypatch.setattr(causal_conv, "_run", lambda *args: calls.append(args[1]) or run(*args))
    case = CASES["3x3 B colors"]
    leaves = [tensor.requires_grad_(need) for tensor, need in zip(case.tensors()[:3], needs, strict=True)]
    output = ops.masked_conv2d(*leaves, **case.mask)
    assert output.requires_grad == any(needs)
    if any(needs):
        output.sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == list(needs)
    assert len(calls) == 1 + needs[0] + needs[1]


def test_second_derivatives():
    case = CASES["3x3 A colors"]
    *tensors, _ = case.tensors(torch.float64)
    for tensor in tensors:
        tensor.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda *tensors: ops.masked_conv2d(*tensors, **case.mask), tensors)


def test_penalties_of_gradients():
    """The gradient of a sum is a function of the weight, though not of a gradient that is to be differentiated."""
    case = CASES["3x3 B"]
    x, weight, bias, _ = case.tensors(torch.float64)

    def penalised():
        output = ops.masked_conv2d(x.requires_grad_(), weight.requires_grad_(), bias, **case.mask)
        (grad,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        return torch.autograd.grad(output.square().sum() + grad.square().sum(), weight)[0]

    with fastgen.backend("reference"):
        expected = penalised()
    torch.testing.assert_close(penalised(), expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_empty_batch(backend):
    x = torch.randn(0, 4, 5, 6, requires_grad=True)
    weight = torch.randn(6, 4, 3, 3, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    with fastgen.backend(backend):
        output = ops.masked_conv2d(x, weight, bias, mask_type="B")
        output.sum().backward()
    assert output.shape == (0, 6, 5, 6)
    assert x.grad.shape == x.shape
    assert (weight.grad == 0).all()
    assert (bias.grad == 0).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend):
    x, weight, bias, grad = Case("A", (2, 4, 5, 6), 6, (3, 3)).tensors()
    operators = torch.ops.fastgen
    with fastgen.backend(backend):
        opcheck(operators.masked_conv2d.default, (x, weight, bias, "A", 2, 1))
        opcheck(operators.masked_conv2d.default, (x, weight, None, "B", 1, 3))
        opcheck(operators.masked_conv2d_input_grad.default, (grad, weight, "A", 2, 1))
        opcheck(operators.masked_conv2d_weight_grad.default, (grad, x, [3, 3], "B", 2, 2))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(dynamic):
    def function(x, weight, bias):
        return ops.masked_conv2d(x.relu(), weight, bias, mask_type="B", colors=2).sigmoid()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (2, 3):
        case = Case("B", (n, 4, 5, 6), 6, (3, 3))
        tensors = case.tensors()
        assert all(map(torch.equal, run(case, compiled, *tensors), run(case, function, *tensors)))


def test_reference_traces_to_plain_aten():
    case = CASES["3x3 A colors"]
    x, weight, bias, _ = case.tensors()
    with fastgen.backend("reference"):
        graph = make_fx(lambda x: ops.masked_conv2d(x, weight, bias, **case.mask))(x).graph
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert "aten.convolution.default" in names
    assert not any("fastgen" in name for name in names)


def test_autocast_and_low_precision_use_the_reference(caplog):
    x, weight, bias, _ = CASES["3x3 B"].tensors()
    backends._logged.clear()
    with caplog.at_level(logging.WARNING, "fastgen"):
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.masked_conv2d(x, weight, bias, mask_type="B").dtype == torch.bfloat16
        low = ops.masked_conv2d(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), mask_type="B")
    assert low.dtype == torch.bfloat16
    assert [record.getMessage() for record in caplog.records] == [
        "masked_conv2d does without the cpu backend: autocast is on",
        "masked_conv2d does without the cpu backend: it takes float32 and float64, got torch.bfloat16",
    ]
    with fastgen.backend("cpu"), pytest.raises(RuntimeError, match="takes float32 and float64"):
        ops.masked_conv2d(x.bfloat16(), weight.bfloat16(), mask_type="B")


def arguments(**changes):
    given = {"input": torch.ones(2, 4, 5, 6), "weight": torch.ones(6, 4, 3, 3), "bias": torch.ones(6), "mask_type": "A"}
    return {**given, **changes}


ERRORS = {
    "input a list": ({"input": [1.0]}, TypeError, "input must be a tensor, got list"),
    "input 3-d": ({"input": torch.ones(4, 5, 6)}, ValueError, r"input must be \[N, Cin, H, W\].*got \[4, 5, 6\]"),
    "empty image": ({"input": torch.ones(2, 4, 0, 6)}, ValueError, r"got \[2, 4, 0, 6\]"),
    "channels": ({"input": torch.ones(2, 3, 5, 6)}, ValueError, r"input must have 4 channels.*got 3"),
    "integers": ({"input": torch.ones(2, 4, 5, 6).int()}, TypeError, "weight must have the dtype of the input"),
    "even kernel": ({"weight": torch.ones(6, 4, 3, 2)}, ValueError, "odd kernel sizes, got 3 x 2"),
    "weight 3-d": ({"weight": torch.ones(6, 4, 3)}, ValueError, r"weight must be \[Cout, Cin, kh, kw\]"),
    "weight dtype": ({"weight": torch.ones(6, 4, 3, 3).double()}, TypeError, "torch.float32, got torch.float64"),
    "bias shape": ({"bias": torch.ones(5)}, ValueError, r"bias must be \[6\], got \[5\]"),
    "bias dtype": ({"bias": torch.ones(6).half()}, TypeError, "bias must have the dtype"),
    "device": ({"weight": torch.ones(6, 4, 3, 3, device="meta")}, ValueError, "weight must be on the device"),
    "mask type": ({"mask_type": "C"}, ValueError, "mask_type must be 'A' or 'B', got 'C'"),
    "colors": ({"colors": 0}, ValueError, "colors must be at least 1, got 0"),
    "splits": ({"splits": 4}, ValueError, "splits must divide the 6 output channels, got 4"),
}


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(changes, error, message):
    with pytest.raises(error, match=message):
        ops.masked_conv2d(**arguments(**changes))


OPERATOR_ERRORS = {
    "forward": ("masked_conv2d", (torch.ones(2, 3, 5, 6), torch.ones(6, 4, 3, 3), None), "input must have 4 channels"),
    "input grad": ("masked_conv2d_input_grad", (torch.ones(2, 5, 5, 6), torch.ones(6, 4, 3, 3)), r"\[N, 6, H, W\]"),
    "weight grad": (
        "masked_conv2d_weight_grad",
        (torch.ones(2, 6, 5, 6), torch.ones(2, 4, 5, 5), [3, 3]),
        r"got \[2, 6, 5, 6\] and \[2, 4, 5, 5\]",
    ),
}


@pytest.mark.parametrize(("name", "tensors", "message"), OPERATOR_ERRORS.values(), ids=OPERATOR_ERRORS.keys())
def test_operators_check_their_arguments(name, tensors, message):
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.fastgen, name)(*tensors, "A", 1, 1)
