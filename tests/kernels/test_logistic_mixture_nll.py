"""The Triton kernels of `logistic_mixture_nll` against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck

from fastgen import ops
from fastgen.kernels import logistic_mixture_nll as kernel
from fastgen.ops.logistic_mixture_nll import _grad_reference, logistic_mixture_nll_reference
from tests.ops.test_logistic_mixture_nll import CASES, Case, all_cases, rms


def run(case, params, images, grad, device):
    params, images, grad = (tensor.to(device) for tensor in (params, images, grad))
    nll = kernel.forward(params, images, case.levels)
    return nll.cpu(), kernel.backward(grad, params, images, case.levels).cpu()


def reference(case, params, images, grad):
    args = (params, images, case.levels)
    return logistic_mixture_nll_reference(*args), _grad_reference(grad.to(params.dtype), *args)


@all_cases
def test_float32_is_as_accurate_as_pytorch(case, device):
    params, images, grad = case.tensors()
    truth = reference(case, params.double(), images, grad)
    plain, triton = reference(case, params, images, grad), run(case, params, images, grad, device)
    for name, exact, theirs, ours in zip(("nll", "gradient"), truth, plain, triton, strict=True):
        error, allowed = rms(ours - exact), max(2 * rms(theirs - exact), 2**-23 * rms(exact))
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["grey", "rgb"])
def test_lower_precisions_are_read_and_written(name, dtype, device):
    case = CASES[name]
    params, images, grad = case.tensors()
    params = params.to(dtype)
    nll, gradient = run(case, params, images, grad, device)
    exact, exact_gradient = reference(case, params.double(), images, grad)
    assert nll.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(nll.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("layout", ["channels last", "transposed", "expanded"])
def test_layouts(layout, device):
    case = CASES["17 levels"]
    params, images, grad = (tensor.to(device) for tensor in case.tensors())
    if layout == "channels last":
        given = [t.contiguous(memory_format=torch.channels_last) for t in (params, images)] + [grad]
    elif layout == "transposed":
        given = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (params, images, grad)]
    else:
        params, grad = params[:, :, :1].expand_as(params), grad[:1].expand_as(grad)
        given = [params, images, grad]
        params, grad = params.contiguous(), grad.contiguous()
    expected = run(case, params, images, grad, device)
    for actual, plain in zip(run(case, *given, device), expected, strict=True):
        torch.testing.assert_close(actual, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("value", [-1e38, 80.0, 1e38])
def test_extremes_are_finite(channels, value, device):
    case = Case(channels, 2, 256, 1, (2, 3))
    for kind in range(case.count):
        params, images, grad = case.tensors()
        params[:, kind] = value
        images[..., 0] = 255
        assert all(result.isfinite().all() for result in run(case, params, images, grad, device)), kind


@pytest.mark.parametrize("level", [0, 3, 16])
def test_nan_stays_nan(level, device):
    case = CASES["17 levels"]
    params, images, grad = case.tensors()
    images[0, :, 0] = level
    for column, channel in enumerate(range(0, params.shape[1], 3)):
        params[0, channel, 0, column % params.shape[3]] = torch.nan
    nll, gradient = run(case, params, images, grad, device)
    exact, _ = reference(case, params, images, grad)
    assert exact.isnan().any() and torch.equal(nll.isnan(), exact.isnan())
    assert gradient[exact.isnan()[:, None].expand_as(gradient)].isnan().any()


def test_a_level_out_of_range_gives_nan(device):
    case = Case(3, 2, 5, 1, (2, 2))
    params, images, grad = case.tensors()
    images[0, 1, 0, 1] = 5
    nll, _ = run(case, params, images, grad, device)
    assert nll.isnan().tolist() == [[[False, True], [False, False]]]


@pytest.mark.parametrize("far", ["pixels", "parameters"])
def test_offsets_of_an_image_beyond_32_bits(far, device, tmp_path):
    """Elements lie far apart in a file, most of which takes no place on the disk."""
    case = Case(1, 2, 256, 1)
    params, images, grad = case.tensors()
    params, images, grad = params[..., :1, :3].bfloat16(), images[..., :1, :3].contiguous(), grad[..., :1, :3]
    shape, step = params.shape, 2**30 + 1 if far == "pixels" else 2**29
    strides = (0, 1, 0, step) if far == "pixels" else (0, step, 0, 1)
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    assert size > 2**31
    if device == "cpu":
        apart, out = (
            torch.from_file(str(tmp_path / name), True, size, dtype=torch.bfloat16).as_strided(shape, strides)
            for name in ("parameters", "gradient")
        )
    else:
        apart, out = (torch.empty_strided(shape, strides, dtype=torch.bfloat16, device=device) for _ in range(2))
    apart.copy_(params)
    exact, exact_gradient = reference(case, params.double(), images, grad)
    nll = kernel.forward(apart, images.to(device), 256)
    torch.testing.assert_close(nll.cpu().double(), exact, rtol=1e-5, atol=1e-5)
    kernel.backward(grad.to(device), apart, images.to(device), 256, out)
    torch.testing.assert_close(out.cpu().double(), exact_gradient, rtol=2**-7, atol=1e-5)


def test_empty(device):
    case = Case(3, 2, 256, 0)
    nll, gradient = run(case, *case.tensors(), device)
    assert nll.shape == (0, 5, 7) and gradient.shape == (0, 20, 5, 7)


def test_as_a_backend(device, triton_backend):
    case = CASES["17 levels"]
    params, images, _ = (tensor.to(device) for tensor in case.tensors())
    leaf = params.requires_grad_()
    nll = ops.logistic_mixture_nll(leaf, images, levels=case.levels)
    (gradient,) = torch.autograd.grad(nll.mean(), leaf)
    exact = params.detach().cpu().double().requires_grad_()
    expected = logistic_mixture_nll_reference(exact, images.cpu(), case.levels)
    torch.testing.assert_close(nll.detach().cpu().double(), expected.detach(), rtol=1e-5, atol=1e-5)
    (expected,) = torch.autograd.grad(expected.mean(), exact)
    torch.testing.assert_close(gradient.cpu().double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_assumed_gradient_changes_no_bit(channels, device, triton_backend):
    """Assumed nothing, right, wrong everywhere, wrong for one image; and the second backward pass of a graph."""
    case = Case(channels, 2, 256, 5)  # ten tiles, more than a program compares
    params, images, _ = (tensor.to(device) for tensor in case.tensors())
    params.requires_grad_()
    one_image = torch.ones(case.batch, 1, 1, device=device)
    one_image[-1] = 0.5
    for weight in (one_image * 0 + 2.0, 2.0 * one_image / one_image, 3.0 * one_image / one_image, 3.0 * one_image):
        nll = ops.logistic_mixture_nll(params, images, levels=case.levels)
        grad = weight.expand_as(nll)
        expected = kernel.backward(grad, params.detach(), images, case.levels)
        for _ in range(2):
            (gradient,) = torch.autograd.grad(nll, params, grad, retain_graph=True)
            assert torch.equal(gradient, expected)
            gradient.zero_()


def test_training_gives_the_bits_of_the_forward_pass(device, triton_backend):
    case = CASES["rgb"]
    params, images, _ = (tensor.to(device) for tensor in case.tensors())
    expected = ops.logistic_mixture_nll(params, images)
    assert torch.equal(ops.logistic_mixture_nll(params.requires_grad_(), images).detach(), expected)


def test_mass_of_all_levels_is_one(device):
    params = torch.randn(1, 9, 1, 256, device=device)[..., :1].expand(-1, -1, -1, 256)
    images = torch.arange(256, device=device).view(1, 1, 1, 256).to(torch.uint8)
    assert kernel.forward(params, images, 256).neg().exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert math.isfinite(kernel.forward(params, images, 256).max())


def test_opcheck(device, triton_backend):
    params, images, grad = (tensor.to(device) for tensor in CASES["17 levels"].tensors())
    opcheck(torch.ops.fastgen.logistic_mixture_nll.default, (params, images, 17))
    opcheck(torch.ops.fastgen.logistic_mixture_nll_grad.default, (grad, params, images, 17))
