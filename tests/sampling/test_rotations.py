"""Rotary position embeddings, in the ways that people write them: one program for all channels of all heads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.sampling import NotCausal, Sampler, naive_sample
from fastgen.sampling.plan import Plan

from .attention_networks import CODES, Prior, angles, check_equals_naive_loop, rotate_half

SIZE, HEADS, DEPTH = (3, 4), 2, 8


def turns(count: int, depth: int = DEPTH) -> Tensor:
    """[positions, pairs, 2], cosines and sines."""
    angle = angles(count, depth)
    return torch.stack([angle.cos(), angle.sin()], -1)


def turns_2d(count: int, before: int = 0) -> Tensor:
    """LlamaGen: half of the pairs turn by the row, the others by the column; tokens in front become zeros."""
    rows, columns = angles(SIZE[0], DEPTH // 2), angles(SIZE[1], DEPTH // 2)
    grid = torch.cat([rows[:, None].expand(*SIZE, -1), columns[None].expand(*SIZE, -1)], -1).flatten(0, 1)
    both = torch.stack([grid.cos(), grid.sin()], -1)
    return torch.cat([torch.zeros(before, *both.shape[1:]), both])[:count]


def of_pairs(x: Tensor, both: Tensor) -> Tensor:
    """LlamaGen and gpt-fast: tokens before heads, pairs in a dimension of their own."""
    x = x.transpose(1, 2)
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    both = both.view(1, pairs.size(1), 1, pairs.size(3), 2)
    real = pairs[..., 0] * both[..., 0] - pairs[..., 1] * both[..., 1]
    imaginary = pairs[..., 1] * both[..., 0] + pairs[..., 0] * both[..., 1]
    return torch.stack([real, imaginary], dim=-1).flatten(3).type_as(x).transpose(1, 2)


def complex_numbers(x: Tensor, both: Tensor) -> Tensor:
    """LLaMA."""
    x = x.transpose(1, 2)
    numbers = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    factors = torch.view_as_complex(both).view(1, x.shape[1], 1, -1)
    return torch.view_as_real(numbers * factors).flatten(3).type_as(x).transpose(1, 2)


def every_two(x: Tensor, both: Tensor) -> Tensor:
    """GPT-J: neighbours change places, one with its sign changed."""
    cos, sin = (t.repeat_interleave(2, -1) for t in both.unbind(-1))
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin


def unbound(x: Tensor, both: Tensor) -> Tensor:
    """rotary-embedding-torch, with the decay of xPos."""
    cos, sin = (t.repeat_interleave(2, -1) for t in both.unbind(-1))
    scale = 0.9 ** torch.arange(x.shape[2])[:, None]
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return (x * cos * scale) + (torch.stack((-b, a), -1).flatten(-2) * sin * scale)


def halves(x: Tensor, both: Tensor) -> Tensor:
    """GPT-NeoX."""
    cos, sin = torch.cat([both, both], -2).unbind(-1)
    return x * cos + rotate_half(x) * sin


def halves_apart(x: Tensor, both: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = both.unbind(-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def in_place(x: Tensor, both: Tensor) -> Tensor:
    cos, sin = both.unbind(-1)
    result = torch.empty_like(x)
    result[..., ::2] = x[..., ::2] * cos - x[..., 1::2] * sin
    result[..., 1::2] = x[..., ::2] * sin + x[..., 1::2] * cos
    return result


FORMS = [of_pairs, complex_numbers, every_two, unbound, halves, halves_apart, in_place]


def partly(turn: Callable) -> Callable:
    """Only the first channels of each head."""
    return lambda x, both: torch.cat([turn(x[..., :4], both[:, :2]), x[..., 4:]], -1)


def attend(turn: Callable, factors: Callable = turns, values: bool = False) -> Callable:
    def of(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        both = factors(q.shape[2])
        q, k = turn(q, both), turn(k, both)
        k, v = (t.repeat_interleave(len(q[0]) // len(t[0]), 1) for t in (k, turn(v, both) if values else v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return of


def normed(turn: Callable, norm: Callable) -> Callable:
    def of(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(turn)(net, norm(net, q), norm(net, k), v)

    return of


def by_squares(net: Prior, x: Tensor) -> Tensor:
    return F.rms_norm(x, (DEPTH,), net.query_norm.weight)


def by_layer(net: Prior, x: Tensor) -> Tensor:
    return net.key_norm(x)


def network(attend: Callable, keys: int = 0, heads: int = HEADS) -> nn.Module:
    torch.manual_seed(4)
    net = Prior(attend, *SIZE, heads, DEPTH, keys).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.6)
        for norm in (net.query_norm, net.key_norm):
            norm.weight.copy_(1 + torch.rand(DEPTH))
    return net


WAYS = (
    {turn.__name__: network(attend(turn)) for turn in FORMS}
    | {f"{turn.__name__} rows and columns": network(attend(turn, turns_2d)) for turn in FORMS[:3]}
    | {f"{turn.__name__} partly": network(attend(partly(turn))) for turn in FORMS[:3]}
    | {f"{turn.__name__} values, too": network(attend(turn, values=True)) for turn in FORMS[:2]}
    | {f"{turn.__name__} shared keys": network(attend(turn), 2, 4) for turn in FORMS[:3]}
    | {f"{turn.__name__} one key": network(attend(turn), 1, 3) for turn in FORMS[2:3]}
    | {f"{turn.__name__} rms norm": network(normed(turn, by_squares)) for turn in FORMS[:3]}
    | {f"{turn.__name__} layer norm": network(normed(turn, by_layer)) for turn in FORMS[1:5:3]}
    | {"zeros in front": network(attend(of_pairs, lambda count: turns_2d(count, 1)))}
)
GIVEN = {"image_shape": SIZE, "head": CODES}


@pytest.mark.parametrize("net", WAYS.values(), ids=WAYS)
def test_equals_naive_loop(net: nn.Module) -> None:
    check_equals_naive_loop(net, GIVEN)


def compiled(net: nn.Module) -> Plan:
    return Sampler(net, **GIVEN, backend="reference").plan


@pytest.mark.parametrize("way", WAYS)
def test_it_is_one_program(way: str) -> None:
    """Beside what it takes without a turn, at most the copy for heads that share keys, and norms in two orders."""
    keys, heads = (2, 4) if "shared" in way else (1, 3) if "one key" in way else (0, HEADS)
    norm = by_squares if "rms" in way else by_layer if "layer norm" in way else None
    still = lambda x, both: x  # noqa: E731
    plain = network(attend(still) if norm is None else normed(still, norm), keys, heads)
    more = 4 if norm else 2
    assert len(compiled(WAYS[way]).steps) <= len(compiled(plain).steps) + more


def test_layers_share_their_factors() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = network(attend(every_two)), network(attend(every_two))

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x)

    plan = compiled(Twice().eval())
    assert sum(plane.kind == "constant" and not plane.broadcast for plane in plan.planes) == 2 + 4  # and tokens


def ahead(x: Tensor, both: Tensor) -> Tensor:
    """The second of each pair is that of the next position."""
    cos, sin = (t.repeat_interleave(2, -1) for t in both.unbind(-1))
    return x * cos + F.pad(x, (0, 0, 0, 1))[:, :, 1:] * sin


def beyond(x: Tensor, both: Tensor) -> Tensor:
    return every_two(F.pad(x, (0, 0, 0, 1))[:, :, 1:], both)


def all_of_them(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    both = turns(q.shape[2])
    return F.scaled_dot_product_attention(every_two(q, both), every_two(k, both), v)


@pytest.mark.parametrize(
    "leak",
    [attend(ahead), attend(beyond), attend(every_two, values=True), all_of_them],
    ids=["next position in pairs", "pairs of the next position", "values", "no mask"],
)
def test_what_sees_ahead_is_refused(leak: Callable) -> None:
    net = network(leak)
    if leak.__closure__ and every_two in [c.cell_contents for c in leak.__closure__]:  # tokens that are not shifted
        net.tokens = lambda x: net.embedding(x.flatten(1)) + net.position
    with pytest.raises(NotCausal):
        Sampler(net, **GIVEN)


def test_what_sees_behind_is_drawn() -> None:
    """Turned with the position before: no rotation, but causal."""

    def behind(x: Tensor, both: Tensor) -> Tensor:
        cos, sin = (t.repeat_interleave(2, -1) for t in both.unbind(-1))
        return x * cos + F.pad(x, (0, 0, 1, 0))[:, :, :-1] * sin

    net = network(attend(behind))
    assert torch.equal(Sampler(net, **GIVEN).sample(3), naive_sample(net, 3, **GIVEN))
