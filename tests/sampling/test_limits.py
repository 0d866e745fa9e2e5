"""Networks with very many taps and very long chains: nothing in the executor has a fixed size."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import backends
from fastgen.sampling import Categorical, Sampler, naive_sample

LEVELS = 3


class Dense(nn.Module):
    """Every layer reads all earlier ones; a chain of a hundred element by element operations at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(1 + 2 * i, 2, (2, 7)) for i in range(12))
        self.out = nn.Conv2d(25, LEVELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [F.pad(x, (0, 0, 1, 0))[:, :, :-1]]
        for layer in self.layers:
            features.append(torch.tanh(layer(F.pad(torch.cat(features, 1), (3, 3, 1, 0)))))
        h = self.out(torch.cat(features, 1))
        for i in range(50):
            h = torch.tanh(h * (1.1 + i % 3)) + 0.01 * i
        return h


def test_many_taps_and_long_programs() -> None:
    module = Dense().eval()
    given = {"image_shape": (1, 4, 5), "head": Categorical(LEVELS)}
    sampler = Sampler(module, **given)
    assert max(len(s.taps) for s in sampler.plan.steps) > 150
    assert max(len(s.program) for s in sampler.plan.steps) > 150
    assert torch.equal(sampler.sample(3), naive_sample(module, 3, **given))


class Gates(nn.Module):
    """One product in many pieces, all of them used together."""

    def __init__(self, pieces: int) -> None:
        super().__init__()
        self.pieces = pieces
        self.wide = nn.Conv2d(1, 5 * pieces, 1)
        self.out = nn.Conv2d(5, LEVELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.wide(F.pad(x, (0, 0, 1, 0))[:, :, :-1]).chunk(self.pieces, dim=1)
        for i, piece in enumerate(others):
            first = first * torch.tanh(piece) + piece * (0.1 + i)
        return self.out(torch.tanh(first))


@pytest.mark.parametrize("pieces", [8, 9, 40])
def test_many_groups(pieces: int) -> None:
    module = Gates(pieces).eval()
    given = {"image_shape": (1, 4, 5), "head": Categorical(LEVELS)}
    sampler = Sampler(module, **given)
    assert max(s.groups for s in sampler.plan.steps) == pieces
    assert torch.equal(sampler.sample(32), naive_sample(module, 32, **given))


STARVED = """
import resource
from fastgen import models
from fastgen.sampling import Sampler
from fastgen.sampling.executors import cpu
sampler = Sampler(models.GatedPixelCNN(image_shape=(1, 4, 5), levels=4, num_filters=4, num_blocks=1), backend="cpu")
sampler.sample(2)
cpu.torch.get_num_threads = cpu.processors = lambda: 64
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (60 << 20),) * 2)
try:
    sampler.sample(64)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.skipif(bool(backends.native_cpu().sanitize), reason="a sanitizer needs address space")
def test_threads_that_do_not_start() -> None:
    done = subprocess.run([sys.executable, "-c", STARVED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "cannot start 64 threads" in done.stdout
