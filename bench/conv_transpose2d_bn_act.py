"""conv_transpose2d_bn_act against the Sequential(ConvTranspose2d, BatchNorm2d, ReLU) that it replaces.

The five configurations that cover nine of ten transposed convolutions in public code, each as a small, a middle and a
large layer; the last layer of a generator (3 channels, Tanh, no BatchNorm); and training. "eager" is the module as
users run it. "folded" has the BatchNorm in the weights, "freezing" is torch.compile that folds and repacks them; both
are for inference alone; so is fastgen's bfloat16, the same module and input in that dtype. The floor counts the taps
that fall inside the image and multiply no zero, in float32: minimal filtering and bfloat16 can beat it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness.case import Case, Provider, Work

TESTS = (
    "tests/ops/test_conv_transpose2d_bn_act.py",
    "tests/ops/test_conv_training.py",
    "tests/nn/test_conv_bn_act.py",
)


@dataclass(frozen=True)
class Config:
    """Kernel size, stride, padding and output padding of both axes; of a transposed convolution or an ordinary one."""

    kernel: int
    stride: int
    padding: int
    output_padding: int = 0
    transposed: bool = True
    depthwise: bool = False

    @property
    def name(self) -> str:
        extra = f"op{self.output_padding}" if self.output_padding else ""
        return f"{'depthwise ' if self.depthwise else ''}k{self.kernel}s{self.stride}p{self.padding}{extra}"

    def out_size(self, size: int) -> int:
        if not self.transposed:
            return (size + 2 * self.padding - self.kernel) // self.stride + 1
        return (size - 1) * self.stride - 2 * self.padding + self.kernel + self.output_padding


@dataclass(frozen=True)
class Layer:
    """Batch, channels and side of the (square) map."""

    batch: int
    inputs: int
    outputs: int
    side: int

    @property
    def name(self) -> str:
        return f"{self.inputs}->{self.outputs} {self.batch}x{self.side}x{self.side}"


CONFIGS = [Config(4, 2, 1), Config(3, 1, 1), Config(2, 2, 0), Config(3, 2, 1, 1), Config(4, 1, 0)]
LAYERS = [Layer(1, 512, 256, 4), Layer(16, 256, 128, 8), Layer(64, 128, 64, 16)]
LATENTS = [Layer(1, 100, 512, 1), Layer(16, 100, 512, 1), Layer(64, 100, 512, 1)]
LAST_LAYERS = [Layer(1, 64, 3, 32), Layer(64, 64, 3, 32)]
QUICK_LAYERS = [Layer(2, 8, 6, 3)]


def useful_flops(config: Config, layer: Layer) -> int:
    """2 per image, pair of channels and pair of an input and an output position that a kernel element joins."""
    # One side's positions are steps apart on the other one's.
    steps, sides = layer.side, config.out_size(layer.side)
    if not config.transposed:
        steps, sides = sides, steps
    joined = [y * config.stride - config.padding + k for y in range(steps) for k in range(config.kernel)]
    per_axis = sum(0 <= at < sides for at in joined)
    return 2 * layer.batch * layer.inputs * (1 if config.depthwise else layer.outputs) * per_axis**2


def modules(config: Config, layer: Layer, last: bool) -> tuple[torch.nn.Sequential, torch.nn.Module]:
    """The Sequential and the layer with the same parameters; statistics as of a network that was trained."""
    from fastgen import nn

    sizes = [layer.inputs, layer.outputs, config.kernel, config.stride, config.padding]
    activation = "tanh" if last else "relu"
    fused, kind = (nn.ConvBNAct, torch.nn.Conv2d)
    if config.transposed:
        fused, kind = nn.ConvTransposeBNAct, torch.nn.ConvTranspose2d
        sizes.append(config.output_padding)
    groups = layer.inputs if config.depthwise else 1
    fast = fused(*sizes, groups=groups, bias=last, batch_norm=not last, activation=activation)
    if not last:
        torch.nn.init.uniform_(fast[1].running_var, 0.5, 2.0)
        torch.nn.init.normal_(fast[1].running_mean)
    conv = kind(*sizes, groups=groups, bias=last)
    rest = [torch.nn.Tanh()] if last else [torch.nn.BatchNorm2d(layer.outputs), torch.nn.ReLU(inplace=True)]
    plain = torch.nn.Sequential(conv, *rest)
    plain.load_state_dict(fast.state_dict())
    return plain, fast


def fold(plain: torch.nn.Sequential) -> torch.nn.Sequential:
    """The Sequential in eval with its BatchNorm, if any, in the weights."""
    conv, *rest = plain
    if isinstance(rest[0], torch.nn.BatchNorm2d):
        transposed = isinstance(conv, torch.nn.ConvTranspose2d)
        conv, rest = torch.nn.utils.fuse_conv_bn_eval(conv, rest[0], transpose=transposed), rest[1:]
    return torch.nn.Sequential(conv, *rest)


def infer(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)


def step(module: torch.nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Forward pass and the gradients of the input and all parameters."""
    return torch.autograd.grad(module(x), [x, *module.parameters()], grad)


