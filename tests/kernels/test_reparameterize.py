"""The Triton kernels of `reparameterize`: noise bit for bit, values and gradients against the reference."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from fastgen import ops
from fastgen.kernels import reparameterize as kernel
from fastgen.ops.normal import normals_reference
from fastgen.ops.reparameterize import MAX_LOGVAR, _grad_reference, reparameterize_reference

SIZES = pytest.mark.parametrize(
    ("shape", "draws"), [((1,), 3), ((64, 2), 0), ((256, 4), 2), ((7, 13), 2), ((3, 2, 5, 3), 1), ((2, 1025), 0)]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
OPTIONS = (2**63 + 3, 2**40 + 5)  # seed, start


def parameters(shape, dtype=torch.float32):
    mu, logvar = torch.randn(2, *shape, dtype=torch.float64)
    return mu.to(dtype), (2 * logvar - 1).to(dtype)


def close(actual, exact, dtype=torch.float32):
    """Within a few units in the last place of the largest number; numbers are of the order of 1."""
    assert actual.shape == exact.shape
    error = (actual.cpu().double() - exact).abs().max() / exact.abs().max().clamp(min=1)
    assert error <= 4 * torch.finfo(dtype).eps


@SIZES
@DTYPES
def test_values(shape, draws, dtype, device):
    mu, logvar = parameters(shape, dtype)
    exact = reparameterize_reference(mu.double(), logvar.double(), *OPTIONS, draws)
    for actual, expected in zip(kernel.forward(mu.to(device), logvar.to(device), *signed(draws)), exact, strict=True):
        assert actual.dtype == torch.float32
        close(actual, expected)


@SIZES
@pytest.mark.parametrize("which", ["z", "kl", "both"])
def test_gradients(shape, draws, which, device):
    mu, logvar = parameters(shape)
    grad_z = torch.randn(*([draws] if draws else []), *shape) if which != "kl" else None
    grad_kl = torch.randn(shape[0]) if which != "z" else None
    doubles = [None if grad is None else grad.double() for grad in (grad_z, grad_kl)]
    exact = _grad_reference(*doubles, mu.double(), logvar.double(), *OPTIONS, draws)
    on_device = [None if value is None else value.to(device) for value in (grad_z, grad_kl, mu, logvar)]
    for actual, expected in zip(kernel.backward(*on_device, *signed(draws)), exact, strict=True):
        close(actual, expected)


def signed(draws):
    seed, start = OPTIONS
    return seed - 2**64, start, draws


@pytest.mark.parametrize(("seed", "start"), [(0, 0), (1, 1), (5, 2**62 - 100), (2**64 - 1, 2**32 - 3)])
def test_noise_has_the_bits_of_the_reference(seed, start, device):
    mu = torch.zeros(6, 21, device=device)
    z, _ = kernel.forward(mu, mu, seed - 2**64 if seed >= 2**63 else seed, start, 2)
    for draw in range(2):
        assert torch.equal(z[draw].cpu(), normals_reference(6, 21, seed, start, draw))


def test_a_sample_depends_on_its_index_alone(device):
    mu, logvar = (value.to(device) for value in parameters((9, 70)))
    z, kl = kernel.forward(mu, logvar, 3, 0, 2)
    for first, last in ((0, 1), (4, 9), (2, 3)):
        part, part_kl = kernel.forward(mu[first:last], logvar[first:last], 3, first, 2)
        assert torch.equal(part, z[:, first:last])
        assert torch.equal(part_kl, kl[first:last])


def test_halves_of_a_tensor_and_transposed_ones(device):
    both = torch.randn(5, 12, device=device)
    mu, logvar = both.chunk(2, 1)
    expected = kernel.forward(mu.contiguous(), logvar.contiguous(), 1, 0, 0)
    for pair in ((mu, logvar), (mu.T.contiguous().T, logvar)):
        assert all(map(torch.equal, kernel.forward(*pair, 1, 0, 0), expected))


def test_large_and_small_logvar(device):
    mu = torch.zeros(1, 8, device=device)
    logvar = torch.tensor([[-1e30, -200, -80, 0, 1e-6, 79, 81, 1e30]], device=device)
    z, kl = kernel.forward(mu, logvar, 0, 0, 0)
    assert z.isfinite().all() and kl.isfinite().all()
    grads = kernel.backward(torch.ones_like(mu), torch.ones(1, device=device), mu, logvar, 0, 0, 0)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[1][logvar > MAX_LOGVAR] == 0).all()


def test_nan_stays_nan(device):
    mu, logvar = parameters((5, 6))
    mu[0, 1] = logvar[2, 3] = torch.nan
    for i, expected in enumerate(reparameterize_reference(mu, logvar, *OPTIONS, 0)):
        actual = kernel.forward(mu.to(device), logvar.to(device), *signed(0))[i].cpu()
        assert torch.equal(actual.isnan(), expected.isnan())
    grads = torch.ones(5, 6), torch.ones(5)
    exact = _grad_reference(*grads, mu, logvar, *OPTIONS, 0)
    given = [value.to(device) for value in (*grads, mu, logvar)]
    for actual, expected in zip(kernel.backward(*given, *signed(0)), exact, strict=True):
        assert torch.equal(actual.cpu().isnan(), expected.isnan())


def test_divergence_near_the_prior_keeps_its_digits(device):
    logvar = torch.full((1, 1), 1e-4, device=device)
    _, kl = kernel.forward(torch.zeros_like(logvar), logvar, 0, 0, 0)
    assert kl.item() == pytest.approx(0.25e-8, rel=1e-4)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty(shape, device):
    mu = torch.empty(shape, device=device)
    z, kl = kernel.forward(mu, mu, 0, 0, 2)
    assert z.shape == (2, *shape) and kl.tolist() == [0] * shape[0]
    assert kernel.backward(None, kl, mu, mu, 0, 0, 2)[0].shape == shape


def test_as_a_backend(device, triton_backend):
    mu, logvar = (value.to(device).requires_grad_() for value in parameters((4, 6)))
    z, kl = ops.reparameterize(mu, logvar, seed=3, num_samples=2)
    grads = torch.autograd.grad(z.sum() + kl.sum(), (mu, logvar))
    exact = [value.detach().cpu().double().requires_grad_() for value in (mu, logvar)]
    z, kl = reparameterize_reference(*exact, 3, 0, 2)
    for actual, expected in zip(grads, torch.autograd.grad(z.sum() + kl.sum(), exact), strict=True):
        close(actual, expected)


def test_opcheck(device, triton_backend):
    mu, logvar = (value.to(device) for value in parameters((3, 5)))
    opcheck(torch.ops.fastgen.reparameterize.default, (mu, logvar, 3, 0, 2))
    opcheck(torch.ops.fastgen.reparameterize_grad.default, (None, mu[:, 0], mu, logvar, 3, 0, 0))


@pytest.mark.gpu
def test_more_parts_than_an_axis_of_the_grid_takes():
    zeros = torch.zeros(1, 65_535 * 1024 + 5)
    expected, _ = ops.reparameterize(zeros, zeros, seed=3)
    z, _ = kernel.forward(zeros.cuda(), zeros.cuda(), 3, 0, 0)
    torch.testing.assert_close(z.cpu(), expected)
