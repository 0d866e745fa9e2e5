"""The cases that `make gpu` measures, by suite, and what they check.

Short calls are measured as they are ("eager") and as CUDA graphs, all peers alike; torch.compile brings its own graphs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import concat_elu, gated_unit, generator, logistic_mixture_nll, masked_conv2d, reparameterize
from bench.gpu import samplers
from bench.gpu.place import Check, Place, reason
from bench.harness import gpu
from bench.harness.case import Case, Provider, Work
from bench.harness.layers import backward, without_grad
from bench.sampling import timed

Call = Callable[[], Any]


def peers(place: Place, mode: str, calls: dict[str, Call], flops: float, bytes: float) -> Work:
    """Providers of those calls that work here; all but "fastgen" are baselines, "compile" is in its own mode only."""
    providers: dict[str, Provider] = {}
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name, call in calls.items():
        if name == "compile" and mode != "compile":
            continue
        try:
            _, first = timed(call)
            run = call if mode == "eager" or name == "compile" else gpu.graphed(call, place.device)
            run()
        except Exception as error:  # one broken provider must not cost the others their turn
            (failed if name == "fastgen" else skipped)[name] = reason(error)
            continue
        providers[name] = Provider(run, name != "fastgen", extra={"first_call_s": first})
    return Work(providers, flops, bytes, skipped, failed)


def reparameterize_cases(place: Place) -> Iterator[Case]:
    size = reparameterize.Size(*((3, 5) if place.tiny else (8192, 1024)))

    def build(train: bool, mode: str) -> Work:
        mu, logvar, grad = torch.randn(3, size.samples, size.dimensions, device=place.device)
        grads = [grad, torch.randn(size.samples, device=place.device)]

        def call(function: reparameterize.Function) -> Call:
            inputs = [value.clone().requires_grad_(train) for value in (mu, logvar)]
            return partial(reparameterize.step, function, inputs, grads) if train else partial(function, *inputs)

        calls = {
            "eager": call(reparameterize.formulas),
            "compile": call(place.compiled(reparameterize.formulas)),
            "fastgen": call(reparameterize.fused),
        }
        # Forward: two read, one written. Backward: two and a gradient read, two written; the noise is made again.
        count = mu.numel()
        flops = (2 if train else 1) * reparameterize.FORWARD_FLOPS * count
        return peers(place, mode, calls, flops, 4 * (8 if train else 3) * count)

    for mode in place.modes:
        for train in (False, True):
            name = f"KL {size.name} {'forward+backward' if train else 'forward'}, {mode}"
            yield Case(name, {"mu": [size.samples, size.dimensions]}, partial(build, train, mode))


def logistic_mixture_nll_cases(place: Place) -> Iterator[Case]:
    size = logistic_mixture_nll.Size(*((2, 3, 5, 7, 2) if place.tiny else (256, 3, 32, 32, 10)))

    def build(train: bool, mode: str) -> Work:
        from fastgen import ops

        params = torch.randn(size.batch, size.params, size.height, size.width, device=place.device)
        images = torch.randint(256, (size.batch, size.channels, size.height, size.width), device=place.device).byte()
        run = logistic_mixture_nll.backward if train else logistic_mixture_nll.without_grad

        def call(function: Callable[..., Tensor], memory_format: torch.memory_format) -> Call:
            own = params.contiguous(memory_format=memory_format).clone().requires_grad_(train)
            return partial(run, function, own, images)

        formula = logistic_mixture_nll.formula
        calls = {
            "eager": call(formula, torch.contiguous_format),
            "eager channels_last": call(formula, torch.channels_last),
            "compile": call(place.compiled(formula), torch.channels_last),
            "fastgen": call(ops.logistic_mixture_nll, torch.contiguous_format),
        }
        # Forward: parameters and images read, a number per pixel written. Backward adds the gradient, written.
        bytes = 4 * params.numel() * (2 if train else 1) + images.numel() + 4 * size.pixels
        return peers(place, mode, calls, logistic_mixture_nll.flops(size, train), bytes)

    for mode in place.modes:
        for train in (False, True):
            name = f"{size.name} {'forward+backward' if train else 'forward'}, {mode}"
            yield Case(name, {"batch": size.batch, "params": size.params}, partial(build, train, mode))


def masked_conv2d_cases(place: Place) -> Iterator[Case]:
    def build(size: masked_conv2d.Size, mode: str) -> Work:
        from fastgen import ops

        def made(*shape: int) -> Tensor:
            value = torch.randn(shape, device=place.device, dtype=torch.bfloat16)
            return value.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else value

        x = made(size.batch, size.inputs, size.height, size.width)
        weight, bias = made(size.outputs, size.inputs, size.kernel, size.kernel) * 0.05, made(size.outputs)
        mask = ops.conv_mask(weight.shape, size.mask_type).to(weight)

        def call(function: Callable[..., Tensor], weight: Tensor = weight) -> Call:
            return partial(without_grad, function, (x, weight, bias))

        dense = partial(masked_conv2d.masked_weights, mask=mask)
        calls = {
            "eager": call(dense),
            "masked before": call(partial(torch.conv2d, padding=size.kernel // 2), weight * mask),  # cuDNN alone
            "compile": call(place.compiled(dense)),
            "fastgen": call(partial(ops.masked_conv2d, mask_type=size.mask_type)),
        }
        flops = masked_conv2d.useful_flops(mask.float().cpu(), size.batch, size.height, size.width)
        return peers(place, mode, calls, flops, 2 * (2 * x.numel() + int(mask.sum()) + bias.numel()))

    sizes = [(2, 8, 8, 5, 4)] if place.tiny else [(256, 128, 128, 32, 32), (16, 128, 128, 32, 32)]
    for size in [masked_conv2d.Size(*numbers, kernel=3, mask_type="B") for numbers in sizes]:
        for mode in place.modes:
            shapes = {"batch": size.batch, "channels": size.inputs, "image": [size.height, size.width]}
            yield Case(f"{size.name} bf16, {mode}", shapes, partial(build, size, mode), dtype="bfloat16")


def activations(
    place: Place, mode: str, plain: Callable[..., Tensor], fast: Callable[..., Tensor],
    inputs: Sequence[Tensor], grad: Tensor | None, flops: float, bytes: float,
) -> Work:  # fmt: skip
    """Of feature maps; with the gradients of all inputs where there is one of the output."""

    def call(function: Callable[..., Tensor], memory_format: torch.memory_format) -> Call:
        own = [x.contiguous(memory_format=memory_format).clone().requires_grad_(grad is not None) for x in inputs]
        if grad is None:
            return partial(without_grad, function, own)
        return partial(backward, function, own, grad.contiguous(memory_format=memory_format))

    calls = {
        "eager": call(plain, torch.contiguous_format),
        "eager channels_last": call(plain, torch.channels_last),
        "compile": call(place.compiled(plain), torch.channels_last),
        "fastgen": call(fast, torch.channels_last),
    }
    return peers(place, mode, calls, flops, bytes)


def concat_elu_cases(place: Place) -> Iterator[Case]:
    batch, channels, side = (2, 5, 3) if place.tiny else (64, 160, 32)

    def plain(x: Tensor) -> Tensor:
        return concat_elu.plain(x, dropout=0.5)

    def build(train: bool, mode: str) -> Work:
        from fastgen import ops

        x = torch.randn(batch, channels, side, side, device=place.device)
        grad = torch.randn(batch, 2 * channels, side, side, device=place.device) if train else None
        forward = concat_elu.ELU_FLOPS + 2 * concat_elu.DROPOUT_FLOPS
        flops = x.numel() * (2 * forward + concat_elu.BACKWARD_FLOPS if train else forward)
        # Forward: an input read, two outputs written. Backward: an input and two gradients read, one written.
        bytes = 4 * x.numel() * (7 if train else 3)
        fast = partial(ops.concat_elu, dropout=0.5, seed=1)
        return activations(place, mode, plain, fast, [x], grad, flops, bytes)

    for mode in place.modes:
        for train in (False, True):
            name = f"{channels} dropout {batch}x{side}x{side} {'forward+backward' if train else 'forward'}, {mode}"
            yield Case(name, {"batch": batch, "channels": channels, "side": side}, partial(build, train, mode))


def gated_unit_cases(place: Place) -> Iterator[Case]:
    batch, channels, side = (2, 5, 3) if place.tiny else (64, 160, 32)

    def plain(x: Tensor, residual: Tensor) -> Tensor:
        return gated_unit.plain(x, residual, activation="none")

    def build(train: bool, mode: str) -> Work:
        from fastgen import ops

        residual, output = torch.randn(2, batch, channels, side, side, device=place.device)
        x = torch.randn(batch, 2 * channels, side, side, device=place.device)
        forward = gated_unit.FUNCTION_FLOPS
        flops = output.numel() * (2 * forward + gated_unit.BACKWARD_FLOPS if train else forward)
        # Forward: halves and a residual read, an output written. Backward: halves and a gradient read, halves written.
        bytes = 4 * output.numel() * (9 if train else 4)
        fast = partial(ops.gated_unit, activation="none")
        return activations(place, mode, plain, fast, [x, residual], output if train else None, flops, bytes)

    for mode in place.modes:
        for train in (False, True):
            name = f"residual {channels} {batch}x{side}x{side} {'forward+backward' if train else 'forward'}, {mode}"
            yield Case(name, {"batch": batch, "channels": channels, "side": side}, partial(build, train, mode))


def generator_cases(place: Place) -> Iterator[Case]:
    def build(batch: int, mode: str) -> Work:
        import fastgen

        plain = generator.make(generator.DCGAN, *((2,) if place.tiny else ()))
        flops = generator.flops(plain, plain.inputs(1)) * batch
        network = plain.to(place.device, torch.bfloat16, memory_format=torch.channels_last)
        (z,) = plain.inputs(batch)
        z = z.to(place.device, torch.bfloat16).contiguous(memory_format=torch.channels_last)

        def call(module: generator.Module) -> Call:
            return partial(generator.infer, module, z)

        calls = {
            "eager": call(network),
            "folded": call(generator.fold(network)),
            "compile": call(place.compiled(copy.deepcopy(network))),
            "fastgen": call(fastgen.accelerate(network)),
        }
        numbers = sum(p.numel() for p in network.parameters()) + z.numel() + generator.infer(network, z).numel()
        return peers(place, mode, calls, flops, 2 * numbers)

    for batch in (2,) if place.tiny else (64, 1024):
        for mode in place.modes:
            name = f"DCGAN-64 bf16 channels_last, batch {batch}, {mode}"
            yield Case(name, {"batch": batch}, partial(build, batch, mode), dtype="bfloat16")


SUITES: dict[str, Callable[[Place], Iterator[Case | Check]]] = {
    "reparameterize": reparameterize_cases,
    "logistic_mixture_nll": logistic_mixture_nll_cases,
    "masked_conv2d": masked_conv2d_cases,
    "concat_elu": concat_elu_cases,
    "gated_unit": gated_unit_cases,
    "generator": generator_cases,
    **{
        f"sampling-{backend}": partial(samplers.cases, samplers.Pixels, backend)
        for backend in ("cuda", "triton", "cpu")
    },
    **{f"sampling-codes-{backend}": partial(samplers.cases, samplers.Codes, backend) for backend in ("triton", "cpu")},
}
