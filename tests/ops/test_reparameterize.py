"""Reparameterised samples and their divergence: values, gradients, noise that depends on (seed, sample, draw) alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import fastgen
from fastgen import ops
from fastgen.ops.reparameterize import MAX_LOGVAR, reparameterize_reference
from tests.instruction_sets import FUSED, chosen

SHAPES = [(1,), (5, 1), (3, 20), (64, 2), (7, 13), (2, 1025), (3, 2, 5, 3), (33, 64), (1, 4097)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
draws = pytest.mark.parametrize("num_samples", [None, 1, 3])


def parameters(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    mu, logvar = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return mu.to(dtype), (2 * logvar - 1).to(dtype)


def reference(mu, logvar, num_samples=None, seed=3, start=5):
    return reparameterize_reference(mu, logvar, seed, start, num_samples or 0)


def run(mu, logvar, num_samples=None, seed=3, start=5):
    with fastgen.backend("cpu"):
        return ops.reparameterize(mu, logvar, num_samples=num_samples, seed=seed, start=start)


def close(actual, expected, exact):
    """Errors at most twice those of plain PyTorch in the same dtype."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    error, allowed = (actual.double() - exact).abs().max(), (expected.double() - exact).abs().max()
    assert error <= 2 * allowed + 4 * torch.finfo(actual.dtype).eps * exact.abs().max()


@shapes
@draws
def test_float32(shape, num_samples, isa):
    mu, logvar = parameters(shape)
    for actual, expected, exact in zip(
        run(mu, logvar, num_samples), reference(mu, logvar, num_samples),
        reference(mu.double(), logvar.double(), num_samples), strict=True,
    ):  # fmt: skip
        close(actual, expected, exact)


@shapes
@draws
def test_float64(shape, num_samples, isa):
    mu, logvar = parameters(shape, torch.float64)
    for actual, expected in zip(run(mu, logvar, num_samples), reference(mu, logvar, num_samples), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@shapes
@draws
def test_gradients_are_those_of_the_reference(shape, num_samples, isa):
    grads = []
    for dtype, function in ((torch.float32, run), (torch.float32, reference), (torch.float64, reference)):
        leaves = [leaf.requires_grad_() for leaf in (value.to(dtype) for value in parameters(shape))]
        z, kl = function(*leaves, num_samples)
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(result.shape, generator=generator).to(dtype) for result in (z, kl)]
        grads.append(torch.autograd.grad([z, kl], leaves, weights))
    for actual, expected, exact in zip(*grads, strict=True):
        close(actual, expected, exact)


@pytest.mark.parametrize("which", ["z", "kl", "both"])
@draws
def test_gradcheck(which, num_samples):
    leaves = [leaf.requires_grad_() for leaf in parameters((3, 5), torch.float64)]

    def function(mu, logvar):
        results = run(mu, logvar, num_samples)
        return results if which == "both" else results[which == "kl"]

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_divergence_against_torch_distributions():
    mu, logvar = parameters((7, 13), torch.float64)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mu, torch.exp(0.5 * logvar)), normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(run(mu, logvar)[1], expected)


def test_the_divergence_of_the_prior_is_zero_and_near_it_keeps_its_digits():
    zero = torch.zeros(2, 300)
    assert run(zero, zero)[1].tolist() == [0, 0]
    mu, logvar = torch.zeros(1, 1), torch.full((1, 1), 1e-2)
    exact = 0.5 * (math.expm1(0.009999999776482582) - 0.009999999776482582)
    assert run(mu, logvar)[1].item() == pytest.approx(exact, rel=1e-4)


@draws
def test_noise_is_that_of_normal(num_samples):
    mu = torch.zeros(6, 10)
    z, _ = run(mu, mu, num_samples, seed=8, start=2)
    assert torch.equal(z if num_samples is None else z[0], ops.normal(6, (10,), seed=8, start=2))


def test_splits_threads_and_the_number_of_draws_change_no_bit():
    mu, logvar = parameters((120, 131))
    z, kl = run(mu, logvar, 4, start=0)
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            again = run(mu, logvar, 4, start=0)
            assert torch.equal(again[0], z) and torch.equal(again[1], kl)
            for first, last in ((0, 1), (1, 50), (50, 120)):
                part = run(mu[first:last], logvar[first:last], 2, start=first)
                assert torch.equal(part[0], z[:2, first:last]) and torch.equal(part[1], kl[first:last])
    finally:
        torch.set_num_threads(1)


