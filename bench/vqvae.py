"""The published VQ-VAE (van den Oord et al. 2017, section 4.1): codes of images, images of codes, a training step.

The peers are the same networks as users write them, with the same weights: Conv2d, ReLU, ConvTranspose2d, the nearest
code by one matrix product, moving averages by `index_add_`.  "eager" is contiguous, "channels_last" has the format that
convolutions on the CPU prefer, "compile" is `torch.compile` of that.  A training step is the loss of equation 3 with
the discretised logistic likelihood (the same function for all), its gradients, and Adam.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness.case import Case, Provider, Work
from bench.harness.layers import convolution_products

TESTS = ("tests/models/test_vqvae.py", "tests/nn/test_vector_quantizer.py", "tests/ops/test_nearest_code.py")
MODELS: dict[str, dict[str, Any]] = {
    "32x32": {},  # 8x8 codes
    "128x128, 128 filters": {"image_shape": (3, 128, 128), "num_filters": 128},  # 32x32 codes, as of ImageNet
}
QUICK_MODELS: dict[str, dict[str, Any]] = {"8x8": {"image_shape": (1, 8, 8), "num_filters": 4, "latent_dim": 2}}


class PlainResidual(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv, self.point = block.conv, block.point

    def forward(self, x: Tensor) -> Tensor:
        return x + self.point(F.relu(self.conv(F.relu(x))))


class PlainEncoder(nn.Module):
    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.down, self.last = encoder.down, encoder.last
        self.blocks = nn.Sequential(*map(PlainResidual, encoder.blocks))

    def forward(self, x: Tensor) -> Tensor:
        for i, conv in enumerate(self.down):
            x = conv(F.relu(x) if i else x)
        return self.last(F.relu(self.blocks(x)))


class PlainDecoder(nn.Module):
    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.first = decoder.first
        self.blocks = nn.Sequential(*map(PlainResidual, decoder.blocks))
        self.up = nn.Sequential(*(nn.Sequential(*layers) for layers in decoder.up))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.relu(self.blocks(self.first(x))))


class PlainQuantizer(nn.Module):
    """As `nn.VectorQuantizer`, without restarts."""

    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.decay, self.commitment = layer.decay, layer.commitment
        for name in ("codebook", "counts", "sums"):
            self.register_buffer(name, getattr(layer, name))

    def codes(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        half_norms = self.codebook.pow(2).sum(1) / 2
        return torch.addmm(half_norms, rows, self.codebook.t(), beta=-1).argmax(1).view(len(x), *x.shape[2:])

    def look_up(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.codebook).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = self.codes(x.detach())
        chosen = self.look_up(codes)
        loss = self.commitment * F.mse_loss(x, chosen)
        with torch.no_grad():
            rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
            counts = torch.bincount(codes.flatten(), minlength=len(self.codebook)).to(self.counts)
            self.counts.lerp_(counts, 1 - self.decay)
            self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, codes.flatten(), rows), 1 - self.decay)
            self.codebook.copy_(self.sums / (self.counts + 1e-5)[:, None])
        return x + (chosen - x).detach(), codes, loss


def make(options: dict[str, Any]) -> Any:
    from fastgen import models

    torch.manual_seed(0)
    model = models.VQVAE(min_usage=0.0, **options)
    model.initialize(images_for(model, 16))
    return model


def images_for(model: Any, batch: int) -> Tensor:
    return torch.randint(256, (batch, *model.image_shape), dtype=torch.uint8)


def plain(model: Any, memory_format: torch.memory_format) -> Any:
    result = copy.deepcopy(model)
    result.encoder = PlainEncoder(result.encoder)
    result.decoder = PlainDecoder(result.decoder)
    result.quantizer = PlainQuantizer(result.quantizer)
    return result.to(memory_format=memory_format)


def encode(model: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        if isinstance(model.quantizer, PlainQuantizer):
            return model.quantizer.codes(model._features(images))
        return model.encode(images)


def decode(model: Any, codes: Tensor) -> Tensor:
    with torch.no_grad():
        return model.decoder(model.quantizer.look_up(codes))


def step(model: Any, optimizer: torch.optim.Optimizer, images: Tensor) -> None:
    optimizer.zero_grad()
    nats, _, loss = model.terms(images)
    (loss - nats.mean() / images[0].numel()).backward()
    optimizer.step()


def count_products(twin: Any, image: Tensor) -> tuple[int, int]:
    """Of encoding an image, the nearest codes included, and of decoding it."""
    with torch.no_grad():
        codes = twin.quantizer.codes(twin._features(image))
        scores = codes.numel() * twin.quantizer.codebook.numel()
        encoder = convolution_products(twin.encoder, lambda: twin._features(image))
        decoder = convolution_products(twin.decoder, lambda: twin.decoder(twin.quantizer.look_up(codes)))
    return encoder + scores, decoder


def build(options: dict[str, Any], batch: int, what: str, with_compile: bool) -> Work:
    model = make(options)
    model.train(what == "step")
    images = images_for(model, batch)
    codes = torch.randint(model.num_codes, (batch, *model.code_shape))

    def call(network: Any) -> Callable[[], object]:
        if what == "step":
            optimizer = torch.optim.Adam(network.parameters(), lr=1e-5, fused=True)
            return partial(step, network, optimizer, images)
        return partial(encode, network, images) if what == "encode" else partial(decode, network, codes)

    skipped = {}
    providers = {
        "eager": Provider(call(plain(model, torch.contiguous_format)), True),
        "channels_last": Provider(call(plain(model, torch.channels_last)), True),
    }
    if with_compile:
        try:
            torch._dynamo.reset()
            network = plain(model, torch.channels_last)
            for part in (network.encoder, network.decoder):
                part.forward = torch.compile(part.forward, dynamic=False)
            providers["compile"] = Provider(call(network), True)
            providers["compile"].call()
        except Exception as error:  # whatever the compiler's stack raises: it is not what is measured
            providers.pop("compile", None)
            skipped["compile"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    providers["fastgen"] = Provider(call(model))
    twin = plain(model, torch.contiguous_format)
    work = dict(zip(("encode", "decode"), count_products(twin, images[:1]), strict=True))
    products = work[what] if what in work else 3 * sum(work.values())  # a backward pass is two forward passes
    weights = sum(p.numel() for p in model.parameters())
    return Work(providers, 2 * batch * products, images.numel() + 4 * weights * (9 if what == "step" else 1), skipped)


def cases(quick: bool) -> list[Case]:
    """Encoding and decoding for each batch, and a training step."""
    result = []
    for name, options in (QUICK_MODELS if quick else MODELS).items():
        large = "image_shape" in options and not quick
        batches = {"decode": (1, 16) if large else (1, 16, 64), "encode": (16,), "step": (8 if large else 64,)}
        for what, sizes in batches.items():
            for batch in (2,) if quick else sizes:
                shapes = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
                build_one = partial(build, options, batch, what, not quick and not large)
                result.append(Case(f"{name} {what}, batch {batch}", {**shapes, "batch": batch}, build_one))
    return result
