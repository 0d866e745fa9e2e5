"""Whole generators, accelerated: DCGAN-64 with 64 base filters, the decoder of a U-Net for 64-pixel images, and one of
linear layers.

"eager" is the module as users run it, in eval. "folded" has the BatchNorms in the weights, "freezing" is torch.compile
that folds and repacks them. The floor counts the taps that fall inside the image and multiply no zero; an algorithm
that multiplies less (Winograd's) is counted the same, and may pass it. Every row has the largest error against float64
and the seconds of the first call; further cases are the first call after `accelerate`, with packing, and 200 sizes in
turn, each compared with the time that it takes once it is known. Training compares `fastgen.nn` with the same layers.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.conv_transpose2d_bn_act import Config, Layer, useful_flops
from bench.harness.case import Case, Provider, Work

TESTS = ("tests/acceleration/test_accelerate.py", "tests/ops/test_conv_transpose2d_bn_act.py")
BATCHES = (1, 16, 64)
FIRST, UP = Config(4, 1, 0), Config(4, 2, 1)
NEW_MODULES = 5  # that meet all sizes
STEADY_SWEEPS = 5  # through the sizes, after the first

Module = Callable[..., Tensor]


def block(inputs: int, outputs: int, config: Config = UP, last: bool = False) -> nn.Sequential:
    conv = nn.ConvTranspose2d(inputs, outputs, config.kernel, config.stride, config.padding, bias=last)
    return nn.Sequential(conv, nn.Tanh()) if last else nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(True))


class DCGAN(nn.Module):
    """Radford et al. 2016, 64 pixels: 0.181 GFLOP per image."""

    def __init__(self, filters: int = 64, latent: int = 100):
        super().__init__()
        widths = [latent, 8 * filters, 4 * filters, 2 * filters, filters]
        blocks = [block(a, b, UP if i else FIRST) for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False))]
        self.blocks = nn.Sequential(*blocks, block(filters, 3, last=True))
        self.latent = latent

    def forward(self, z: Tensor) -> Tensor:
        return self.blocks(z)

    def inputs(self, batch: int, height: int = 1, width: int = 1) -> tuple[Tensor, ...]:
        return (torch.randn(batch, self.latent, height, width),)


class UNetDecoder(nn.Module):
    """Isola et al. 2017, with six levels for 64 pixels: what comes from below and a skip side by side, up by two."""

    def __init__(self, filters: int = 64):
        super().__init__()
        widths = [8 * filters, 8 * filters, 8 * filters, 4 * filters, 2 * filters, filters]
        pairs = zip(widths, widths[1:], strict=False)
        self.blocks = nn.ModuleList([block(2 * a if i else a, b) for i, (a, b) in enumerate(pairs)])
        self.image = block(2 * filters, 3, last=True)
        self.widths = widths

    def forward(self, x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor) -> Tensor:
        for up, skip in zip(self.blocks, (a, b, c, d, e), strict=True):
            x = torch.cat([up(x), skip], 1)
        return self.image(x)

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(batch, width, 2**i, 2**i) for i, width in enumerate(self.widths))


class LinearGenerator(nn.Module):
    """Goodfellow et al. 2014, of linear layers, as most code has it: 28 pixels, 3.0 MFLOP per image."""

    def __init__(self, filters: int = 128, latent: int = 100, size: int = 28):
        super().__init__()
        widths = [filters << i for i in range(4)]
        self.blocks = nn.Sequential(nn.Sequential(nn.Linear(latent, filters), nn.LeakyReLU(0.2, inplace=True)))
        for a, b in zip(widths, widths[1:], strict=False):
            self.blocks.append(nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b, 0.8), nn.LeakyReLU(0.2, inplace=True)))
        self.blocks.append(nn.Sequential(nn.Linear(widths[-1], size * size), nn.Tanh()))
        self.latent, self.size = latent, size

    def forward(self, z: Tensor) -> Tensor:
        return self.blocks(z).view(-1, 1, self.size, self.size)

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, self.latent),)


GENERATORS: dict[str, Callable[..., Any]] = {
    **{"DCGAN-64": DCGAN, "U-Net decoder 64": UNetDecoder},
    "linear layers, 1x28x28": LinearGenerator,
}


def make(kind: Callable[..., Any], *sizes: int) -> Any:
    """In eval, with statistics as of a network that was trained."""
    torch.manual_seed(0)
    network = kind(*sizes).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, 0.0, 0.1)
    return network


def joined(config: Config, side: int) -> int:
    """Pairs of an input and an output position of an axis that a kernel element joins, of a transposed convolution."""
    return round((useful_flops(config, Layer(1, 1, 1, side)) / 2) ** 0.5)


def flops(network: nn.Module, *calls: Sequence[Tensor]) -> int:
    """Of the convolutions, transposed or not, without padding, and of linear layers."""
    total = 0

    def count_linear(linear: Any, args: tuple[Tensor, ...], _: Tensor) -> None:
        nonlocal total
        total += 2 * linear.weight.numel() * len(args[0])

    def count(conv: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        config = Config(conv.kernel_size[0], conv.stride[0], conv.padding[0])
        # The inputs that an ordinary convolution joins to outputs are what a transposed one joins the other way.
        smaller, other = (args[0], output) if isinstance(conv, nn.ConvTranspose2d) else (output, args[0])
        batch, channels, height, width = smaller.shape
        total += 2 * batch * channels * other.shape[1] // conv.groups * joined(config, height) * joined(config, width)

    hooked = copy.deepcopy(network)
    for module in hooked.modules():
        if isinstance(module, nn.ConvTranspose2d | nn.Conv2d):
            module.register_forward_hook(count)
        elif isinstance(module, nn.Linear):
            module.register_forward_hook(count_linear)
    for inputs in calls:
        infer(hooked, *inputs)
    return total


def infer(module: Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return module(*inputs)


def fold(network: nn.Module) -> nn.Module:
    """With every BatchNorm in the weights of the convolution before it."""
    folded = copy.deepcopy(network)
    for module in folded.modules():
        if not isinstance(module, nn.Sequential) or len(module) < 3:
            continue
        if isinstance(module[1], nn.BatchNorm1d):
            module[0] = nn.utils.fusion.fuse_linear_bn_eval(module[0], module[1])
            module[1] = nn.Identity()
        if isinstance(module[1], nn.BatchNorm2d):
            transposed = isinstance(module[0], nn.ConvTranspose2d)
            module[0] = nn.utils.fuse_conv_bn_eval(module[0], module[1], transpose=transposed)
            module[1] = nn.Identity()
    return folded


def compiled(network: nn.Module, freezing: bool, *inputs: Tensor) -> Module:
    from torch._inductor import config

    torch._dynamo.reset()
    with config.patch(freezing=freezing):
        function = torch.compile(network, dynamic=False)
        infer(function, *inputs)
    return function


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def channels_last(value: Any) -> Any:
    return copy.deepcopy(value).to(memory_format=torch.channels_last)


def build(kind: Callable[..., Any], sizes: Sequence[int], batch: int, with_compile: bool) -> Work:
    import fastgen
    from fastgen import backends

    network = make(kind, *sizes)
    inputs = network.inputs(batch)
    rows = tuple(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs)
    peers: Makers = {
        "eager": (lambda: network, inputs),
        "eager channels_last": (partial(channels_last, network), rows),
        "folded channels_last": (lambda: channels_last(fold(network)), rows),
    }
    for name, freezing in (("compile", False), ("compile freezing", True)) if with_compile else ():
        peers[name] = (partial(compiled, channels_last(network), freezing, *rows), rows)
    ours: Makers = {"fastgen": (partial(fastgen.accelerate, network), rows)}
    if hasattr(backends.native_cpu(), "conv_bn_act_bfloat16"):
        half = tuple(x.bfloat16() for x in rows)
        ours["fastgen bf16"] = (lambda: fastgen.accelerate(network).bfloat16(), half)
    return measure(network, inputs, peers, ours, flops(network, inputs))


Makers = dict[str, tuple[Callable[[], Module], Sequence[Tensor]]]  # by provider, what makes its module, and the inputs


def measure(network: nn.Module, inputs: Sequence[Tensor], peers: Makers, ours: Makers, flops: int) -> Work:
    """Of the makers, each with its largest error against float64; what torch.compile cannot make is skipped."""
    exact = infer(copy.deepcopy(network).double(), *(x.double() for x in inputs))
    providers, skipped = {}, {}
    for name, (prepare, given) in (peers | ours).items():
        try:
            module, seconds = timed(prepare)
            output, first = timed(partial(infer, module, *given))
        except Exception as error:  # whatever the compiler's stack raises: it is not what is measured
            if not name.startswith("compile"):
                raise
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            continue
        extra = {"prepare_s": seconds, "first_call_s": first, "max_error": float((output.double() - exact).abs().max())}
        providers[name] = Provider(partial(infer, module, *given), name in peers, extra=extra)
    weights = sum(parameter.numel() for parameter in network.parameters())
    numbers = weights + exact.numel() + sum(x.numel() for x in inputs)
    return Work(providers, flops, 4 * numbers, skipped)


def build_first_call(kind: Callable[..., Any], sizes: Sequence[int]) -> Work:
    """Of a generator that was loaded: accelerate it, pack the weights, make one image."""
    import fastgen

    network = make(kind, *sizes)
    inputs = network.inputs(1)
    infer(fastgen.accelerate(network), *inputs)  # imports, threads

    def first() -> Tensor:
        return infer(fastgen.accelerate(network), *inputs)

    calls = [timed(partial(infer, fastgen.accelerate(network), *inputs))[1] for _ in range(5)]
    providers = {
        "eager": Provider(partial(infer, network, *inputs), True, note="any call"),
        "fastgen": Provider(
            first,
            note="accelerate and first call, packing included",
            extra={"first_call_s": statistics.median(calls)},
        ),
    }
    weights = sum(parameter.numel() for parameter in network.parameters())
    return Work(providers, flops(network, inputs), 4 * weights)


def sizes_of(count: int) -> list[tuple[int, int]]:
    """`count` different heights and widths of a latent map, from 1 to 15, small and larger in turn."""
    return [(at // 15 + 1, at % 15 + 1) for at in (7 * i % 225 for i in range(count))]


def new_sizes(build: Callable[[], Module], inputs: Sequence[Sequence[Tensor]]) -> dict[str, float]:
    """How much longer the first call of a size takes than the later ones.

    The sizes come in turn, again and again: a later call finds in the caches what the same size before it left there,
    as the first one did. Of several new modules the median, as one call tells more of the machine. Processor time would
    leave other processes out, but that of other threads is counted in ticks of milliseconds.
    """
    ratios: list[list[float]] = [[] for _ in inputs]
    worst = 0.0
    for _ in range(NEW_MODULES):
        module = build()
        sweeps = [[timed(partial(infer, module, *given))[1] for given in inputs] for _ in range(1 + STEADY_SWEEPS)]
        worst = max(worst, *sweeps[0])
        for of_size, (first, *later) in zip(ratios, zip(*sweeps, strict=True), strict=True):
            of_size.append(first / statistics.median(later))
    medians = sorted(statistics.median(of_size) for of_size in ratios)
    return {
        "new_size_ratio_median": statistics.median(medians),
        "new_size_ratio_p99": medians[int(0.99 * (len(medians) - 1))],
        "new_size_ratio_max": medians[-1],
        "above_1_5": sum(ratio > 1.5 for ratio in medians),
        "longest_s": worst,
    }


def build_sizes(sizes: Sequence[int], count: int) -> Work:
    """One pass over maps of `count` sizes; what a size costs when it comes for the first time is in `extra`."""
    import fastgen

    network = make(DCGAN, *sizes)
    inputs = [network.inputs(1, height, width) for height, width in sizes_of(count)]

    def sweep(module: Module) -> None:
        for given in inputs:
            infer(module, *given)

    def build_one(accelerate: bool) -> Module:
        module = copy.deepcopy(network)  # weights that nothing is known of
        if accelerate:
            module = fastgen.accelerate(module)
        infer(module, *network.inputs(1, 16, 16))  # packs
        return module

    providers = {}
    for name, accelerate in (("eager", False), ("fastgen", True)):
        build_new = partial(build_one, accelerate)
        extra = new_sizes(build_new, inputs)
        providers[name] = Provider(partial(sweep, build_new()), name == "eager", extra=extra)
    weights = sum(parameter.numel() for parameter in network.parameters())
    return Work(providers, flops(network, *inputs), 4 * weights)


def step(module: nn.Module, z: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Forward pass and the gradients of all parameters, as in a step of the generator."""
    return torch.autograd.grad(module(z), list(module.parameters()), grad)


