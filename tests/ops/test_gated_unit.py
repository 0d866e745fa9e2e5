"""The gated unit: plain PyTorch in float64, gradients, layouts, instruction sets, threads, extreme values."""

from __future__ import annotations

import importlib
import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import fastgen
from fastgen import backends, ops
from tests.instruction_sets import FUSED, ISAS, chosen

module = importlib.import_module("fastgen.ops.gated_unit")  # the package has the function of this name


class Case(NamedTuple):
    shape: tuple[int, int, int, int]  # of the output
    activation: str
    with_residual: bool

    def tensors(self, dtype=torch.float32):
        """input, residual, grad."""
        n, channels, height, width = self.shape
        x = 2 * torch.randn(n, 2 * channels, height, width, dtype=dtype)
        residual, grad = torch.randn(2, *self.shape, dtype=dtype)
        return x, residual if self.with_residual else None, grad


SHAPES = [(1, 1, 1, 1), (2, 1, 9, 5), (3, 3, 5, 7), (2, 7, 1, 11), (2, 8, 3, 3), (1, 33, 6, 5), (3, 64, 9, 7)]
CASES = {
    f"{'x'.join(map(str, shape))} {activation}{' residual' * with_residual}": Case(shape, activation, with_residual)
    for shape, (activation, with_residual) in itertools.product(
        SHAPES, [("tanh", False), ("tanh", True), ("none", False), ("none", True)]
    )
}
SEVERAL = ["2x1x9x5 none residual", "3x3x5x7 tanh residual", "1x33x6x5 tanh", "2x8x3x3 none"]

all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
several_cases = pytest.mark.parametrize("case", [CASES[name] for name in SEVERAL], ids=SEVERAL)


def formula(x, residual, activation):
    a, b = x.chunk(2, dim=1)
    y = (torch.tanh(a) if activation == "tanh" else a) * torch.sigmoid(b)
    return y if residual is None else residual + y


