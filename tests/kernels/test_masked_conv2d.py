"""The Triton kernels of `masked_conv2d` against the reference in float64: forward, input and weight gradient."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from fastgen import ops
from fastgen.kernels import masked_conv2d as kernel
from fastgen.ops.masked_conv2d import _input_grad_reference, _weight_grad_reference, masked_conv2d_reference

# N, Cin, Cout, H, W, kernel, mask type, colours, splits
CASES = {
    "3x3 B": (2, 5, 17, 4, 6, (3, 3), "B", 1, 1),
    "7x7 A, first layer": (1, 3, 4, 5, 6, (7, 7), "A", 1, 1),
    "colours A, halves of a gated unit": (2, 6, 12, 3, 5, (3, 3), "A", 3, 2),
    "colours B, channels of several steps": (1, 37, 9, 3, 4, (3, 1), "B", 3, 1),
    "1x1 B": (3, 6, 6, 5, 4, (1, 1), "B", 3, 1),
    "1x1 A, all taps closed": (2, 3, 4, 3, 3, (1, 1), "A", 1, 1),
    "5x3 A, image smaller than the kernel": (1, 2, 3, 1, 2, (5, 3), "A", 1, 1),
    "rows of several tiles": (3, 16, 32, 9, 7, (3, 3), "B", 1, 2),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def tensors(case, dtype, device):
    count, cin, cout, height, width, size, *mask = case
    shapes = (count, cin, height, width), (cout, cin, *size), (cout,), (count, cout, height, width)
    return [torch.randn(shape).to(device=device, dtype=dtype) for shape in shapes], size, mask


def close(actual, exact):
    """Sums are float32, the result is rounded once."""
    assert actual.shape == exact.shape
    scale = max(1.0, exact.abs().max().item())
    tolerance = max(torch.finfo(actual.dtype).eps, 8 * torch.finfo(torch.float32).eps)
    assert ((actual.double() - exact).abs().max() / scale).item() <= tolerance


@cases
@DTYPES
def test_against_float64(case, dtype, device):
    (x, weight, bias, grad), size, mask = tensors(case, dtype, device)
    out = kernel.forward(x, weight, bias, *mask)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    close(out, masked_conv2d_reference(x.double(), weight.double(), bias.double(), *mask))
    close(kernel.input_gradient(grad, weight, *mask), _input_grad_reference(grad.double(), weight.double(), *mask))
    exact = _weight_grad_reference(grad.double(), x.double(), size, *mask)
    for actual, expected in zip(kernel.weight_gradients(grad, x, size, *mask), exact, strict=True):
        close(actual, expected)


def test_memory_layouts_and_biases(device):
    (x, weight, _, grad), size, mask = tensors(CASES["3x3 B"], torch.float32, device)
    strided = torch.randn(2, 5, 8, 12, device=device)[:, :, ::2, ::2].copy_(x)
    expected = kernel.forward(x, weight, None, *mask)
    assert torch.equal(
        kernel.forward(strided, weight.transpose(2, 3).contiguous().transpose(2, 3), None, *mask), expected
    )
    channels_last = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(kernel.forward(x, channels_last, None, *mask), expected)
    bias = torch.randn(34, device=device)[::2]
    expected = kernel.forward(x, weight, bias.contiguous(), *mask)
    assert torch.equal(kernel.forward(x, weight, bias, *mask), expected)
    expected = kernel.input_gradient(grad, weight, *mask)
    assert torch.equal(kernel.input_gradient(grad, channels_last, *mask), expected)
    expected = kernel.weight_gradients(grad, x, size, *mask)[0]
    assert torch.equal(kernel.weight_gradients(grad, strided, size, *mask)[0], expected)


def test_an_image_is_the_same_in_every_batch(device):
    (x, weight, bias, grad), _, mask = tensors(CASES["rows of several tiles"], torch.float32, device)
    assert torch.equal(kernel.forward(x[2:], weight, bias, *mask), kernel.forward(x, weight, bias, *mask)[2:])
    assert torch.equal(kernel.input_gradient(grad[2:], weight, *mask), kernel.input_gradient(grad, weight, *mask)[2:])


def test_the_weight_gradient_is_split(device, monkeypatch):
    from fastgen.kernels import tap_gemm

    monkeypatch.setattr(tap_gemm, "_SPLIT_ROWS", 50)
    (x, _, _, grad), size, mask = tensors(CASES["rows of several tiles"], torch.float32, device)
    exact = _weight_grad_reference(grad.double(), x.double(), size, *mask)
    close(kernel.weight_gradients(grad, x, size, *mask)[0], exact[0])


def test_empty_batch(device):
    (x, weight, bias, grad), size, mask = tensors(CASES["3x3 B"], torch.float32, device)
    assert kernel.forward(x[:0], weight, bias, *mask).shape == (0, 17, 4, 6)
    assert kernel.input_gradient(grad[:0], weight, *mask).shape == (0, 5, 4, 6)
    assert all(not grad.any() for grad in kernel.weight_gradients(grad[:0], x[:0], size, *mask))


def test_as_a_backend(device, triton_backend):
    (x, weight, bias, _), _, (mask_type, *options) = tensors(CASES["3x3 B"], torch.float32, device)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [value.to(dtype).requires_grad_() for value in (x, weight, bias)]
        if dtype == torch.float32:
            out = ops.masked_conv2d(*leaves, mask_type=mask_type)
        else:
            out = masked_conv2d_reference(*leaves, mask_type, *options)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


def test_opcheck(device, triton_backend):
    (x, weight, bias, grad), size, mask = tensors(CASES["3x3 B"], torch.float32, device)
    opcheck(torch.ops.fastgen.masked_conv2d.default, (x, weight, bias, *mask))
    opcheck(torch.ops.fastgen.masked_conv2d_input_grad.default, (grad, weight, *mask))
    opcheck(torch.ops.fastgen.masked_conv2d_weight_grad.default, (grad, x, list(size), *mask))