def build_training(sizes: Sequence[int], batch: int) -> Work:
    from fastgen import nn as fast

    plain = make(DCGAN, *sizes).train()
    (z,) = plain.inputs(batch)
    grad = torch.randn_like(plain(z))
    fused = copy.deepcopy(plain)
    for i, part in enumerate(plain.blocks):
        conv, last = part[0], isinstance(part[1], nn.Tanh)
        steps = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        options = {"bias": last, "batch_norm": not last, "activation": "tanh" if last else "relu"}
        fused.blocks[i] = fast.ConvTransposeBNAct(*steps, **options)
    fused.load_state_dict(plain.state_dict())
    rows = grad.contiguous(memory_format=torch.channels_last)
    providers = {
        "eager": Provider(partial(step, plain, z, grad), True),
        "eager channels_last": Provider(partial(step, channels_last(plain), z, rows), True),
        "fastgen": Provider(partial(step, fused.train(), z, rows)),
    }
    return Work(providers, 3 * flops(plain, (z,)), 4 * 2 * sum(p.numel() for p in plain.parameters()))


def cases(quick: bool) -> list[Case]:
    result = []
    sizes = (2,) if quick else ()  # base filters
    for name, kind in GENERATORS.items():
        for batch in (2,) if quick else BATCHES:
            call = partial(build, kind, sizes, batch, not quick)
            result.append(Case(f"{name}, batch {batch}", {"batch": batch}, call))
        result.append(Case(f"{name}, first call", {"batch": 1}, partial(build_first_call, kind, sizes)))
    count = 3 if quick else 200
    result.append(Case(f"DCGAN-64, {count} sizes", {"sizes": count}, partial(build_sizes, sizes, count)))
    for batch in (2,) if quick else (16, 64):
        call = partial(build_training, sizes, batch)
        result.append(Case(f"DCGAN-64, batch {batch}, forward+backward", {"batch": batch}, call))
    return result
