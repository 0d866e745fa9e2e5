"""The Triton kernels of `concat_elu`: values and gradients against float64, dropout bit for bit, layouts, autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck

import fastgen
from fastgen import ops
from fastgen.kernels import concat_elu as kernel
from fastgen.kernels import rows
from fastgen.ops.concat_elu import concat_elu_reference
from tests.kernels.common import FAR, as_accurate, far_rows
from tests.kernels.conftest import INTERPRETED

FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
PLANES, LAST = torch.contiguous_format, torch.channels_last
SEED = 2**62 + 12345
SHAPES = {  # by what a draw serves
    "one": [(1, 1, 1, 1)],
    "pairs": [(2, 20, 3, 3), (2, 12, 3, 3)],
    "quads": [(1, 4, 3, 5), (1, 36, 3, 5)],
    "features": [(2, 33, 3, 2), (2, 16, 3, 2), (2, 1, 3, 2)],
}
CASES = [  # shapes, dtype, layout, negate, dropout; few, for each is compiled on a GPU
    *((shapes, FLOAT, PLANES, True, 0.0) for shapes in SHAPES),
    *((shapes, FLOAT, LAST, True, 0.3) for shapes in SHAPES),
    *((shapes, FLOAT, PLANES, False, 0.3) for shapes in SHAPES),
    ("quads", FLOAT, LAST, True, 0.0),
    ("quads", FLOAT, PLANES, False, 0.0),
    *((shapes, dtype, LAST, True, 0.3) for shapes in ("pairs", "features") for dtype in (HALF, BFLOAT)),
    *(("quads", dtype, PLANES, True, 0.0) for dtype in (HALF, BFLOAT)),
]


def tensors(shapes, dtype=torch.float32, layout=PLANES):
    return [(2 * torch.randn(shape)).to(dtype).contiguous(memory_format=layout) for shape in shapes]


def run(forward, backward, inputs, grad, *options):
    return [forward(inputs, *options), *backward(grad, inputs, *options)]


def reference_grads(grad, inputs, *options):
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(concat_elu_reference(leaves, *options), leaves, grad)


@pytest.mark.parametrize(("shapes", "dtype", "layout", "negate", "dropout"), CASES, ids=str)
def test_against_float64(shapes, dtype, layout, negate, dropout, device):
    inputs = tensors(SHAPES[shapes], dtype, layout)
    options = (negate, dropout, SEED)
    grad = torch.randn_like(concat_elu_reference(inputs, *options))
    plain = run(concat_elu_reference, reference_grads, inputs, grad, *options)
    exact = run(concat_elu_reference, reference_grads, [x.double() for x in inputs], grad.double(), *options)
    ours = run(kernel.forward, kernel.backward, [x.to(device) for x in inputs], grad.to(device), *options)
    for actual, theirs, truth in zip(ours, plain, exact, strict=True):
        as_accurate(actual, theirs, truth)


def test_relative_error_over_all_magnitudes(device):
    """Of what is far below one too."""
    at = torch.cat([torch.logspace(-30, 1.9, 300), torch.linspace(0.01, 80, 300)])
    x = torch.cat([at, -at]).view(1, 1, 40, 30)
    exact = x.double()
    for actual, expected in (
        (kernel.forward([x.to(device)], True, 0.0, 0)[:, :1], torch.where(exact > 0, exact, torch.expm1(exact))),
        (kernel.backward(torch.ones_like(x).to(device), [x.to(device)], False, 0.0, 0)[0], exact.clamp(max=0).exp()),
    ):
        assert ((actual.cpu().double() - expected) / expected).abs().max() <= 4 * 2**-23


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("negate", [True, False])
def test_what_is_dropped_is_what_the_cpu_drops(shapes, negate, device, monkeypatch):
    """Bit for bit, in the forward and in the backward pass."""
    inputs, options = [torch.ones(shape) for shape in shapes], (negate, 0.4, SEED)
    with fastgen.backend("cpu"):
        output = torch.ops.fastgen.concat_elu(inputs, *options)
        grads = torch.ops.fastgen.concat_elu_grad(torch.ones_like(output), inputs, *options)
    inputs = [x.to(device) for x in inputs]
    for tile in (1024, 256) if INTERPRETED else (1024,):
        monkeypatch.setattr(rows, "_TILE", tile)
        assert torch.equal(kernel.forward(inputs, *options).cpu() == 0, output == 0)
        # Of a gradient each of the four ways to drop a feature and its negative has another value.
        for actual, expected in zip(
            kernel.backward(torch.ones_like(output).to(device), inputs, *options), grads, strict=True
        ):
            torch.testing.assert_close(actual.cpu(), expected)


@pytest.mark.parametrize("area", [(1, 1), (1, 3), (17, 9)], ids=str)
@pytest.mark.parametrize("seed", [0, 2**32 + 1, 2**63 - 1])
def test_pixels_samples_and_seeds(area, seed, device):
    """Rows of a tile may be of several samples."""
    x, options = torch.ones(40, 2, *area), (False, 0.5, seed)
    expected = concat_elu_reference([x], *options)
    assert torch.equal(kernel.forward([x.to(device)], *options).cpu() == 0, expected == 0)


def test_special_values(device):
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-30, -1e-30, -200.0, 200.0]).view(1, 9, 1, 1)
    options, grad = (True, 0.0, 0), torch.ones(1, 18, 1, 1)
    expected = run(concat_elu_reference, reference_grads, [x], grad, *options)
    actual = run(kernel.forward, kernel.backward, [x.to(device)], grad.to(device), *options)
    torch.testing.assert_close(actual[0].cpu(), expected[0], equal_nan=True)
    slopes, nan = actual[1].cpu(), x.isnan()  # where PyTorch's slope depends on the instruction set
    assert slopes[nan].isnan().all()
    torch.testing.assert_close(slopes[~nan], expected[1][~nan])


def test_what_is_dropped_is_zero_whatever_it_was(device):
    x = torch.tensor([math.nan, math.inf]).repeat(32).view(1, 64, 1, 1).to(device)
    options = (True, 0.5, 1)
    y, kept = kernel.forward([x], *options), kernel.forward([torch.ones_like(x)], *options) != 0
    assert (y[~kept] == 0).all()
    assert (y[kept].isnan() | y[kept].isinf() | (y[kept] == -2)).all()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_memory_layouts_and_tiles(dropout, device, monkeypatch):
    """The same bits; contiguous in memory if all inputs are and nothing is dropped, or else channels-last."""
    x, y = (value.to(device) for value in tensors([(2, 8, 3, 5), (2, 24, 3, 5)]))
    options = (True, dropout, SEED)
    grad = torch.randn(2, 64, 3, 5, device=device)
    expected = run(kernel.forward, kernel.backward, [x, y], grad, *options)
    assert expected[0].is_contiguous() == (not dropout)
    monkeypatch.setattr(rows, "_TILE", 128)
    last = [value.contiguous(memory_format=LAST) for value in (x, y)]
    sliced = torch.stack((x, -x), dim=-1).flatten(3)[..., ::2]
    other = grad.transpose(2, 3).contiguous().transpose(2, 3)
    for inputs in ([x, y], last, [sliced, y], [x, last[1]]):
        actual = run(kernel.forward, kernel.backward, inputs, other, *options)
        assert all(map(torch.equal, actual, expected))
        kept = PLANES if inputs[0] is x and inputs[1] is y and not dropout else LAST
        assert all(value.is_contiguous(memory_format=kept) for value in actual)


@pytest.mark.skipif(not INTERPRETED, reason="it takes memory that is nowhere")
def test_far_offsets():
    """The first columns of rows that are too long for offsets of 32 bits."""
    (x, of_x), (out, of_out), (grad, of_grad) = map(far_rows, (1, 2, 1))
    options = {"seed": 0, "dropped": 0, "scale": 1.0, "area": FAR, "blocks": 8, "first": 0, "width": FAR}
    # Of a row of tiles only the first is launched.
    options |= {"rows": 3, "columns": FAR, "tiles": 1, "DRAWN": "nothing", "NEGATE": True, "ROWS": 1, "COLUMNS": 32}
    kernel._forward[lambda _: (3,)](x, out, **options)
    small = of_x.reshape(3, 32, 1, 1)
    output = kernel.forward([small], True, 0.0, 0)
    assert torch.equal(of_out.reshape(output.shape), output)
    kernel._backward[lambda _: (3,)](out, x, grad, **options)
    assert torch.equal(of_grad.reshape(small.shape), kernel.backward(output, [small], True, 0.0, 0)[0])


def test_as_a_backend(device, triton_backend):
    """In autograd; a gradient that is to be differentiated is plain PyTorch."""
    leaves = [x.to(device).requires_grad_() for x in tensors([(2, 5, 3, 4), (2, 3, 3, 4)])]
    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    output = ops.concat_elu(*leaves, dropout=0.3, seed=SEED)
    assert type(output.grad_fn).__name__ == "_ConcatEluBackward"
    expected = concat_elu_reference(exact, True, 0.3, SEED)
    grad = torch.randn(output.shape)
    grads = torch.autograd.grad(output, leaves, grad.to(device))
    truth = torch.autograd.grad(expected, exact, grad.double())
    for actual, value in zip((output, *grads), (expected, *truth), strict=True):
        torch.testing.assert_close(actual.detach().cpu().double(), value.detach(), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(ops.concat_elu(*leaves, dropout=0.3, seed=SEED), output)
    seconds = []
    for of, function in (
        (leaves, lambda *x: ops.concat_elu(*x, dropout=0.3, seed=SEED)),
        (exact, lambda *x: concat_elu_reference(x, True, 0.3, SEED)),
    ):
        (first,) = torch.autograd.grad(function(*of).square().sum(), of[0], create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), of[0])[0].cpu().double())
    torch.testing.assert_close(*seconds, rtol=1e-5, atol=1e-5)


def test_without_a_seed_the_generator_decides(device, triton_backend):
    x = torch.randn(2, 8, 4, 5, device=device)
    torch.manual_seed(3)
    first, second = ops.concat_elu(x, dropout=0.5), ops.concat_elu(x, dropout=0.5)
    torch.manual_seed(3)
    seed = int(torch.randint(2**63 - 1, ()))
    assert torch.equal(ops.concat_elu(x, dropout=0.5, seed=seed), first)
    assert not torch.equal(first, second)


def test_many_features(device, triton_backend):
    """More than the CPU kernel has room for."""
    x = torch.ones(1, 4100, 1, 1)
    expected = concat_elu_reference([x], True, 0.5, SEED)
    assert torch.equal(ops.concat_elu(x.to(device), dropout=0.5, seed=SEED).cpu() == 0, expected == 0)


def test_empty_batch(device, triton_backend):
    x = torch.empty(0, 3, 4, 5, device=device, requires_grad=True)
    output = ops.concat_elu(x, x, dropout=0.5, seed=0)
    output.sum().backward()
    assert output.shape == (0, 12, 4, 5) and x.grad.shape == x.shape


def test_what_it_does_not_take(device):
    x = torch.randn(1, 4, 2, 2, device=device)
    with fastgen.backend("triton"), pytest.raises(RuntimeError, match=r"float32, float16 and bfloat16, got .*float64"):
        ops.concat_elu(x.double())
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(ops.concat_elu(x), concat_elu_reference([x], True, 0.0, 0))
        with fastgen.backend("triton"), pytest.raises(RuntimeError, match="autocast is on"):
            ops.concat_elu(x)


def test_opcheck(device, triton_backend):
    inputs = [x.to(device) for x in tensors([(2, 3, 4, 5), (2, 2, 4, 5)])]
    grad = torch.randn(2, 10, 4, 5, device=device)
    opcheck(torch.ops.fastgen.concat_elu.default, (inputs, True, 0.5, 3))
    opcheck(torch.ops.fastgen.concat_elu.default, (inputs, False, 0.0, 0))
    opcheck(torch.ops.fastgen.concat_elu_grad.default, (grad, inputs, True, 0.5, 3))
    opcheck(torch.ops.fastgen.concat_elu_grad.default, (grad, inputs, True, 0.0, 0))