def test_gradients_do_not_depend_on_threads_either():
    def gradients():
        leaves = [leaf.requires_grad_() for leaf in parameters((90, 131))]
        z, kl = run(*leaves, 3)
        return torch.autograd.grad([z.square().sum(), kl.sum()], leaves)

    first = gradients()
    torch.set_num_threads(3)
    assert all(map(torch.equal, gradients(), first))


def test_avx2_and_avx512_give_the_same_bits():
    mu, logvar = parameters((20, 131))
    results = []
    for isa in FUSED:
        with chosen(isa):
            leaves = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
            z, kl = run(*leaves, 2)
            results.append((z, kl, *torch.autograd.grad([z.square().sum(), kl.sum()], leaves)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_logvars_stay_finite(dtype):
    values = [-1e30, -5000.0, -200.0, -90.0, 0.0, 60.0, MAX_LOGVAR, 81.0, 5000.0, 1e30]
    mu = torch.zeros(len(values), 3, dtype=dtype)
    logvar = torch.tensor(values, dtype=dtype)[:, None].repeat(1, 3)
    for function in (run, reference):
        leaves = [mu.clone().requires_grad_(), logvar.clone().requires_grad_()]
        z, kl = function(*leaves)
        grads = torch.autograd.grad([z, kl], leaves, [torch.ones_like(z), torch.ones_like(kl)])
        assert all(torch.isfinite(value).all() for value in (z, kl, *grads))
        assert torch.equal(grads[1][-3:], torch.zeros(3, 3, dtype=dtype)), "above the limit"
        assert (grads[1][:-3] != 0).all()
        torch.testing.assert_close(z[-1], run(mu, torch.full_like(mu, MAX_LOGVAR))[0][-1])


def test_nan_stays_nan():
    mu, logvar = parameters((3, 20))
    mu[0, 3], logvar[1, 7] = math.nan, math.nan
    z, kl = run(mu, logvar)
    assert torch.isnan(z).nonzero().tolist() == [[0, 3], [1, 7]]
    assert torch.isnan(kl).tolist() == [True, True, False]


@pytest.mark.parametrize("layout", ["halves", "halves of maps", "transposed", "channels_last", "expanded"])
def test_strides(layout):
    both = torch.randn(6, 8, 5, 3)
    mu, logvar = {
        "halves": lambda: both.flatten(1).chunk(2, dim=1),
        "halves of maps": lambda: both.chunk(2, dim=1),
        "transposed": lambda: (both[0, 0].t(), both[0, 1].t()),
        "channels_last": lambda: both.contiguous(memory_format=torch.channels_last).chunk(2, dim=1),
        "expanded": lambda: (both[:1].expand(4, 8, 5, 3), both[1:2].expand(4, 8, 5, 3)),
    }[layout]()
    results = []
    for pair in ((mu, logvar), (mu.contiguous(), logvar.contiguous())):
        leaves = [value.detach().requires_grad_() for value in pair]
        z, kl = run(*leaves, 2)
        results.append((z, kl, *torch.autograd.grad([z.square().sum(), kl.sum()], leaves)))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)], ids=str)
def test_empty(shape):
    mu = torch.zeros(shape, requires_grad=True)
    z, kl = run(mu, mu, 2)
    assert z.shape == (2, *shape) and torch.equal(kl, torch.zeros(shape[0]))
    (z.sum() + kl.sum()).backward()


def test_lower_precisions_are_computed_in_float32():
    mu, logvar = parameters((4, 6), torch.bfloat16)
    z, kl = ops.reparameterize(mu, logvar, seed=3, start=5)
    expected = run(mu.float(), logvar.float())
    assert z.dtype == kl.dtype == torch.float32
    assert torch.equal(z, expected[0]) and torch.equal(kl, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [0, 2])
def test_opcheck(dtype, count):
    args = (*parameters((3, 5), dtype), -4, 2, count)
    torch.library.opcheck(torch.ops.fastgen.reparameterize.default, args)
    z, kl = torch.ops.fastgen.reparameterize(*args)
    for grads in ((z, kl), (z, None), (None, kl)):
        torch.library.opcheck(torch.ops.fastgen.reparameterize_grad.default, (*grads, *args))


