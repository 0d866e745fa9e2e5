"""OpenMP may give fewer threads than were asked for: results are those of one thread, to the bit, all the same.

Not compared with PyTorch, some of whose convolutions are wrong then.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch
import fastgen
from fastgen import ops

torch.manual_seed(0)
maps, half = torch.randn(4, 32, 16, 16), torch.randn(4, 16, 16, 16)
weight, bias = torch.randn(32, 32, 3, 3), torch.randn(32)
latents = torch.randn(64, 256), torch.randn(64, 256)
images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
mean, var = torch.randn(32), torch.rand(32) + 0.5
CALLS = {
    "masked_conv2d": (lambda x, w, b: ops.masked_conv2d(x, w, b, mask_type="B"), (maps, weight, bias)),
    "shifted_conv2d": (lambda x, w, b: ops.shifted_conv2d(x, w, b, left=1), (maps, weight[:, :, :2], bias)),
    "concat_elu": (lambda x: ops.concat_elu(x, dropout=0.5, seed=1), (maps,)),
    "gated_unit": (ops.gated_unit, (maps, half)),
    "reparameterize": (lambda *x: torch.cat([t.flatten() for t in ops.reparameterize(*x, seed=1)]), latents),
    "logistic_mixture_nll": (lambda p: ops.logistic_mixture_nll(p, images), (torch.randn(4, 50, 16, 16),)),
    "conv_transpose2d_bn_act": (
        lambda x, w: ops.conv_transpose2d_bn_act(x, w, None, mean, var, activation="relu", stride=2), (maps, weight)
    ),
}
WITHOUT_GRADIENT = {
    "conv_transpose2d_bn_act inference": CALLS["conv_transpose2d_bn_act"],
    "conv2d_bn_act": (lambda x, w: ops.conv2d_bn_act(x, w, None, mean, var, activation="relu"), (maps, weight)),
    "group_norm_act": (lambda x: ops.group_norm_act(x, 4, activation="silu"), (maps,)),
    "upfirdn2d": (lambda x: ops.upfirdn2d(x, torch.ones(3, 3), padding=1), (maps,)),
    "nearest_code": (ops.nearest_code, (maps, torch.randn(80, 32))),
    "normal": (lambda x: ops.normal(64, (256,), seed=1) + x, (torch.zeros(()),)),
}


def run(function, tensors, wanted):
    leaves = [tensor.clone().requires_grad_(wanted) for tensor in tensors]
    output = function(*leaves)
    return [output.detach(), *(torch.autograd.grad(output.sum(), leaves) if wanted else ())]


for name, (function, tensors) in [*CALLS.items(), *WITHOUT_GRADIENT.items()]:
    wanted = name in CALLS
    with fastgen.backend("cpu"):
        torch.set_num_threads(4)
        found = run(function, tensors, wanted)
        torch.set_num_threads(1)
        expected = run(function, tensors, wanted)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs), name
print("all equal")
"""


@pytest.mark.parametrize("limit", [1, 2])
def test_fewer_threads_than_asked_for(limit):
    environment = {**os.environ, "OMP_THREAD_LIMIT": str(limit)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout == "all equal\n", done.stderr