def run(case, function, x, residual, grad):
    """Output and gradients."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in (x, residual)]
    output = function(*leaves, activation=case.activation)
    inputs = [leaf for leaf in leaves if leaf is not None]
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def native(*args, **kwargs):
    with fastgen.backend("cpu"):
        return ops.gated_unit(*args, **kwargs)


def doubles(tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


@all_cases
def test_float32_is_as_accurate_as_pytorch(case):
    tensors = case.tensors()
    truth = run(case, formula, *doubles(tensors))
    theirs, ours = run(case, formula, *tensors), run(case, native, *tensors)
    for name, exact, plain, fused in zip(("output", "input", "residual"), truth, theirs, ours, strict=False):
        error, bound = rms(fused - exact), max(2 * rms(plain - exact), 2**-23 * rms(exact))
        assert error <= bound, f"{name}: error {error:.2e}, plain PyTorch {rms(plain - exact):.2e}"


def rms(tensor):
    return float(tensor.square().mean().sqrt())


@pytest.mark.parametrize("activation", ["tanh", "none"])
@pytest.mark.parametrize("isa", ISAS)
def test_relative_error_over_all_magnitudes(isa, activation):
    """Of what is far below one too, as slopes are where the functions saturate."""
    at = torch.cat([torch.logspace(-30, 1.6, 250), torch.linspace(0.01, 40, 250)])
    at = torch.cat([-at.flip(0), at])
    a, b = at.repeat(len(at), 1), at[:, None].repeat(1, len(at))
    x = torch.stack((a, b))[None]
    case = Case((1, 1, len(at), len(at)), activation, False)
    with chosen(isa):
        output, grad = run(case, native, x, None, torch.ones(1, 1, *a.shape))
    act, slope = (a.double(), 1.0) if activation == "none" else (torch.tanh(a.double()), torch.cosh(a.double()) ** -2)
    gate = torch.sigmoid(b.double())
    for actual, expected in (
        (output[0, 0], act * gate),
        (grad[0, 0], slope * gate),
        (grad[0, 1], act * gate * torch.sigmoid(-b.double())),
    ):
        relative = (actual.double() - expected).abs() / expected.abs().clamp(min=2**-126)
        assert relative.max() <= 6 * 2**-23


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@several_cases
def test_against_loops(case, backend):
    x, residual, _ = case.tensors(torch.float64)
    with fastgen.backend(backend):
        output = ops.gated_unit(x, residual, activation=case.activation)
    channels = case.shape[1]
    for n, c, h, w in itertools.product(*map(range, case.shape)):
        a, b = float(x[n, c, h, w]), float(x[n, channels + c, h, w])
        expected = (math.tanh(a) if case.activation == "tanh" else a) / (1 + math.exp(-b))
        if residual is not None:
            expected += float(residual[n, c, h, w])
        assert float(output[n, c, h, w]) == pytest.approx(expected, rel=1e-14, abs=1e-14)


@all_cases
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)], ids=["f64", "f32"])
def test_every_instruction_set(case, isa, dtype, tolerance):
    tensors = case.tensors(dtype)
    expected = run(case, formula, *doubles(tensors))
    with chosen(isa):
        actual = run(case, native, *tensors)
    for ours, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=tolerance, atol=tolerance)


@several_cases
def test_bits_are_the_same_on_every_fused_instruction_set(case):
    tensors, results = case.tensors(), []
    for isa in FUSED:
        with chosen(isa):
            results.append(run(case, native, *tensors))
    assert all(all(map(torch.equal, result, results[0])) for result in results)


@several_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bits_do_not_depend_on_threads(case, dtype, monkeypatch):
    monkeypatch.setattr(module, "_THREAD_ELEMENTS", 1)
    tensors = case.tensors(dtype)
    expected = run(case, native, *tensors)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, run(case, native, *tensors), expected)), threads


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: torch.stack((t, -t), dim=-1).flatten(3)[..., ::2],
    "channels sliced": lambda t: LAYOUTS["channels_last"](torch.cat((t, -t), dim=1))[:, : t.shape[1]],
    "offset": lambda t: torch.cat((torch.zeros(1), t.flatten()))[1:].view(t.shape),
    "negated": lambda t: torch.complex(t, -t).conj().imag,  # of which the memory has the other sign
}


@pytest.mark.parametrize("layout", LAYOUTS)
@several_cases
def test_layouts_give_the_same_bits(case, layout):
    arrange = LAYOUTS[layout]
    x, residual, grad = case.tensors()
    arranged = [arrange(x), None if residual is None else arrange(residual), arrange(grad)]
    expected = run(case, native, x, residual, grad)
    assert all(map(torch.equal, run(case, native, *arranged), expected))
    with torch.no_grad():
        output = native(*arranged[:2], activation=case.activation)
    assert torch.equal(output, expected[0])
    kept = torch.contiguous_format if arranged[0].resolve_neg().is_contiguous() else torch.channels_last
    assert output.is_contiguous(memory_format=kept)


def test_expanded_inputs():
    x = torch.randn(1, 1, 5, 6).expand(3, 4, 5, 6)
    residual = torch.randn(()).expand(3, 2, 5, 6)
    torch.testing.assert_close(native(x, residual), formula(x, residual, "tanh"))
    leaf = torch.randn(3, 4, 5, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(native(leaf).sum(), leaf)
    torch.testing.assert_close(grad, torch.autograd.grad(formula(leaf, None, "tanh").sum(), leaf)[0])


def test_what_is_not_a_number():
    """Every pair of halves of NaN, infinities and others gives what PyTorch gives, and so do the slopes."""
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -2.0])
    a, b = values.repeat(len(values), 1), values[:, None].repeat(1, len(values))
    x = torch.stack((a, b))[None].expand(3, -1, -1, -1).repeat_interleave(9, dim=1)
    for activation in ("tanh", "none"):
        case = Case((3, 9, len(values), len(values)), activation, True)
        residual, grad = torch.randn(2, *case.shape)
        residual[2], grad[2] = torch.nan, torch.inf
        for dtype in (torch.float32, torch.float64):
            tensors = [tensor.to(dtype) for tensor in (x, residual, grad)]
            for ours, plain in zip(run(case, native, *tensors), run(case, formula, *tensors), strict=True):
                torch.testing.assert_close(ours, plain, equal_nan=True)


@pytest.mark.parametrize("value", [90.0, 104.0, 1e4, 3e38])
def test_large_inputs_saturate(value):
    x = torch.tensor([[value, 1.0, -value, 1.0], [1.0, value, 1.0, -value]]).repeat_interleave(17, dim=0)[
        None, :, :, None
    ]
    case = Case((1, 17, 4, 1), "tanh", False)
    output, grad = run(case, native, x, None, torch.ones(1, 17, 4, 1))
    gate = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(output[0, 0, :, 0], torch.tensor([gate, math.tanh(1), -gate, 0.0]))
    slopes = torch.tensor([[0.0, math.cosh(1) ** -2, 0.0, 0.0], [gate * (1 - gate), 0.0, gate * (gate - 1), 0.0]])
    torch.testing.assert_close(grad[0, ::17, :, 0], slopes)
    assert output.isfinite().all()
    assert grad.isfinite().all()


# Gradients, transforms, registration


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@several_cases
def test_gradcheck(case, backend):
    case = case._replace(shape=(2, case.shape[1], 2, 1))
    x, residual, _ = case.tensors(torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (x, residual) if tensor is not None]
    with fastgen.backend(backend):
        assert torch.autograd.gradcheck(lambda *leaves: ops.gated_unit(*leaves, activation=case.activation), leaves)


@pytest.mark.parametrize("activation", ["tanh", "none"])
def test_second_derivatives(activation):
    case = Case((2, 3, 2, 3), activation, True)
    leaves = [tensor.requires_grad_() for tensor in case.tensors(torch.float64)[:2]]
    function = lambda *leaves: ops.gated_unit(*leaves, activation=activation)  # noqa: E731
    assert torch.autograd.gradgradcheck(function, leaves)
    (first,) = torch.autograd.grad(function(*leaves).square().sum(), leaves[0], create_graph=True)
    (expected,) = torch.autograd.grad(formula(*leaves, activation).square().sum(), leaves[0], create_graph=True)
    torch.testing.assert_close(first, expected)
    seconds = (torch.autograd.grad(g.square().sum(), leaves[1])[0] for g in (first, expected))
    torch.testing.assert_close(*seconds)


@pytest.mark.parametrize("needs", [*itertools.product((False, True), repeat=2)], ids=str)
def test_only_the_gradients_asked_for(needs, monkeypatch):
    calls = []
    native_cpu = backends.native_cpu()
    monkeypatch.setattr(backends, "native_cpu", lambda: calls.append("") or native_cpu)
    x, residual, grad = CASES["3x3x5x7 tanh residual"].tensors()
    leaves = [tensor.requires_grad_(need) for tensor, need in zip((x, residual), needs, strict=True)]
    output = ops.gated_unit(*leaves)
    assert output.requires_grad == any(needs)
    if any(needs):
        output.backward(grad)
    assert [leaf.grad is not None for leaf in leaves] == list(needs)
    assert len(calls) == 1 + needs[0]


def test_only_the_input_is_saved():
    x, residual, _ = CASES["3x3x5x7 tanh residual"].tensors()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        ops.gated_unit(x, residual.requires_grad_())
    assert saved == [x.data_ptr()]


def test_gradients_are_independent_tensors():
    """The residual's is the output's gradient itself: adding to it in place must not change another."""
    x, residual, grad = CASES["3x3x5x7 tanh residual"].tensors()
    given = grad.clone()
    x.requires_grad_()
    residual.requires_grad_()
    for _ in range(2):
        ops.gated_unit(x, residual).backward(grad)
    assert torch.equal(grad, given)
    torch.testing.assert_close(residual.grad, 2 * given)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_empty_batch(backend):
    x = torch.randn(0, 6, 3, 4, requires_grad=True)
    residual = torch.randn(0, 3, 3, 4, requires_grad=True)
    with fastgen.backend(backend):
        output = ops.gated_unit(x, residual)
        output.sum().backward()
    assert output.shape == residual.grad.shape == (0, 3, 3, 4)
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend):
    x, residual, grad = CASES["3x3x5x7 tanh residual"].tensors()
    operators = torch.ops.fastgen
    with fastgen.backend(backend):
        opcheck(operators.gated_unit.default, (x, residual, "tanh"))
        opcheck(operators.gated_unit.default, (x, None, "none"))
        opcheck(operators.gated_unit_grad.default, (grad, x, "tanh"))
        opcheck(operators.gated_unit_grad.default, (grad, x, "none"))


@several_cases
def test_gradients_of_the_reference(case):
    x, residual, grad = case.tensors(torch.float64)
    with fastgen.backend("reference"):
        actual = torch.ops.fastgen.gated_unit_grad(grad, x, case.activation)
    torch.testing.assert_close(actual, run(case, formula, x, residual, grad)[1])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(dynamic):
    def function(x, residual, activation):
        return ops.gated_unit(x * 2.0, residual, activation=activation).relu()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (2, 3):
        case = Case((n, 5, 3, 4), "tanh", True)
        tensors = case.tensors()
        for ours, expected in zip(run(case, compiled, *tensors), run(case, function, *tensors), strict=True):
            torch.testing.assert_close(ours, expected)


def test_transforms():
    x, residual, _ = CASES["3x3x5x7 tanh residual"].tensors(torch.float64)
    stack = torch.stack((x, -x))
    mapped = torch.func.vmap(ops.gated_unit, (0, None))(stack, residual)
    torch.testing.assert_close(mapped, torch.stack([ops.gated_unit(x, residual) for x in stack]))
    grad = torch.func.grad(lambda x: ops.gated_unit(x, residual).square().sum())(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(formula(leaf, residual, "tanh").square().sum(), leaf)[0])
    ours, expected = (
        torch.func.jvp(f, (x,), (x.cos(),))
        for f in (lambda x: ops.gated_unit(x, residual), lambda x: formula(x, residual, "tanh"))
    )
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("activation", ["tanh", "none"])
def test_reference_traces_to_plain_aten(activation):
    x, residual, _ = CASES["3x3x5x7 tanh residual"].tensors()
    with fastgen.backend("reference"):
        graph = make_fx(lambda x: ops.gated_unit(x, residual, activation=activation))(x).graph
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert "aten.sigmoid.default" in names
    assert not any("fastgen" in name for name in names)


def test_modes_see_the_operator():
    x, residual, _ = CASES["3x3x5x7 tanh residual"].tensors()
    last = x.contiguous(memory_format=torch.channels_last)
    with FakeTensorMode() as mode:
        output = native(mode.from_tensor(x), mode.from_tensor(residual))
        assert output.shape == residual.shape
        assert output.is_contiguous()
        output = native(mode.from_tensor(last), mode.from_tensor(residual))
        assert output.is_contiguous(memory_format=torch.channels_last)


def test_autocast_and_low_precision_use_the_reference():
    x, residual, _ = CASES["3x3x5x7 tanh residual"].tensors()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.gated_unit(x, residual), formula(x, residual, "tanh"))
        assert ops.gated_unit(x.bfloat16(), residual).dtype == torch.float32
    low = x.bfloat16().requires_grad_()
    output = ops.gated_unit(low, residual.bfloat16())
    assert torch.equal(output, formula(low, residual.bfloat16(), "tanh"))
    output.sum().backward()
    assert low.grad.dtype == torch.bfloat16
    with fastgen.backend("cpu"), pytest.raises(RuntimeError, match="takes float32 and float64"):
        ops.gated_unit(low)


image, half = torch.ones(2, 6, 3, 4), torch.ones(2, 3, 3, 4)
ERRORS = {
    "input a list": (([1.0],), {}, TypeError, "input must be a tensor, got list"),
    "residual a number": ((image, 1.0), {}, TypeError, "residual must be a tensor, got float"),
    "3-d": ((torch.ones(6, 3, 4),), {}, ValueError, r"input must be \[N, 2C, H, W\].*got \[6, 3, 4\]"),
    "empty": ((torch.ones(2, 6, 0, 4),), {}, ValueError, r"without empty dimensions but N, got \[2, 6, 0, 4\]"),
    "no channels": ((torch.ones(2, 0, 3, 4),), {}, ValueError, r"got \[2, 0, 3, 4\]"),
    "odd": ((torch.ones(2, 5, 3, 4),), {}, ValueError, "input must have an even number of channels, got 5"),
    "residual": ((image, image), {}, ValueError, r"residual must be \[2, 3, 3, 4\], got \[2, 6, 3, 4\]"),
    "one residual": ((image, half[:1]), {}, ValueError, r"residual must be \[2, 3, 3, 4\], got \[1, 3, 3, 4\]"),
    "dtype": ((image, half.double()), {}, TypeError, "residual must have the dtype of the input, torch.float32"),
    "integers": ((image.int(),), {}, TypeError, "input must be of a floating dtype, got torch.int32"),
    "device": ((image, half.to("meta")), {}, ValueError, "residual must be on the device of the input, cpu, got meta"),
    "activation": ((image,), {"activation": "relu"}, ValueError, "activation must be one of tanh, none; got 'relu'"),
}


@pytest.mark.parametrize(("args", "options", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(args, options, error, message):
    with pytest.raises(error, match=message):
        ops.gated_unit(*args, **options)


OPERATOR_ERRORS = {
    "forward": ("gated_unit", (image, image, "tanh"), ValueError, "residual must be"),
    "grad": ("gated_unit_grad", (image, image, "tanh"), ValueError, r"grad must be \[2, 3, 3, 4\]"),
    "grad dtype": ("gated_unit_grad", (half.double(), image, "tanh"), TypeError, "grad must have the dtype"),
    "activation": ("gated_unit_grad", (half, image, "relu"), ValueError, "activation must be one of"),
}


@pytest.mark.parametrize(("name", "args", "error", "message"), OPERATOR_ERRORS.values(), ids=OPERATOR_ERRORS.keys())
def test_operators_check_their_arguments(name, args, error, message):
    with pytest.raises(error, match=message):
        getattr(torch.ops.fastgen, name)(*args)
