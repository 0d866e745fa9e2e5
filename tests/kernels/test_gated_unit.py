"""The Triton kernels of `gated_unit`: values and gradients against float64, layouts, extremes, far offsets."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

import fastgen
from fastgen import ops
from fastgen.kernels import gated_unit as kernel
from fastgen.kernels import rows
from fastgen.ops.gated_unit import gated_unit_reference
from tests.kernels.common import FAR, as_accurate, far_rows
from tests.kernels.conftest import INTERPRETED

FLOAT, PLANES, LAST = torch.float32, torch.contiguous_format, torch.channels_last
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (3, 33, 3, 2), (2, 64, 5, 4), (1, 160, 3, 5)]  # of the output
CASES = [  # shape, dtype, layout; few, for each is compiled on a GPU
    *((shape, FLOAT, layout) for shape in SHAPES for layout in (PLANES, LAST)),
    *((SHAPES[1], dtype, PLANES) for dtype in (torch.float16, torch.bfloat16)),
    *((SHAPES[3], dtype, LAST) for dtype in (torch.float16, torch.bfloat16)),
]
ACTIVATIONS = pytest.mark.parametrize("activation", ["tanh", "none"])


def tensors(shape, dtype, layout=PLANES):
    """input, residual, grad."""
    n, channels, *size = shape
    made = 2 * torch.randn(n, 2 * channels, *size), torch.randn(shape), torch.randn(shape)
    return [x.to(dtype).contiguous(memory_format=layout) for x in made]


def gradient(x, activation, grad):
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(gated_unit_reference(leaf, None, activation), leaf, grad)[0]


@pytest.mark.parametrize(("shape", "dtype", "layout"), CASES, ids=str)
@ACTIVATIONS
def test_against_float64(shape, dtype, layout, activation, device):
    x, residual, grad = tensors(shape, dtype, layout)
    if activation == "tanh":
        residual = None
    doubles = [None if value is None else value.double() for value in (x, residual, grad)]
    on_device = [None if value is None else value.to(device) for value in (x, residual, grad)]
    theirs, exact = (gated_unit_reference(*of, activation) for of in ((x, residual), doubles[:2]))
    as_accurate(kernel.forward(*on_device[:2], activation), theirs, exact)
    ours = kernel.backward(on_device[2], on_device[0], activation)
    as_accurate(ours, gradient(x, activation, grad), gradient(doubles[0], activation, doubles[2]))


@ACTIVATIONS
def test_relative_error_over_all_magnitudes(activation, device):
    """Of what is far below one too, as slopes are where the functions saturate."""
    at = torch.cat([torch.logspace(-30, 1.6, 30), torch.linspace(0.01, 40, 40)])
    at = torch.cat([-at.flip(0), at])
    a, b = at.repeat(len(at), 1), at[:, None].repeat(1, len(at))
    x = torch.stack((a, b))[None].to(device)
    output = kernel.forward(x, None, activation).cpu()
    grad = kernel.backward(torch.ones_like(x[:, :1]), x, activation).cpu()
    a, b = a.double(), b.double()
    act, slope = (a, 1.0) if activation == "none" else (torch.tanh(a), torch.cosh(a) ** -2)
    gate = torch.sigmoid(b)
    for actual, exact in (
        (output[0, 0], act * gate),
        (grad[0, 0], slope * gate),
        (grad[0, 1], act * gate * torch.sigmoid(-b)),
    ):
        relative = (actual.double() - exact).abs() / exact.abs().clamp(min=2**-124)  # smaller ones are flushed
        assert relative.max() <= 10 * 2**-23


@ACTIVATIONS
def test_what_is_not_a_number(activation, device):
    """Every pair of halves of NaN, infinities and others gives what PyTorch gives, and so do the slopes."""
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -2.0])
    a, b = values.repeat(len(values), 1), values[:, None].repeat(1, len(values))
    x = torch.stack((a, b))[None].repeat(3, 1, 1, 1)
    residual, grad = torch.randn(2, 3, 1, *a.shape)
    residual[2], grad[2] = torch.nan, torch.inf
    ours = kernel.forward(x.to(device), residual.to(device), activation)
    torch.testing.assert_close(ours.cpu(), gated_unit_reference(x, residual, activation), equal_nan=True)
    ours = kernel.backward(grad.to(device), x.to(device), activation)
    torch.testing.assert_close(ours.cpu(), gradient(x, activation, grad), equal_nan=True)


def test_memory_layouts_and_tiles(device, monkeypatch):
    """The same bits; contiguous in memory as the input, or else channels-last."""
    x, residual, grad = (value.to(device) for value in tensors((3, 40, 5, 7), torch.float32))
    expected = kernel.forward(x, residual, "tanh"), kernel.backward(grad, x, "tanh")
    monkeypatch.setattr(rows, "_TILE", 128)
    last = x.contiguous(memory_format=LAST)
    strided = torch.stack((x, -x), dim=-1).flatten(3)[..., ::2]
    other = grad.transpose(2, 3).contiguous().transpose(2, 3)
    for arranged, kept in ((x, True), (last, False), (strided, False)):
        actual = kernel.forward(arranged, residual, "tanh"), kernel.backward(other, arranged, "tanh")
        assert all(map(torch.equal, actual, expected))
        assert all(value.is_contiguous() == kept for value in actual)
        assert all(value.is_contiguous(memory_format=torch.channels_last) != kept for value in actual)


@pytest.mark.skipif(not INTERPRETED, reason="it takes memory that is nowhere")
def test_far_offsets():
    """The first columns of rows that are too long for offsets of 32 bits."""
    (x, of_x), (half, of_half), (out, of_out), (grad, of_grad) = map(far_rows, (2, 1, 1, 2))
    # Of a row of tiles only the first is launched.
    sizes = {"rows": 3, "columns": FAR, "tiles": 1, "TANH": True, "ROWS": 1, "COLUMNS": 32}
    kernel._forward[lambda _: (3,)](x, half, out, **sizes)
    kernel._backward[lambda _: (3,)](half, x, grad, **sizes)
    small, residual = of_x.reshape(3, 64, 1, 1), of_half.reshape(3, 32, 1, 1)
    assert torch.equal(of_out.reshape(residual.shape), kernel.forward(small, residual, "tanh"))
    assert torch.equal(of_grad.reshape(small.shape), kernel.backward(residual, small, "tanh"))


def test_as_a_backend(device, triton_backend):
    """In autograd; a gradient that is to be differentiated is plain PyTorch."""
    x, residual, grad = (value.to(device) for value in tensors((2, 5, 3, 4), torch.float32))
    leaves = [x.requires_grad_(), residual.requires_grad_()]
    output = ops.gated_unit(*leaves)
    assert type(output.grad_fn).__name__ == "_GatedUnitBackward"
    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    expected = gated_unit_reference(*exact, "tanh")
    grads, truth = torch.autograd.grad(output, leaves, grad), torch.autograd.grad(expected, exact, grad.cpu().double())
    for actual, value in zip((output, *grads), (expected, *truth), strict=True):
        torch.testing.assert_close(actual.detach().cpu().double(), value.detach(), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(ops.gated_unit(x, residual), output)
    seconds = []
    for leaf, function in ((x, ops.gated_unit), (exact[0], lambda x: gated_unit_reference(x, None, "tanh"))):
        (first,) = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), leaf)[0].cpu().double())
    torch.testing.assert_close(*seconds, rtol=1e-5, atol=1e-5)


def test_empty_batch(device, triton_backend):
    x = torch.empty(0, 6, 3, 4, device=device, requires_grad=True)
    output = ops.gated_unit(x, x[:, :3])
    output.sum().backward()
    assert output.shape == (0, 3, 3, 4) and x.grad.shape == x.shape


def test_what_it_does_not_take(device):
    x = torch.randn(1, 4, 2, 2, device=device)
    with fastgen.backend("triton"), pytest.raises(RuntimeError, match=r"float32, float16 and bfloat16, got .*float64"):
        ops.gated_unit(x.double())
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(ops.gated_unit(x), gated_unit_reference(x, None, "tanh"))
        with fastgen.backend("triton"), pytest.raises(RuntimeError, match="autocast is on"):
            ops.gated_unit(x)


def test_opcheck(device, triton_backend):
    x, residual, grad = (value.to(device) for value in tensors((2, 3, 4, 5), torch.float32))
    last = x.contiguous(memory_format=LAST)
    opcheck(torch.ops.fastgen.gated_unit.default, (x, residual, "tanh"))
    opcheck(torch.ops.fastgen.gated_unit.default, (last, None, "none"))
    opcheck(torch.ops.fastgen.gated_unit_grad.default, (grad, x, "tanh"))
    opcheck(torch.ops.fastgen.gated_unit_grad.default, (grad, last, "none"))
