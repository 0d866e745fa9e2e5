"""Sampling a batch of images: the compiled sampler, the naive loop, and one parallel forward pass of the same batch.

The models are those of the papers with random weights, which take the same time as trained ones. "PyTorch" is plain:
the layers of the model run as `F.conv2d(x, weight * mask)`. The floor is the plan's arithmetic: every feature once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness.case import Case, Provider, Work
from bench.harness.environment import cores

TESTS = ("tests/sampling",)


@dataclass(frozen=True)
class Subject:
    """A model to sample.

    whole_loop: small enough to run the naive loop to its end. large: measured on all threads only, and sampled with
    rounded weights and with the other instruction sets as well.
    """

    name: str
    model: str
    config: dict[str, Any] = field(default_factory=dict)
    whole_loop: bool = False
    large: bool = False


SUBJECTS = [
    Subject("PixelCNN++ 3x32x32", "pixelcnnpp", large=True),  # the published size, 53,659,080 parameters
    Subject("PixelSNAIL 3x32x32", "pixelsnail", large=True),  # the published size, 46,180,788 parameters
    Subject("PixelRNN 3x32x32", "pixelrnn", large=True),  # the published size, Row LSTMs
    Subject(  # the published small model, 76,571,648 parameters
        "Image GPT 32x32 codes",
        "image_gpt",
        {"image_shape": (1, 32, 32), "levels": 512, "embedding_dim": 512},
        large=True,
    ),
    Subject("PixelCNN 3x32x32", "pixelcnn", {"image_shape": (3, 32, 32)}),  # the published size, colour masks
    Subject(
        "GatedPixelCNN 1x28x28", "gated_pixelcnn", {"image_shape": (1, 28, 28), "num_filters": 64, "num_blocks": 15}
    ),
    Subject(
        "GatedPixelCNN 1x28x28 binary",
        "gated_pixelcnn",
        {"image_shape": (1, 28, 28), "num_filters": 64, "num_blocks": 15, "levels": 2},
    ),
    Subject(  # a prior over the codes of 128x128 pixels
        "GatedPixelCNN 32x32 codes",
        "gated_pixelcnn",
        {"image_shape": (1, 32, 32), "levels": 512, "embedding_dim": 64, "num_filters": 128, "num_blocks": 15},
    ),
    Subject(
        "GatedPixelCNN digits",  # the model of `fastgen demo`
        "gated_pixelcnn",
        {
            "image_shape": (1, 8, 8),
            "levels": 17,
            "num_classes": 10,
            "num_filters": 32,
            "num_blocks": 6,
            "kernel_size": 3,
        },
        whole_loop=True,
    ),
]
QUICK_SUBJECTS = [
    Subject(
        "PixelCNN 3x5x4", "pixelcnn", {"image_shape": (3, 5, 4), "num_filters": 6, "num_blocks": 1, "num_features": 6}
    ),
    Subject(
        "GatedPixelCNN 1x4x4", "gated_pixelcnn", {"image_shape": (1, 4, 4), "num_filters": 4, "num_blocks": 2}, True
    ),
    Subject(
        "PixelCNN++ 3x4x5",
        "pixelcnnpp",
        {"image_shape": (3, 4, 5), "num_filters": 4, "num_blocks": 1, "num_mixtures": 2},
        large=True,
    ),
    Subject("PixelSNAIL 1x4x5", "pixelsnail", {"image_shape": (1, 4, 5), "num_filters": 4, "num_blocks": 1}, True),
    Subject(
        "Image GPT 1x3x2",
        "image_gpt",
        {"image_shape": (1, 3, 2), "num_filters": 4, "num_blocks": 1, "num_heads": 2},
        large=True,
    ),
]
BATCHES = (1, 16, 64)


def plain_forward(model: nn.Module, *inputs: Tensor | None) -> Tensor:
    """One parallel pass in PyTorch, without fastgen's kernels."""
    import fastgen

    with torch.inference_mode(), fastgen.backend("reference"):
        return model(*inputs)


def fast_forward(model: nn.Module, *inputs: Tensor | None) -> Tensor:
    """One parallel pass with fastgen's kernels."""
    with torch.inference_mode():
        return model(*inputs)


def naive_loop(model: nn.Module, batch: int, labels: Tensor | None) -> Tensor:
    """The naive sampler in PyTorch, to its end."""
    import fastgen
    from fastgen.sampling import naive_sample

    with fastgen.backend("reference"):
        return naive_sample(model, batch, labels=labels)


