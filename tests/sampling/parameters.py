"""What the C++ executor draws from, and how far off it is."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.sampling.executors import Batch
from fastgen.sampling.executors.cpu import CpuExecutor
from fastgen.sampling.plan import Plan


def params_of_known(plan: Plan, images: Tensor) -> Tensor:
    """The parameters [N, P, H, W] that the C++ executor would have drawn these images from."""
    count, _, height, width = images.shape
    params = torch.full((count, plan.head.num_params(images.shape[1]), height, width), torch.nan)
    everywhere = torch.ones(count, height, width, dtype=torch.bool)
    given = Batch(count, seed=0, start=0, known=images, mask=everywhere)
    assert torch.equal(CpuExecutor(plan).sample(given, params), images)
    return params


def errors(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """(largest, root of mean square)"""
    difference = found.double() - truth
    return difference.abs().max().item(), difference.square().mean().sqrt().item()