def compiled(module: torch.nn.Module, x: Tensor, freezing: bool) -> Callable[[Tensor], Tensor]:
    from torch._inductor import config

    with config.patch(freezing=freezing):
        function = torch.compile(module, dynamic=False)
        infer(function, x)
    return function


def build_inference(config: Config, layer: Layer, last: bool, with_compile: bool) -> Work:
    torch.manual_seed(0)
    plain, fast = (module.eval() for module in modules(config, layer, last))
    x = torch.randn(layer.batch, layer.inputs, layer.side, layer.side)
    rows = x.contiguous(memory_format=torch.channels_last)

    def channels_last(module: torch.nn.Module) -> torch.nn.Module:
        return copy.deepcopy(module).to(memory_format=torch.channels_last)

    skipped = {}
    providers = {
        "eager": Provider(partial(infer, plain, x), True),
        "eager channels_last": Provider(partial(infer, channels_last(plain), rows), True),
        "folded channels_last": Provider(partial(infer, channels_last(fold(plain)), rows), True),
    }
    for name, freezing in (("compile", False), ("compile freezing", True)) if with_compile else ():
        try:
            torch._dynamo.reset()
            providers[name] = Provider(partial(infer, compiled(channels_last(plain), rows, freezing), rows), True)
        except Exception as error:  # whatever the compiler's stack raises: it is not what is measured
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    providers["fastgen"] = Provider(partial(infer, fast, rows))
    providers["fastgen contiguous"] = Provider(partial(infer, fast, x))
    providers["fastgen bfloat16"] = Provider(partial(infer, copy.deepcopy(fast).bfloat16(), rows.bfloat16()))
    numbers = x.numel() + plain[0].weight.numel() + layer.batch * layer.outputs * config.out_size(layer.side) ** 2
    return Work(providers, useful_flops(config, layer), 4 * numbers, skipped)


def build_training(config: Config, layer: Layer, last: bool) -> Work:
    torch.manual_seed(0)
    x = torch.randn(layer.batch, layer.inputs, layer.side, layer.side)
    out = config.out_size(layer.side)
    grad = torch.randn(layer.batch, layer.outputs, out, out)

    def provider(which: int, memory_format: torch.memory_format, baseline: bool) -> Provider:
        torch.manual_seed(1)
        module = modules(config, layer, last)[which].train().to(memory_format=memory_format)
        layout = partial(torch.Tensor.contiguous, memory_format=memory_format)
        return Provider(partial(step, module, layout(x).clone().requires_grad_(), layout(grad)), baseline)

    providers = {
        "eager": provider(0, torch.contiguous_format, True),
        "eager channels_last": provider(0, torch.channels_last, True),
        "fastgen": provider(1, torch.channels_last, False),
        "fastgen contiguous": provider(1, torch.contiguous_format, False),
    }
    weights = layer.inputs * layer.outputs * config.kernel**2
    # Forward and backward read x and the weights; the output is written, its gradient read; gradients are written.
    numbers = 3 * x.numel() + 2 * grad.numel() + 3 * weights
    return Work(providers, 3 * useful_flops(config, layer), 4 * numbers)


def case(config: Config, layer: Layer, last: bool, train: bool, with_compile: bool = False) -> Case:
    channels = [layer.inputs, layer.outputs] if config.transposed else [layer.outputs, layer.inputs]
    name = f"{config.name} {layer.name} {'forward+backward' if train else 'forward'}"
    shapes = {
        "x": [layer.batch, layer.inputs, layer.side, layer.side],
        "weight": [*channels, config.kernel, config.kernel],
    }
    build = partial(build_training, config, layer, last)
    if not train:
        build = partial(build_inference, config, layer, last, with_compile)
    return Case(name, shapes, build)


def cases(quick: bool) -> list[Case]:
    result = []

    def add(*args: Any, **options: Any) -> None:
        result.append(case(*args, **options))

    bar = CONFIGS[0]  # DCGAN's
    for config in CONFIGS:
        layers = QUICK_LAYERS if quick else LATENTS if config.stride == 1 and config.padding == 0 else LAYERS
        for layer in layers:
            add(config, layer, False, False, with_compile=not quick and (config is bar or layer is layers[1]))
    for layer in QUICK_LAYERS if quick else LAYERS:
        add(bar, layer, False, True)
    for layer in [Layer(1, 8, 3, 4)] if quick else LAST_LAYERS:
        add(bar, layer, True, False, with_compile=not quick)
        add(bar, layer, True, True)
    return result