def sample_with(sampler: Any, batch: int, isa: str) -> Tensor:
    """Samples with the kernels of one instruction set."""
    from fastgen import backends

    backends.native_cpu().set_isa(isa)
    try:
        return sampler.sample(batch)
    finally:
        backends.native_cpu().set_isa("")


def variants(model: nn.Module, sampler: Any, batch: int) -> dict[str, Provider]:
    import fastgen
    from fastgen import backends

    found = {}
    for precision in ("bf16", "int8"):
        rounded = fastgen.Sampler(model, max_batch=batch, backend="cpu", precision=precision)
        bytes_of = {"workspace_bytes": rounded.sample_bytes * batch, "weight_bytes": rounded.weight_bytes}
        note = f"weights in {precision}"
        found[f"fastgen {precision}"] = Provider(partial(rounded.sample, batch), note=note, extra=bytes_of)
    for isa in ("avx2", "baseline"):
        # The portable kernels have a quarter of the rate: one batch size shows it.
        if isa in backends.native_cpu().isas() and (isa == "avx2" or batch == 1):
            found[f"fastgen {isa}"] = Provider(partial(sample_with, sampler, batch, isa))
    return found


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def build(subject: Subject, batch: int) -> Work:
    """A model with random weights, its sampler, and the ways to score or sample `batch` images."""
    import fastgen
    from fastgen import models

    torch.manual_seed(0)
    model = models.get(subject.model)(**subject.config).eval()
    for parameter in model.parameters():  # a last layer that starts at zero would leave nothing to compute
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    images = torch.randint(model.levels, (batch, *model.image_shape), dtype=model.head.dtype)
    labels = None if model.num_classes is None else torch.arange(batch) % model.num_classes
    inputs = (model.head.encode(images), labels)
    sampler, compile_seconds = timed(lambda: fastgen.Sampler(model, max_batch=batch, backend="cpu"))
    plan = sampler.plan

    forward = partial(plain_forward, model, *inputs)
    channels, height, width = model.image_shape
    passes = len(model.head.groups(channels)) * height * width
    if subject.whole_loop:
        naive = Provider(partial(naive_loop, model, batch, labels), baseline=True, note=f"{passes} passes, to the end")
    else:
        naive = Provider(
            forward,
            baseline=True,
            scale=passes,
            note=f"estimate: one forward pass times the {passes} passes of the loop",
        )
    last = models.get(subject.model)(**subject.config).eval()
    last.load_state_dict(model.state_dict())
    last = last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    last_inputs = (inputs[0].contiguous(memory_format=torch.channels_last), labels)
    providers = {
        "naive": naive,
        "forward": Provider(forward, baseline=True, note="scores the batch, draws nothing"),
        "forward channels_last": Provider(partial(plain_forward, last, *last_inputs), baseline=True),
        "forward fastgen": Provider(partial(fast_forward, model, *inputs), note="the parallel pass with masked_conv2d"),
        "fastgen": Provider(
            partial(sampler.sample, batch, labels=labels),
            extra={
                "compile_s": compile_seconds,
                "workspace_bytes": sampler.sample_bytes * batch,
                "weight_bytes": sampler.weight_bytes,
                "mflop_per_sample": plan.flops / 1e6,
                "executed_mflop_per_sample": sampler.flops / 1e6,
            },
        ),
    }
    if subject.large:
        providers |= variants(model, sampler, batch) if batch <= 16 else {}
        if batch > 16:  # half a minute a pass
            del providers["forward channels_last"], providers["forward fastgen"]
    return Work(providers, flops=plan.flops * batch, bytes=sampler.weight_bytes + images.numel())


def cases(quick: bool) -> list[Case]:
    """Every model at every batch size, on one thread and on all."""
    result = []
    for subject in QUICK_SUBJECTS if quick else SUBJECTS:
        for batch in (2,) if quick else BATCHES:
            for threads in (1,) if quick else {cores()} if subject.large else sorted({1, cores()}):
                count = "1 thread" if threads == 1 else f"{threads} threads"
                result.append(
                    Case(
                        f"{subject.name}, batch {batch}, {count}",
                        {
                            "batch": batch,
                            **{k: list(v) if isinstance(v, tuple) else v for k, v in subject.config.items()},
                        },
                        partial(build, subject, batch),
                        threads=threads,
                    )
                )
    return result
