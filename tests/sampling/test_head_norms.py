"""Norms of the queries and keys of each head, in the ways that people write them: few steps for any number of heads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.sampling import NotCausal, Sampler

from .attention_networks import CODES, Prior, angles, check_equals_naive_loop, lower, rotate_half

SIZE, DEPTH = (3, 4), 4
GIVEN = {"image_shape": SIZE, "head": CODES}


class RMSNorm(nn.Module):
    """LLaMA's."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(dim) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        found = x.float()
        return (found * torch.rsqrt(found.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x) * self.weight


class GemmaNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        found = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return (found * (1.0 + self.weight.float())).type_as(x)


class Cosine(RMSNorm):
    """lucidrains': unit length, times a scale of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.weight * 3


class OfHeads(nn.Module):
    """ViT-22B as lucidrains has it: a scale of each head and channel."""

    def __init__(self, heads: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(heads, 1, DEPTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * DEPTH**0.5 * self.gamma


class Centred(RMSNorm):
    """LayerNorm written out."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
        return self.weight * ((x - mean) / torch.sqrt(variance + 1e-5))


class Network(Prior):
    """layout: the queries, keys and values of one product: their order, or None for a product each."""

    def __init__(self, norm: Callable[[int], nn.Module], heads: int = 2, layout: str = "bthd", turn: bool = False):
        super().__init__(lambda *_: None, *SIZE, heads, DEPTH)
        self.norms, self.layout, self.turn = nn.ModuleList([norm(heads), norm(heads)]), layout, turn
        self.all = nn.Linear(heads * DEPTH, 3 * heads * DEPTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x)
        n, count, dim = tokens.shape
        mixed, heads = self.all(self.norm(tokens)), self.heads
        if self.layout == "bt3hd":
            q, k, v = mixed.reshape(n, count, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.layout == "bth3d":
            q, k, v = mixed.view(n, count, heads, 3, -1).transpose(1, 2).unbind(3)
        else:  # normed before heads come first
            q, k, v = (t.view(n, count, heads, -1) for t in mixed.chunk(3, -1))
            if self.layout == "bthd":
                q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        q, k = (norm(t) for norm, t in zip(self.norms, (q, k), strict=True))
        if self.layout == "late":
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.turn:
            both = torch.cat([angles(count, DEPTH)] * 2, -1)
            q, k = (t * both.cos() + rotate_half(t) * both.sin() for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(count))
        return self.out(tokens + self.project(y.transpose(1, 2).reshape(n, count, dim))).mT.unflatten(2, self.size)

    def mask(self, count: int) -> Tensor:
        return lower(count)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "nn.RMSNorm": lambda heads: nn.RMSNorm(DEPTH, eps=1e-6),
    "nn.LayerNorm": lambda heads: nn.LayerNorm(DEPTH),
    "LLaMA": lambda heads: RMSNorm(DEPTH),
    "Gemma": lambda heads: GemmaNorm(DEPTH),
    "cosine": lambda heads: Cosine(DEPTH),
    "of heads": OfHeads,
    "centred": lambda heads: Centred(DEPTH),
}
WAYS = (
    {name: (norm, {}) for name, norm in NORMS.items()}
    | {f"{name} {layout}": (NORMS[name], {"layout": layout}) for name in ("nn.LayerNorm", "Gemma", "cosine")
       for layout in ("bt3hd", "bth3d", "late")}
    | {f"none {layout}": (lambda heads: nn.Identity(), {"layout": layout}) for layout in ("bt3hd", "bth3d")}
    | {f"{name} turned": (NORMS[name], {"turn": True}) for name in ("nn.RMSNorm", "nn.LayerNorm", "cosine")}
)  # fmt: skip
del WAYS["nn.LayerNorm bth3d"], WAYS["cosine late"]


def network(norm: Callable[[int], nn.Module], heads: int = 3, kind: type[Network] = Network, **options) -> nn.Module:
    torch.manual_seed(6)
    net = kind(norm, heads, **options).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.6)
        for of in net.norms:
            for parameter in of.parameters():
                parameter.add_(torch.rand_like(parameter))
    return net


@pytest.mark.parametrize(("norm", "options"), WAYS.values(), ids=WAYS)
def test_equals_naive_loop(norm: Callable[[int], nn.Module], options: dict) -> None:
    check_equals_naive_loop(network(norm, **options), GIVEN)


def steps(norm: Callable[[int], nn.Module], heads: int, options: dict) -> int:
    return len(Sampler(network(norm, heads, **options), **GIVEN, backend="reference").plan.steps)


@pytest.mark.parametrize(("norm", "options"), WAYS.values(), ids=WAYS)
def test_heads_are_one_program(norm: Callable[[int], nn.Module], options: dict) -> None:
    few = steps(norm, 2, options)
    assert steps(norm, 5, options) == few
    plain = steps(lambda heads: nn.Identity(), 2, options)
    sums, programs, squares = (2, 2, 0) if norm in (NORMS["nn.LayerNorm"], NORMS["centred"]) else (1, 1, 1)
    orders = 2 if options.get("turn") else 1
    assert few <= plain + 2 * (sums + squares + orders * programs)


def test_sums_and_copies_are_small() -> None:
    """Eight heads of norms have the weights of as many sums and copies, not of a matrix of all channels."""
    plan = Sampler(network(NORMS["LLaMA"], 8), **GIVEN, backend="reference").plan
    of_norms = [step for step in plan.steps if step.name.startswith("norms") and step.taps]
    assert [step.macs for step in of_norms] == [8 * 8 * DEPTH] * 4


class OneAhead(Network):
    def mask(self, count: int) -> Tensor:
        return torch.ones(count, count, dtype=torch.bool).tril(1)


def test_what_sees_ahead_is_refused() -> None:
    with pytest.raises(NotCausal, match=r"colour 0 at \(y\+1, x-4\)"):
        Sampler(network(NORMS["Gemma"], kind=OneAhead), **GIVEN)
