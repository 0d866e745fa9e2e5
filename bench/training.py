"""A step of training autoregressive models: the loss of a batch, its gradients, Adam; and scoring, the loss alone.

The peers are the same networks in plain PyTorch (`fastgen.backend("reference")`): `F.conv2d` of padded images or masked
weights, ELU of a concatenation and `F.dropout`, the formula of the loss. "eager" is contiguous, "channels_last" has the
format that convolutions on the CPU prefer, "compile" is `torch.compile` of the network, in that format, too.
Floating-point operations count open weights at every position, border included; a backward pass is two forward passes.
Minimal filtering can go below that.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness.case import Case, Provider, Work

OPERATIONS = ("masked_conv2d", "shifted_conv2d", "concat_elu", "gated_unit", "logistic_mixture_nll")
TESTS = ("tests/models", *(f"tests/ops/test_{name}.py" for name in OPERATIONS))


@dataclass(frozen=True)
class Subject:
    """A model and the batch that it is trained on."""

    name: str
    model: str
    batch: int
    config: dict[str, Any] = field(default_factory=dict)
    with_compile: bool = False  # takes minutes for large models


SUBJECTS = [
    Subject("PixelCNN++ 3x32x32", "pixelcnnpp", 4),  # the published size, 53,659,080 parameters
    Subject("PixelCNN++ 3x32x32, 80 filters", "pixelcnnpp", 8, {"num_filters": 80, "num_blocks": 2}),
    Subject("PixelSNAIL 3x32x32, 64 filters", "pixelsnail", 4, {"num_filters": 64, "num_blocks": 4}),
    Subject("PixelCNN 3x32x32", "pixelcnn", 8),
    Subject(
        "GatedPixelCNN 1x28x28", "gated_pixelcnn", 16, {"image_shape": (1, 28, 28), "num_filters": 64, "num_blocks": 15}
    ),
    Subject(
        "GatedPixelCNN digits",  # the model of `fastgen demo`
        "gated_pixelcnn",
        64,
        {"image_shape": (1, 8, 8), "levels": 17, "num_filters": 32, "num_blocks": 6, "kernel_size": 3},
        with_compile=True,
    ),
]
QUICK_SUBJECTS = [
    Subject("GatedPixelCNN 1x4x4", "gated_pixelcnn", 2, {"image_shape": (1, 4, 4), "num_filters": 4, "num_blocks": 2}),
    Subject("PixelCNN++ 3x4x5", "pixelcnnpp", 2, {"image_shape": (3, 4, 5), "num_filters": 4, "num_blocks": 1}),
]


def open_weights(module: nn.Module) -> int:
    """Of a convolution, the weights that no mask closes."""
    from fastgen import ops
    from fastgen.models.autoregressive.weight_normed import WeightNormed
    from fastgen.nn import MaskedConv2d

    if isinstance(module, WeightNormed):
        return module.weight_v.numel()
    if isinstance(module, MaskedConv2d):
        return int(ops.conv_mask(module.weight.shape, module.mask_type, module.colors, module.splits).sum())
    return module.weight.numel() if isinstance(module, nn.Conv2d) else 0


def forward_flops(model: Any) -> int:
    """2 for each open weight and position of one image."""
    counts = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # A transposed convolution spreads each position of its input, the others fill each position of their output.
        positions = min(math.prod(inputs[0].shape[2:]), math.prod(output.shape[2:]))
        counts.append(2 * open_weights(module) * positions)

    hooks = [module.register_forward_hook(count) for module in model.modules() if open_weights(module)]
    with torch.no_grad():
        model.log_prob(torch.zeros(1, *model.image_shape, dtype=torch.uint8))
    for hook in hooks:
        hook.remove()
    return sum(counts)


def make(subject: Subject) -> Any:
    from fastgen import models

    torch.manual_seed(0)
    return models.get(subject.model)(**subject.config)


@functools.cache
def reference(name: str) -> Callable[..., Tensor]:
    """The convolution in plain PyTorch, as modules call it; a mask is made once, as users keep it in a buffer."""
    module = sys.modules[f"fastgen.ops.{name}"]
    if name == "shifted_conv2d":
        return lambda x, weight, bias, *, left: module.shifted_conv2d_reference(x, weight, bias, left)
    mask = functools.cache(torch.inference_mode(False)(module.conv_mask))  # scores and steps share it

    def masked_conv2d(
        x: Tensor, weight: Tensor, bias: Tensor | None, *, mask_type: str, colors: int, splits: int
    ) -> Tensor:
        closed = mask(weight.shape, mask_type, colors, splits)
        return F.conv2d(x, weight * closed, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2))

    return masked_conv2d


@contextlib.contextmanager
def plain_pytorch() -> Iterator[None]:
    """Operations of fastgen are plain PyTorch, also to a compiler."""
    import fastgen
    from fastgen import ops

    replaced = {name: reference(name) for name in ("masked_conv2d", "shifted_conv2d")}
    with fastgen.backend("reference"), mock.patch.multiple(ops, **replaced):
        yield


def score(model: Any, peer: bool, images: Tensor) -> None:
    with torch.inference_mode(), plain_pytorch() if peer else contextlib.nullcontext():
        model.log_prob(images)


def step(model: Any, optimizer: torch.optim.Optimizer, peer: bool, images: Tensor) -> None:
    with plain_pytorch() if peer else contextlib.nullcontext():
        optimizer.zero_grad()
        (-model.log_prob(images).mean()).backward()
        optimizer.step()


def build(subject: Subject, train: bool) -> Work:
    model = make(subject).train(train)
    images = torch.randint(model.levels, (subject.batch, *model.image_shape), dtype=torch.uint8)
    flops = forward_flops(model)
    providers, skipped = {}, {}

    def add(name: str, network: Any) -> None:
        peer = network is not model
        if train:
            optimizer = torch.optim.Adam(network.parameters(), lr=1e-5, fused=True)
            call = partial(step, network, optimizer, peer, images)
        else:
            call = partial(score, network, peer, images)
        providers[name] = Provider(call, peer)

    add("eager", copy.deepcopy(model))
    add("channels_last", copy.deepcopy(model).to(memory_format=torch.channels_last))
    if subject.with_compile:
        network = copy.deepcopy(model).to(memory_format=torch.channels_last)
        network.forward = torch.compile(network.forward, dynamic=False)
        add("compile", network)
        try:
            providers["compile"].call()
        except Exception as error:  # whatever the compiler's stack raises: it is not what is measured
            del providers["compile"]
            skipped["compile"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    add("fastgen", model)
    weights = sum(p.numel() for p in model.parameters())
    traffic = 4 * weights * (9 if train else 1) + images.numel()  # Adam reads weight, gradient, moments, writes three
    return Work(providers, subject.batch * flops * (3 if train else 1), traffic, skipped)


def cases(quick: bool) -> list[Case]:
    """A step and a score of every model."""
    result = []
    for subject in QUICK_SUBJECTS if quick else SUBJECTS:
        shapes = {key: list(value) if isinstance(value, tuple) else value for key, value in subject.config.items()}
        for train in (True, False):
            name = f"{subject.name}, batch {subject.batch}, {'step' if train else 'score'}"
            result.append(Case(name, {**shapes, "batch": subject.batch}, partial(build, subject, train)))
    return result
