"""reparameterize against the formulas in PyTorch, torch.distributions and torch.compile, divergence included.

What everybody writes by hand is "eager": exp, randn_like, a product and a sum, and five passes for the divergence.  The
sizes are those of the latents of published models and of larger batches of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from bench.harness.case import Case, Provider, Work

TESTS = ("tests/ops/test_normal.py", "tests/ops/test_reparameterize.py")
# Of an element: a quarter of ten rounds of Philox at 14 operations; half a logarithm (18) and half a cosine with a sine
# (24); an exponential (16); the sample and its share of the divergence (8).
FORWARD_FLOPS = 14 * 10 // 4 + (18 + 24) // 2 + 16 + 8

Results = tuple[Tensor, Tensor]
Function = Callable[[Tensor, Tensor], Results]


@dataclass(frozen=True)
class Size:
    """Samples and dimensions of the latent."""

    samples: int
    dimensions: int

    @property
    def name(self) -> str:
        return f"{self.samples}x{self.dimensions}"


SIZES = [Size(64, 20), Size(256, 32), Size(1024, 128), Size(8192, 256)]
COMPILED = SIZES[0], SIZES[2]
QUICK_SIZES = [Size(3, 5)]


def formulas(mu: Tensor, logvar: Tensor) -> Results:
    std = torch.exp(0.5 * logvar)
    z = mu + std * torch.randn_like(std)
    return z, -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=1)


def distributions(mu: Tensor, logvar: Tensor) -> Results:
    posterior = Normal(mu, torch.exp(0.5 * logvar))
    prior = Normal(torch.zeros_like(mu), torch.ones_like(mu))
    return posterior.rsample(), kl_divergence(posterior, prior).sum(1)


def fused(mu: Tensor, logvar: Tensor) -> Results:
    from fastgen import ops

    return ops.reparameterize(mu, logvar, seed=1)


def step(function: Function, inputs: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
    """Forward pass, and the gradients of both inputs."""
    return torch.autograd.grad(function(*inputs), inputs, grads)


def build(size: Size, train: bool, with_compile: bool) -> Work:
    torch.manual_seed(0)
    mu, logvar, grad = torch.randn(3, size.samples, size.dimensions)
    grads = [grad, torch.randn(size.samples)]

    def provider(function: Function, baseline: bool = True) -> Provider:
        inputs = [value.clone().requires_grad_(train) for value in (mu, logvar)]
        call = partial(step, function, inputs, grads) if train else partial(function, *inputs)
        return Provider(call, baseline)

    skipped = {}
    providers = {"eager": provider(formulas), "torch.distributions": provider(distributions)}
    if with_compile:
        try:
            torch._dynamo.reset()
            providers["compile"] = provider(torch.compile(formulas, dynamic=False))
            providers["compile"].call()
        except Exception as error:  # whatever the compiler's stack raises: it is not what is measured
            providers.pop("compile", None)
            skipped["compile"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    providers["fastgen"] = provider(fused, False)
    # Forward: two read, one written. Backward: two and a gradient read, two written; the noise is made again.
    count, passes = mu.numel(), 8 if train else 3
    return Work(providers, (2 if train else 1) * FORWARD_FLOPS * count, 4 * passes * count, skipped)


def cases(quick: bool) -> list[Case]:
    """Forward, and forward with backward, of every size."""
    result = []
    for size in QUICK_SIZES if quick else SIZES:
        shapes = {"mu": [size.samples, size.dimensions], "logvar": [size.samples, size.dimensions]}
        for train in (False, True):
            name = f"{size.name} {'forward+backward' if train else 'forward'}"
            result.append(Case(name, shapes, partial(build, size, train, not quick and size in COMPILED)))
    return result
