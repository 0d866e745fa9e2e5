"""Networks with very many taps and very long chains: nothing in the executor has a fixed size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
