"""Calls of the launchers in the sizes of published models: what is compiled for every GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import models
from fastgen.nn import MaskedConv2d
from fastgen.sampling import Bernoulli, Categorical
from tests.kernels.attending import Attend, Attending, Padded, at_a_distance, capped, earlier, mixed, not_hidden

Case = tuple[str, str, Callable[[], tuple[Any, ...]]]  # module, function, arguments
FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16


def image(channels: int, size: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(1, channels, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)


def philox() -> dict[str, Case]:
    words = torch.zeros(4096, dtype=torch.int64)
    return {"philox": ("philox", "uint32", lambda: (0, words, words, words))}


def reparameterize(columns: int, dtype: torch.dtype) -> dict[str, Case]:
    mu, kl = torch.zeros(64, columns, dtype=dtype), torch.zeros(64)
    z = torch.zeros(64, columns)
    return {
        "reparameterize": ("reparameterize", "forward", lambda: (mu, mu, 3, 0, 0)),
        "reparameterize_grad": ("reparameterize", "backward", lambda: (z, kl, mu, mu, 3, 0, 0)),
    }


def nll(colors: int, dtype: torch.dtype, layout: torch.memory_format) -> dict[str, Case]:
    """10 components, as PixelCNN++."""
    params = torch.zeros(2, 100 if colors == 3 else 30, 32, 32, dtype=dtype).contiguous(memory_format=layout)
    images, grad = torch.zeros(2, colors, 32, 32, dtype=torch.uint8), torch.zeros(2, 32, 32)
    module, early = "logistic_mixture_nll", (torch.zeros_like(params), torch.zeros(2048))
    return {
        module: (module, "forward", lambda: (params, images, 256)),
        f"{module}_training": (module, "training_forward", lambda: (params, images, 256)),
        f"{module}_training_grad": (module, "backward", lambda: (grad, params, images, 256, *early)),
        f"{module}_grad": (module, "backward", lambda: (grad, params, images, 256)),
    }


def codes(depth: int, count: int, dtype: torch.dtype, layout: torch.memory_format) -> dict[str, Case]:
    x = torch.zeros(2, depth, 16, 16, dtype=dtype).contiguous(memory_format=layout)
    codebook = torch.zeros(count, depth, dtype=dtype)
    return {"nearest_code": ("nearest_code", "nearest_code", lambda: (x, codebook))}


def concat_elu(channels: int, dtype: torch.dtype, dropout: float, negate: bool = True) -> dict[str, Case]:
    x, grad = image(channels, 8, dtype), image(2 * channels if negate else channels, 8, dtype)
    options = (negate, dropout, 5)
    return {
        "concat_elu": ("concat_elu", "forward", lambda: ([x], *options)),
        "concat_elu_grad": ("concat_elu", "backward", lambda: (grad, [x], *options)),
    }


def gated_unit(channels: int, dtype: torch.dtype, activation: str, with_residual: bool) -> dict[str, Case]:
    """Of so many channels of the output."""
    x, half = image(2 * channels, 8, dtype), image(channels, 8, dtype)
    residual = half if with_residual else None
    return {
        "gated_unit": ("gated_unit", "forward", lambda: (x, residual, activation)),
        "gated_unit_grad": ("gated_unit", "backward", lambda: (half, x, activation)),
    }


def masked(channels: int, dtype: torch.dtype, colors: int = 1) -> dict[str, Case]:
    """A 3x3 layer of type B."""
    x, bias = image(channels, 8, dtype), torch.zeros(channels, dtype=dtype)
    weight, mask = torch.zeros(channels, channels, 3, 3, dtype=dtype), ("B", colors, 1)
    return {
        "masked_conv2d": ("masked_conv2d", "forward", lambda: (x, weight, bias, *mask)),
        "masked_conv2d_input_grad": ("masked_conv2d", "input_gradient", lambda: (x, weight, *mask)),
        "masked_conv2d_weight_grad": ("masked_conv2d", "weight_gradients", lambda: (x, x, (3, 3), *mask)),
    }


def transposed(
    channels: int, out: int, size: int, dtype: torch.dtype, activation: str,
    layout: torch.memory_format = torch.contiguous_format,
) -> dict[str, Case]:  # fmt: skip
    """A layer of DCGAN: k4s2p1 with BatchNorm."""
    x = image(channels, size, dtype)
    weight = torch.zeros(channels, out, 4, 4, dtype=dtype).contiguous(memory_format=layout)
    vectors = [None, *torch.zeros(4, out, dtype=dtype)]
    rest = ([2, 2], [1, 1], [0, 0], 1, [1, 1])
    grad = image(out, 2 * size, dtype)
    saved = (grad, torch.zeros(out, dtype=dtype), torch.zeros(out, dtype=dtype))
    module = "conv_transpose2d_bn_act"
    infer, train = (False, 1e-5, activation, 0.01), (True, 1e-5, activation, 0.01)
    return {
        module: (module, "forward", lambda: (x, weight, *vectors, *rest, *infer)),
        f"{module}_saving": (module, "saving", lambda: (x, weight, *vectors, *rest, *train)),
        f"{module}_grad": (
            module, "backward", lambda: (grad, x, weight, *vectors[3:], *saved, *rest, *train, [True, True])
        ),
    }  # fmt: skip


class Primitives(torch.nn.Module):
    """A step with nearly all the primitives of a plan."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = MaskedConv2d(1, 4, 3, mask_type="A")
        self.out = torch.nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = F.gelu(x) + F.mish(x) / (1.5 + F.hardsigmoid(x)) - F.selu(x)
        return self.out(torch.sigmoid(torch.expm1(x) + torch.sqrt(torch.abs(x))))