def test_compiles():
    leaves = [leaf.requires_grad_() for leaf in parameters((6, 10))]

    def loss(mu, logvar):
        z, kl = ops.reparameterize(mu, logvar, seed=2**64 - 1)
        return z.square().sum() + kl.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*leaves), leaves)
    assert all(map(torch.equal, torch.autograd.grad(compiled(*leaves), leaves), expected))


@pytest.mark.parametrize("differentiable", [False, True])
def test_compiles_once_for_many_seeds(differentiable):
    mu, logvar = (tensor.requires_grad_(differentiable) for tensor in parameters((3, 4)))

    def both(mu, logvar, seed, start):
        return ops.reparameterize(mu, logvar, seed=seed, start=start)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both, backend=counter, fullgraph=True)
    for seed in (*range(2, 14), 2**63 - 1):
        torch.testing.assert_close(compiled(mu, logvar, seed, seed // 3), both(mu, logvar, seed, seed // 3))
    assert counter.frame_count <= 3  # the first with numbers written in, start 0 and others


def test_no_noise_is_kept():
    leaves = [leaf.requires_grad_() for leaf in parameters((6, 10))]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        run(*leaves, 5)
    assert [tensor.data_ptr() for tensor in saved] == [leaf.data_ptr() for leaf in leaves]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mu": 1.0}, TypeError, "mu must be a tensor, got float"),
        ({"mu": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "mu must be of a floating dtype, got torch.int64"),
        ({"logvar": torch.zeros(2, 3, dtype=torch.float64)}, TypeError, "logvar must have the dtype of mu"),
        ({"logvar": torch.zeros(2, 4)}, ValueError, r"logvar must have the shape of mu, \[2, 3\], got \[2, 4\]"),
        ({"mu": torch.zeros(()), "logvar": torch.zeros(())}, ValueError, "without dimensions"),
        ({"seed": -1}, ValueError, "seed must be in 0"),
        ({"seed": 1.5}, TypeError, "seed must be an int"),
        ({"start": -1}, ValueError, "start must be in 0"),
        ({"start": 2**62}, ValueError, "start must be in 0"),
        ({"num_samples": 0}, ValueError, "num_samples must be in 1"),
        ({"num_samples": 2.0}, TypeError, "num_samples must be an integer"),
    ],
    ids=str,
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.reparameterize(**{"mu": torch.zeros(2, 3), "logvar": torch.zeros(2, 3), **arguments})


def without_a_seed(mu: torch.Tensor) -> torch.Tensor:
    return ops.reparameterize(mu, mu, num_samples=3)[0]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda function, mu: function,
        lambda function, mu: torch.compile(function, backend="eager", fullgraph=True),
        lambda function, mu: torch.jit.trace(function, mu, check_trace=False),
        lambda function, mu: torch.vmap(function, in_dims=1, out_dims=2, randomness="different"),
        lambda function, mu: make_fx(function)(mu),
    ],
    ids=["eager", "compiled", "traced", "transformed", "fx"],
)
def test_without_a_seed_every_call_has_its_noise(make):
    """That of PyTorch's generator."""
    mu = torch.zeros(4, 9)
    made = make(without_a_seed, mu)
    torch.manual_seed(1)
    first, second = made(mu), made(mu)
    assert first.shape == (3, 4, 9) and not torch.isclose(first, second).any()
    assert len(first.flatten().unique()) == first.numel()
    torch.manual_seed(1)
    assert torch.equal(made(mu), first)
    torch.manual_seed(2)
    assert not torch.isclose(made(mu), first).any()


def test_without_a_seed_it_differentiates():
    mu, logvar = (value.requires_grad_() for value in parameters((3, 5)))
    z, kl = torch.compile(ops.reparameterize, backend="eager")(mu, logvar)
    by_mu, by_logvar = torch.autograd.grad(z.sum(), (mu, logvar), retain_graph=True)
    assert torch.equal(by_mu, torch.ones_like(mu))
    torch.testing.assert_close(by_logvar, 0.5 * (z - mu).detach())
    torch.testing.assert_close(kl, run(mu, logvar)[1])
