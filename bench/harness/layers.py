"""A layer's forward pass, or that and the backward pass, in PyTorch and in fastgen, for both memory formats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness.case import Provider

Layer = Callable[..., Tensor]


def competitors(
    plain: Layer, fast: Layer, inputs: Sequence[Tensor], with_grad: Sequence[bool], grad: Tensor | None, compiles: bool
) -> tuple[dict[str, Provider], dict[str, str]]:
    """The providers of `inputs`, and those that cannot run here, with the reason.

    Tensors of four dimensions have the memory format in the provider's name; "fastgen" and "compile" get channels_last.
    With the output's gradient `grad`, gradients of the inputs that `with_grad` marks are computed, too.
    """

    def provider(layer: Layer, memory_format: torch.memory_format, baseline: bool) -> Provider:
        def layout(tensor: Tensor) -> Tensor:
            return tensor.clone(memory_format=memory_format) if tensor.dim() == 4 else tensor.clone()

        own = tuple(map(layout, inputs))
        if grad is None:
            return Provider(partial(without_grad, layer, own), baseline)
        for tensor, wanted in zip(own, with_grad, strict=True):
            tensor.requires_grad_(wanted)
        return Provider(partial(backward, layer, own, layout(grad)), baseline)

    skipped = {}
    providers = {
        "contiguous": provider(plain, torch.contiguous_format, True),
        "channels_last": provider(plain, torch.channels_last, True),
    }
    if compiles:
        try:
            torch._dynamo.reset()
            providers["compile"] = provider(torch.compile(plain, dynamic=False), torch.channels_last, True)
            providers["compile"].call()
        except Exception as error:  # whatever the compiler's stack raises: it is not what is measured
            providers.pop("compile", None)
            skipped["compile"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    providers["fastgen"] = provider(fast, torch.channels_last, False)
    providers["fastgen contiguous"] = provider(fast, torch.contiguous_format, False)
    return providers, skipped


def convolution_products(module: torch.nn.Module, call: Callable[[], object]) -> int:
    """Multiplications of the convolutions and linear layers of a module in one call, of one image: border included,
    zeros between the inputs of a transposed convolution not.
    """
    counts = []

    def count(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # A transposed convolution spreads each position of its input, the others fill each position of their output.
        positions = min(math.prod(inputs[0].shape[2:]), math.prod(output.shape[2:]))
        counts.append(layer.weight.numel() * positions)

    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d)
    hooks = [layer.register_forward_hook(count) for layer in module.modules() if isinstance(layer, kinds)]
    with torch.no_grad():
        call()
    for hook in hooks:
        hook.remove()
    return sum(counts)


def without_grad(layer: Layer, inputs: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return layer(*inputs)


def backward(layer: Layer, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """Forward pass and the gradients of all inputs that want one."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    return torch.autograd.grad(layer(*inputs), wanted, grad)