def plan(
    network: Callable[[], torch.nn.Module], precision: str, products: str, *groups: int, streams: int = 1, **given: Any
) -> Callable[[], None]:
    """Of what sampling a network launches: draws, for samples of so many rows, attention, and of the products of each
    stage with so many groups the longest program in all tiles.
    """

    def launch() -> None:
        from fastgen.sampling import Sampler
        from fastgen.sampling.executors.triton import TritonExecutor, tiles
        from fastgen.sampling.schedule import Stage

        # The plan of a sampler on the CPU keeps no weights; their values do not matter here.
        kept = Sampler(network(), **given, precision=precision, backend="reference").plan
        executor = TritonExecutor(kept, torch.device("cpu"))
        space = executor.space(streams, products, streams)
        executor.launch_row(((), (), True), space)
        for step in kept.steps:
            if step.attention is not None:
                executor.launch_step(step, space, 0, 1)
        products_of = [s for s in kept.steps if s.attention is None]
        for count in groups:
            for stage in Stage:
                several = [s for s in products_of if (s.stage, s.groups) == (stage, count)]
                if several:
                    step = max(several, key=lambda s: len(s.program))
                    for tile in tiles(step, precision, products):
                        space.count = max(1, tile.programs * tile.rows)
                        executor.launch_step(step, space, 0, 1)

    return launch


def pixelcnnpp() -> torch.nn.Module:
    return models.PixelCNNpp(image_shape=(3, 2, 2), num_filters=64, num_blocks=1)


def gated() -> torch.nn.Module:
    """Of channels that are no multiples of four."""
    return models.GatedPixelCNN(image_shape=(1, 2, 2), levels=256, num_filters=7, num_blocks=1)


def attending(heads: int, depth: int, width: int, attend: Attend = earlier) -> Callable[[], torch.nn.Module]:
    """Kernels that attend do not depend on the number of keys."""
    return lambda: Attending(attend, (2, 2), heads, depth, width)


def codebook(count: int) -> torch.nn.Module:
    return torch.nn.Sequential(MaskedConv2d(1, 4, 3, mask_type="A"), torch.nn.Conv2d(4, count, 1))


def named(suffix: str, cases: dict[str, Case]) -> dict[str, Case]:
    return {f"{name} {suffix}": case for name, case in cases.items()}


