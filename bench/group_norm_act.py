"""group_norm_act against group norm, or instance norm, and activation in PyTorch.

The norms of decoders: 32 groups and SiLU, as in latent diffusion and VQGAN, and instance norm with ReLU, as in networks
for image translation.  "eager" has contiguous inputs, "eager channels_last" and "compile" the layout that convolutions
are fast in; fastgen is measured on both.  Compulsory are two reads and a write: the first value that is normalised
depends on the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.case import Case, Provider, Work

TESTS = ("tests/ops/test_group_norm_act.py",)
# Of an element: a difference and a square with two sums; a difference and a product with a sum; the activation, that of
# SiLU an exponential (16), a sum, a quotient and a product.
NORM_FLOPS = 4 + 3
ACTIVATION_FLOPS = {"silu": 19, "relu": 1}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "relu": F.relu}


@dataclass(frozen=True)
class Layer:
    """Batch, channels and side of the (square) map; as many groups as channels are an instance norm."""

    batch: int
    channels: int
    side: int
    groups: int
    activation: str

    @property
    def name(self) -> str:
        norm = "instance norm" if self.groups == self.channels else f"{self.groups} groups"
        return f"{norm} {self.activation} {self.channels} {self.batch}x{self.side}x{self.side}"


KINDS = [(512, 16, 32, "silu"), (256, 64, 32, "silu"), (128, 256, 32, "silu"), (256, 32, 256, "relu")]
LAYERS = [Layer(batch, *kind) for kind in [*KINDS, (64, 128, 64, "relu")] for batch in (1, 4)]
QUICK_LAYERS = [Layer(2, 6, 5, 3, "silu"), Layer(1, 5, 4, 5, "relu")]


def plain(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ACTIVATIONS[layer.activation](torch.group_norm(x, layer.groups, weight, bias))


def fused(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from fastgen import ops

    return ops.group_norm_act(x, layer.groups, weight, bias, activation=layer.activation)


def infer(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    with torch.no_grad():
        return function(*tensors)


def build(layer: Layer, with_compile: bool) -> Work:
    torch.manual_seed(0)
    x = torch.randn(layer.batch, layer.channels, layer.side, layer.side)
    rows = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, layer.channels)
    eager, fast = partial(plain, layer), partial(fused, layer)
    skipped = {}
    providers = {
        "eager": Provider(partial(infer, eager, x, weight, bias), True),
        "eager channels_last": Provider(partial(infer, eager, rows, weight, bias), True),
    }
    if with_compile:
        try:
            torch._dynamo.reset()
            providers["compile"] = Provider(
                partial(infer, torch.compile(eager, dynamic=False), rows, weight, bias), True
            )
            providers["compile"].call()
        except Exception as error:  # whatever the compiler's stack raises: it is not what is measured
            providers.pop("compile", None)
            skipped["compile"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    providers["fastgen"] = Provider(partial(infer, fast, rows, weight, bias))
    providers["fastgen contiguous"] = Provider(partial(infer, fast, x, weight, bias))
    halves = [tensor.bfloat16() for tensor in (rows, weight, bias)]
    providers["fastgen bfloat16"] = Provider(partial(infer, fast, *halves), note="two bytes an element")
    flops = (NORM_FLOPS + ACTIVATION_FLOPS[layer.activation]) * x.numel()
    return Work(providers, flops, 3 * 4 * x.numel(), skipped)


def cases(quick: bool) -> list[Case]:
    return [
        Case(layer.name, {"x": [layer.batch, layer.channels, layer.side, layer.side]}, partial(build, layer, not quick))
        for layer in (QUICK_LAYERS if quick else LAYERS)
    ]
