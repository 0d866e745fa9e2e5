"""Convolutional variational autoencoders: decoding, a training step and the importance-weighted bound.

"eager" is the decoder with ConvTranspose2d, BatchNorm2d and ReLU as users write it, with the same weights, contiguous;
"eager channels_last" in the format that convolutions on the CPU prefer.  "fastgen" is the model after `accelerate`.  A
training step is the bound, its gradients, and Adam.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness.case import Case, Provider, Work
from bench.harness.layers import convolution_products

TESTS = ("tests/models/test_vae.py", "tests/nn/test_conv_bn_act.py")
MODELS: dict[str, dict[str, Any]] = {
    "28x28": {"image_shape": (1, 28, 28), "num_filters": 64, "latent_dim": 20},
    "64x64 colour": {"image_shape": (3, 64, 64), "num_filters": 64, "latent_dim": 128},
}
QUICK_MODELS: dict[str, dict[str, Any]] = {"8x8": {"image_shape": (1, 8, 8), "num_filters": 4, "latent_dim": 2}}
BATCHES = (1, 16, 64)


def make(options: dict[str, Any]) -> Any:
    """A model with statistics as after training."""
    from fastgen import models

    torch.manual_seed(0)
    model = models.VAE(architecture="convolutional", likelihood="gaussian", scale=0.1, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            torch.nn.init.normal_(module.running_mean)
    return model


def plain(model: Any) -> Any:
    """The model with every fused block replaced by the Sequential that it stands for."""
    from fastgen.nn import ConvBNAct, ConvTransposeBNAct

    result = copy.deepcopy(model)
    for parent in list(result.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (ConvBNAct, ConvTransposeBNAct)):
                setattr(parent, name, torch.nn.Sequential(*child))
    return result


def decoder_flops(model: Any) -> int:
    """2 per multiplication of one image; those whose output falls outside are counted, zeros between inputs are not."""
    twin = plain(model).eval()
    return 2 * convolution_products(twin.decoder, lambda: twin.decode(torch.zeros(1, model.latent_dim)))


def decode(model: Any, z: Tensor) -> Tensor:
    with torch.no_grad():
        return model.decode(z)


def build_decode(options: dict[str, Any], batch: int) -> Work:
    import fastgen

    model = make(options).eval()
    z = torch.randn(batch, model.latent_dim)
    eager = plain(model)
    providers = {
        "eager": Provider(partial(decode, eager, z), True),
        "eager channels_last": Provider(
            partial(decode, copy.deepcopy(eager).to(memory_format=torch.channels_last), z), True
        ),
        "fastgen": Provider(partial(decode, fastgen.accelerate(model), z)),
    }
    weights = sum(p.numel() for p in model.decoder.parameters())
    pixels = batch * model.likelihood.channels * model.image_shape[1] * model.image_shape[2]
    return Work(providers, batch * decoder_flops(model), 4 * (weights + z.numel() + pixels))


def eager_bound(model: Any, images: Tensor) -> Tensor:
    """The evidence lower bound by the usual formulas."""
    mu, logvar = model.encode(images)
    std = torch.exp(0.5 * logvar)
    params = model.decode(mu + std * torch.randn_like(std))
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=1)
    error = F.mse_loss(params, images.float() / 255, reduction="none").flatten(1).sum(1)
    return -50 * error - kl  # of the scale 0.1, up to a constant


def train_step(bound: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, images: Tensor) -> None:
    optimizer.zero_grad()
    (-bound(images).mean()).backward()
    optimizer.step()


def build_training(options: dict[str, Any], batch: int) -> Work:
    model = make(options).train()
    images = torch.randint(256, (batch, *model.image_shape), dtype=torch.uint8)
    eager = plain(model)
    providers = {}
    rows = copy.deepcopy(eager).to(memory_format=torch.channels_last)
    for name, net, bound in (
        ("eager", eager, partial(eager_bound, eager)),
        ("eager channels_last", rows, partial(eager_bound, rows)),
        ("fastgen", model, model.elbo),
    ):
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)
        providers[name] = Provider(partial(train_step, bound, optimizer, images), name != "fastgen")
    weights = sum(p.numel() for p in model.parameters())
    # The encoder mirrors the decoder; a backward pass is two forward passes.
    return Work(providers, batch * 6 * decoder_flops(model), 4 * 7 * weights + images.numel())


def eager_importance(model: Any, images: Tensor, count: int) -> Tensor:
    """The importance-weighted bound, one latent of every image after another."""
    with torch.no_grad():
        mu, logvar = model.encode(images)
        std, weights = torch.exp(0.5 * logvar), []
        for _ in range(count):
            eps = torch.randn_like(std)
            z = mu + std * eps
            error = F.mse_loss(model.decode(z), images.float() / 255, reduction="none").flatten(1).sum(1)
            weights.append(0.5 * (eps * eps + logvar - z * z).sum(1) - 50 * error)
        return torch.logsumexp(torch.stack(weights), dim=0)


def build_importance(options: dict[str, Any], batch: int, count: int) -> Work:
    import fastgen

    model = make(options).eval()
    images = torch.randint(256, (batch, *model.image_shape), dtype=torch.uint8)
    fast = fastgen.accelerate(model)
    providers = {
        "eager": Provider(partial(eager_importance, plain(model), images, count), True),
        "fastgen": Provider(partial(fast.log_prob, images, num_samples=count)),
    }
    weights = sum(p.numel() for p in model.decoder.parameters())
    return Work(providers, batch * count * decoder_flops(model), 4 * weights + images.numel())


def cases(quick: bool) -> list[Case]:
    """Decoding for each batch; a training step; the bound with 50 latents of 16 images."""
    result = []

    def add(name: str, options: dict[str, Any], what: str, batch: int, build: Callable[..., Work], *more: int) -> None:
        shapes = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
        build_one = partial(build, options, batch, *more)
        result.append(Case(f"{name} {what}, batch {batch}", {**shapes, "batch": batch}, build_one))

    for name, options in (QUICK_MODELS if quick else MODELS).items():
        for batch in (2,) if quick else BATCHES:
            add(name, options, "decode", batch, build_decode)
        add(name, options, "training step", 2 if quick else 64, build_training)
        latents = 3 if quick else 50
        add(name, options, f"bound by {latents} latents", 2 if quick else 16, build_importance, latents)
    return result