CASES: dict[str, Case] = {
    **philox(),
    **named("1024 fp32", reparameterize(1024, FLOAT)),
    **named("2 bf16", reparameterize(2, BFLOAT)),
    **named("rgb fp32", nll(3, FLOAT, torch.contiguous_format)),
    **named("rgb bf16 channels-last", nll(3, BFLOAT, torch.channels_last)),
    **named("grey fp32", nll(1, FLOAT, torch.contiguous_format)),
    **named("64 fp32", codes(64, 512, FLOAT, torch.contiguous_format)),
    **named("256 fp32 channels-last", codes(256, 1024, FLOAT, torch.channels_last)),
    **named("64 bf16 channels-last", codes(64, 512, BFLOAT, torch.channels_last)),
    **named("256 bf16", codes(256, 8192, BFLOAT, torch.contiguous_format)),
    **named("3 fp16", codes(3, 17, HALF, torch.contiguous_format)),
    **named("160 fp32", concat_elu(160, FLOAT, 0.0)),
    **named("160 fp32 dropout", concat_elu(160, FLOAT, 0.5)),
    **named("160 bf16 dropout", concat_elu(160, BFLOAT, 0.5)),
    **named("80 bf16 dropout, draws of four", concat_elu(80, BFLOAT, 0.5)),
    **named("33 fp16 dropout, draws of one", concat_elu(33, HALF, 0.5)),
    **named("160 fp32 dropout, no negatives", concat_elu(160, FLOAT, 0.5, negate=False)),
    **named("64 fp32 tanh", gated_unit(64, FLOAT, "tanh", False)),
    **named("64 bf16 tanh", gated_unit(64, BFLOAT, "tanh", False)),
    **named("160 fp32 residual", gated_unit(160, FLOAT, "none", True)),
    **named("7 fp16 residual", gated_unit(7, HALF, "none", True)),
    **named("128 bf16", masked(128, BFLOAT)),
    **named("128 fp32", masked(128, FLOAT)),
    **named("128 tf32", masked(128, FLOAT)),
    **named("3 fp16", masked(3, HALF, 3)),
    **named("128 to 64 bf16", transposed(128, 64, 8, BFLOAT, "relu")),
    **named("256 to 128 bf16 channels-last", transposed(256, 128, 8, BFLOAT, "elu", torch.channels_last)),
    **named("128 to 64 fp32", transposed(128, 64, 8, FLOAT, "leaky_relu")),
    **named("64 to 3 fp16", transposed(64, 3, 8, HALF, "tanh")),
    **named("128 to 64 silu", transposed(128, 64, 8, BFLOAT, "silu")),
    **named("128 to 64 gelu", transposed(128, 64, 8, FLOAT, "gelu")),
}

GIVEN = {"image_shape": (1, 2, 2), "head": Categorical(5)}
PLANS: dict[str, Callable[[], None]] = {
    "sample_plan PixelCNN++ fp32": plan(pixelcnnpp, "fp32", "ieee", 0, 2),
    "sample_plan PixelCNN++ bf16": plan(pixelcnnpp, "bf16", "ieee", 2),
    "sample_plan gated tf32": plan(gated, "fp32", "tf32", 2),
    "sample_plan primitives fp32": plan(Primitives, "fp32", "ieee", 1, image_shape=(1, 2, 2), head=Bernoulli()),
    **{
        f"sample_plan {count} codes, {streams} rows": plan(
            lambda count=count: codebook(count),
            "fp32",
            "ieee",
            streams=streams,
            image_shape=(1, 2, 2),
            head=Categorical(count),
        )
        for count in (512, 2048, 16384)
        for streams in (1, 2)
    },
    "sample_plan attention padded": plan(
        lambda: Padded(not_hidden, (2, 2), 8, 64, 64), "fp32", "ieee", **GIVEN, condition=torch.zeros(4)
    ),
    **{
        f"sample_plan attention {name}": plan(network, "fp32", "ieee", **GIVEN)
        for name, network in {
            "PixelSNAIL": attending(8, 16, 16),
            "PixelSNAIL, wide values": attending(1, 16, 128),
            "GPT": attending(8, 64, 64),
            "GPT, relative positions": attending(8, 64, 64, at_a_distance),
            "wide, relative positions": attending(4, 128, 128, at_a_distance),
            "wide, capped": attending(4, 128, 128, capped),
            "mixed": attending(1, 1, 512, mixed),
            "channels that are no multiples of four": attending(3, 49, 63, at_a_distance),
            "channels that are no multiples of four, capped": attending(3, 49, 63, capped),
        }.items()
    },
}
