"""nearest_code against what is written in PyTorch: `torch.cdist`, the formula of VQ-VAE code, and one matrix product.

All begin with features [N, D, H, W] and end with indices [N, H, W].  Peers get channels-last features, whose vectors
are rows as they lie in memory, and the leanest of them contiguous ones as well, which it has to copy; fastgen is
measured on both.  "compile" is the leanest one compiled, channels-last.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.harness.case import Case, Provider, Work
from bench.harness.layers import without_grad

TESTS = ("tests/ops/test_nearest_code.py",)

CASES = {  # batch, features, side, codes
    "64 features, 512 codes, 64x8x8": (64, 64, 8, 512),
    "64 features, 512 codes, 16x32x32": (16, 64, 32, 512),
    "64 features, 512 codes, 1x8x8": (1, 64, 8, 512),
    "256 features, 1024 codes, 16x16x16": (16, 256, 16, 1024),  # VQGAN
    "256 features, 8192 codes, 4x16x16": (4, 256, 16, 8192),
}
QUICK_CASES = {"5 features, 7 codes, 2x3x3": (2, 5, 3, 7)}


def rows(input: Tensor) -> Tensor:
    return input.permute(0, 2, 3, 1).contiguous().view(-1, input.shape[1])


def indices(found: Tensor, input: Tensor) -> Tensor:
    return found.view(input.shape[0], *input.shape[2:])


def cdist(input: Tensor, codebook: Tensor) -> Tensor:
    return indices(torch.cdist(rows(input), codebook).argmin(1), input)


def formula(input: Tensor, codebook: Tensor) -> Tensor:
    x = rows(input)
    distances = x.pow(2).sum(1, keepdim=True) + codebook.pow(2).sum(1) - 2 * x @ codebook.t()
    return indices(distances.argmin(1), input)


def product(input: Tensor, codebook: Tensor) -> Tensor:
    half_norms = codebook.pow(2).sum(1) / 2
    return indices(torch.addmm(half_norms, rows(input), codebook.t(), beta=-1).argmax(1), input)


def build(batch: int, features: int, side: int, codes: int, with_compile: bool) -> Work:
    from fastgen import ops

    torch.manual_seed(0)
    x, codebook = torch.randn(batch, features, side, side), torch.randn(codes, features)

    def provider(function: Callable[..., Tensor], layout: torch.memory_format, baseline: bool = True) -> Provider:
        return Provider(partial(without_grad, function, (x.clone(memory_format=layout), codebook)), baseline)

    skipped, rows_in_memory = {}, torch.channels_last
    providers = {
        "cdist": provider(cdist, rows_in_memory),
        "formula": provider(formula, rows_in_memory),
        "product": provider(product, rows_in_memory),
        "product contiguous": provider(product, torch.contiguous_format),
    }
    if with_compile:
        try:
            torch._dynamo.reset()
            providers["compile"] = provider(torch.compile(product, dynamic=False), rows_in_memory)
            providers["compile"].call()
        except Exception as error:  # whatever the compiler's stack raises: it is not what is measured
            providers.pop("compile", None)
            skipped["compile"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    providers["fastgen"] = provider(ops.nearest_code, rows_in_memory, False)
    providers["fastgen contiguous"] = provider(ops.nearest_code, torch.contiguous_format, False)
    positions = batch * side * side
    # Features and codes read, int64 written; norms are not counted, they do not depend on the input.
    bytes = 4 * (x.numel() + codebook.numel()) + 8 * positions
    return Work(providers, 2 * positions * codebook.numel(), bytes, skipped)


def cases(quick: bool) -> list[Case]:
    return [
        Case(
            name,
            {"batch": size[0], "features": size[1], "side": size[2], "codes": size[3]},
            partial(build, *size, not quick),
        )
        for name, size in (QUICK_CASES if quick else CASES).items()
    ]
