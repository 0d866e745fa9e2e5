"""Matrices that mix positions, in the ways that people write them: one step, not one for each position."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, einsum, nn

from fastgen.sampling import NotCausal, Sampler, naive_sample

from .attention_networks import CODES, check_equals_naive_loop
from .networks import LEVELS

SIZE, DIM = (3, 4), 6
COUNT = SIZE[0] * SIZE[1]
GIVEN = {"image_shape": SIZE, "head": CODES}


class Unit(nn.Module):
    """A spatial gating unit: mix(unit, gate [N, positions, channels])."""

    def __init__(self, mix: Callable, heads: int = 1):
        super().__init__()
        self.mix, self.heads = mix, heads
        self.weight, self.bias = nn.Parameter(torch.randn(heads, COUNT, COUNT)), nn.Parameter(torch.randn(heads, COUNT))
        self.norm, self.proj = nn.LayerNorm(DIM), nn.Linear(COUNT, COUNT)
        self.conv = nn.Conv1d(COUNT, COUNT, 1)

    def forward(self, x: Tensor) -> Tensor:
        res, gate = x.chunk(2, dim=-1)
        return res * self.mix(self, self.norm(gate))


class GMLP(nn.Module):
    """Tokens of codes, one later; a block of projection, gating unit and projection for each layer."""

    def __init__(self, mix: Callable, heads: int = 1, layers: int = 1):
        super().__init__()
        self.embedding, self.start = nn.Embedding(LEVELS, DIM), nn.Parameter(torch.randn(1, 1, DIM))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.GELU(), Unit(mix, heads), nn.Linear(DIM, DIM))
            for _ in range(layers)
        )
        self.out = nn.Linear(DIM, LEVELS)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.start.expand(len(x), -1, -1), self.embedding(x.flatten(1))[:, :-1]], 1)
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return self.out(tokens).mT.unflatten(2, SIZE)


def tril(unit: Unit, gate: Tensor) -> Tensor:
    return unit.weight[0].tril() @ gate + unit.bias[0][:, None]


def lucidrains(unit: Unit, gate: Tensor) -> Tensor:
    """g-mlp-pytorch, with heads."""
    n, h = gate.shape[1], unit.heads
    weight = unit.weight[:, :n, :n]
    weight = weight.masked_fill(torch.ones(n, n).triu_(1).bool()[None], 0.0)
    gate = gate.unflatten(2, (h, -1)).transpose(1, 2)
    gate = einsum("b h n d, h m n -> b h m d", gate, weight)
    return (gate + unit.bias[None, :, :, None]).transpose(1, 2).flatten(2)


def by_einsum(unit: Unit, gate: Tensor) -> Tensor:
    return einsum("bnd,mn->bmd", gate, unit.weight[0] * torch.ones(COUNT, COUNT).tril()) + 1


def by_linear(unit: Unit, gate: Tensor) -> Tensor:
    return F.linear(gate.transpose(1, 2), unit.proj.weight.tril(), unit.proj.bias).transpose(1, 2)


def by_convolution(unit: Unit, gate: Tensor) -> Tensor:
    """g-mlp-pytorch before it had heads."""
    weight = unit.conv.weight.masked_fill(torch.ones(COUNT, COUNT).triu_(1).bool()[..., None], 0.0)
    return F.conv1d(gate, weight, unit.conv.bias)


def by_bmm(unit: Unit, gate: Tensor) -> Tensor:
    return torch.bmm(unit.weight[0].tril().expand(len(gate), -1, -1), gate)


def by_matmul_of_heads(unit: Unit, gate: Tensor) -> Tensor:
    """Matrices as many times as there are samples."""
    gate = gate.unflatten(2, (unit.heads, -1)).transpose(1, 2)
    return (unit.weight.tril() @ gate + unit.bias[:, :, None]).transpose(1, 2).flatten(2)


def toeplitz(unit: Unit, gate: Tensor) -> Tensor:
    """A number for each distance."""
    index = torch.arange(COUNT)[:, None] - torch.arange(COUNT)
    return (unit.bias[0][index.clamp(min=0)] * (index >= 0)) @ gate


def of_the_last(unit: Unit, gate: Tensor) -> Tensor:
    """A band: spans that begin later."""
    return unit.weight[0].tril().triu(-2) @ gate


def mean_so_far(unit: Unit, gate: Tensor) -> Tensor:
    return (torch.ones(COUNT, COUNT).tril() / torch.arange(1, COUNT + 1)[:, None]) @ gate


def network(mix: Callable, heads: int = 1, layers: int = 1) -> nn.Module:
    torch.manual_seed(5)
    net = GMLP(mix, heads, layers).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.4)
    return net


WAYS = {
    f.__name__: network(f)
    for f in (
        tril, lucidrains, by_einsum, by_linear, by_convolution, by_bmm, toeplitz, of_the_last, mean_so_far
    )
}  # fmt: skip
WAYS |= {f"{f.__name__} {heads} heads": network(f, heads) for f in (lucidrains, by_matmul_of_heads) for heads in (2, 3)}
WAYS["two layers"] = network(tril, layers=2)


@pytest.mark.parametrize("net", WAYS.values(), ids=WAYS)
def test_equals_naive_loop(net: nn.Module) -> None:
    check_equals_naive_loop(net, GIVEN)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "two layers"])
def test_it_is_one_step(way: str) -> None:
    plan = Sampler(WAYS[way], **GIVEN, backend="reference").plan
    (found,) = (s.attention for s in plan.steps if s.attention is not None)
    assert not found.softmax and found.depth == 0 and len(plan.steps) <= 10
    begin = 2 if way == "of_the_last" else COUNT
    assert found.spans.tolist() == [[max(0, p - begin), p + 1] for p in range(COUNT)]


def test_convolutions_of_tokens_are_products() -> None:
    """Of channels [N, C, positions]."""

    class Tokens(GMLP):
        def __init__(self) -> None:
            super().__init__(tril)
            self.mix, self.last = nn.Conv1d(DIM, 2 * DIM, 1), nn.Conv1d(2 * DIM, LEVELS, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            tokens = torch.cat([self.start.expand(len(x), -1, -1), self.embedding(x.flatten(1))[:, :-1]], 1)
            return self.last(F.elu(self.mix(tokens.mT))).unflatten(2, SIZE)

    net = Tokens().eval()
    sampler = Sampler(net, **GIVEN)
    assert torch.equal(sampler.sample(3), naive_sample(net, 3, **GIVEN)) and len(sampler.plan.steps) <= 3


def all_of_them(unit: Unit, gate: Tensor) -> Tensor:
    return unit.weight[0] @ gate


def one_ahead(unit: Unit, gate: Tensor) -> Tensor:
    return unit.weight[0].tril(1) @ gate


@pytest.mark.parametrize("mix", [all_of_them, one_ahead])
def test_what_sees_ahead_is_refused(mix: Callable) -> None:
    with pytest.raises(NotCausal):
        Sampler(network(mix), **GIVEN)
