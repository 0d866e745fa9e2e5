"""Scores that are capped before softmax, in the ways that people write it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.sampling import NotCausal, Sampler, UnsupportedModel
from fastgen.sampling.plan import Attention

from .attention_networks import CODES, Prior, check_equals_naive_loop, lower

SIZE = (4, 5)
GIVEN = {"image_shape": SIZE, "head": CODES}


def gemma(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Hugging Face's Gemma 2: keys of groups, a mask that is added, softmax in float32."""
    k, v = (t[:, :, None].expand(-1, -1, len(q[0]) // len(t[0]), -1, -1).flatten(1, 2) for t in (k, v))
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.7
    weights = weights / 2.0
    weights = torch.tanh(weights)
    weights = weights * 2.0
    low = torch.finfo(q.dtype).min
    mask = torch.full((q.shape[2], q.shape[2]), low, dtype=q.dtype).triu(1)[None, None]
    weights = weights + mask[:, :, :, : k.shape[-2]]
    return torch.matmul(F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype), v)


def window(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Gemma 2's local layers."""
    near = lower(q.shape[2]) & lower(q.shape[2]).T.roll(-3, 1).triu(-3)
    scores = 3 * torch.tanh(torch.einsum("bhid,bhjd->bhij", q, k) / 3)
    return scores.masked_fill(~near, -torch.inf).softmax(-1) @ v


def pointer(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bello et al.: not divided by the cap."""
    return (2.5 * torch.tanh(q @ k.mT)).masked_fill(~lower(q.shape[2]), -1e9).softmax(-1) @ v


def downwards(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With the sign changed outside."""
    return (-2.5 * torch.tanh(q @ k.mT)).masked_fill(~lower(q.shape[2]), -1e9).softmax(-1) @ v


def in_place(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.div_(1.5).tanh_().mul_(1.5)
    scores.masked_fill_(~lower(q.shape[2]), -torch.inf)
    return torch.softmax(scores, -1) @ v


def biased(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A number for each head, query and key, that is not capped."""
    scores = torch.tanh(q @ k.mT / 2) * 2 + net.bias
    return scores.masked_fill(~lower(q.shape[2]), -torch.inf).softmax(-1) @ v


def with_temperature(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of each head and position, inside."""
    scores = q @ k.mT * net.temperature / torch.arange(2, q.shape[2] + 2)[:, None].float().log()
    return (torch.tanh(scores) * 3).masked_fill(~lower(q.shape[2]), -torch.inf).softmax(-1) @ v


def masked_twice(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Before, which is of no use, and behind."""
    mask = ~lower(q.shape[2])
    scores = torch.tanh((q @ k.mT).masked_fill(mask, -1e9) / 2) * 2
    return scores.masked_fill(mask, -torch.inf).softmax(-1) @ v


def transposed(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(torch.einsum("bhjd,bhid->bhji", k, q) * net.temperature)
    return torch.einsum("bhji,bhjd->bhid", scores.masked_fill(~lower(q.shape[2]).T, -torch.inf).softmax(-2), v)


def by_hand(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (torch.tanh(q @ k.mT / 2) * 2).masked_fill(~lower(q.shape[2]), -torch.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)) @ v


def in_rows(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each row by itself."""
    q, k, v = (t.unflatten(2, net.size).flatten(0, 2) for t in (q, k, v))
    scores = (torch.tanh(q @ k.mT / 2) * 2).masked_fill(~lower(q.shape[1]), -torch.inf)
    return (scores.softmax(-1) @ v).unflatten(0, (-1, net.heads, net.size[0])).flatten(2, 3)


def network(attend: Callable, heads: int = 2, keys: int = 0) -> nn.Module:
    torch.manual_seed(3)
    net = Prior(attend, *SIZE, heads, 3, keys).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.6)
    return net


WAYS = {
    f.__name__: network(f)
    for f in (
        window, pointer, downwards, in_place, biased, with_temperature, masked_twice, transposed, by_hand, in_rows
    )
}  # fmt: skip
WAYS["gemma"] = network(gemma, 4, 2)


@pytest.mark.parametrize("net", WAYS.values(), ids=WAYS)
def test_equals_naive_loop(net: nn.Module) -> None:
    check_equals_naive_loop(net, GIVEN)


def attention_of(attend: Callable) -> Attention:
    (found,) = (s.attention for s in Sampler(network(attend), **GIVEN, backend="reference").plan.steps if s.attention)
    return found


@pytest.mark.parametrize(
    ("attend", "scale", "cap"), [(pointer, 2.5, 2.5), (downwards, -2.5, 2.5), (window, 1.0, 3.0), (in_place, 1.0, 1.5)]
)
def test_what_the_plan_says(attend: Callable, scale: float, cap: float) -> None:
    found = attention_of(attend)
    assert (found.scale, found.cap) == (pytest.approx(scale), cap)


def test_the_cap_is_seen() -> None:
    """The same network with another cap draws other images."""
    loose = network(lambda net, q, k, v: pointer(net, q / 40, 40 / 2.5 * k / 2.5, v))
    assert not torch.equal(Sampler(loose, **GIVEN).sample(3), Sampler(WAYS["pointer"], **GIVEN).sample(3))


def off_by_one(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(1)
    return (torch.tanh(q @ k.mT) * 3).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def masked_before(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is masked becomes the negative cap, which is seen."""
    scores = (q @ k.mT).masked_fill(~lower(q.shape[2]), -torch.inf)
    return (torch.tanh(scores / 5) * 5).softmax(-1) @ v


def biased_before(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.mT + net.bias)
    return scores.masked_fill(~lower(q.shape[2]), -torch.inf).softmax(-1) @ v


def of_heads(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.mT) * net.temperature
    return scores.masked_fill(~lower(q.shape[2]), -torch.inf).softmax(-1) @ v


def twice(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(torch.tanh(q @ k.mT) * 2)
    return scores.masked_fill(~lower(q.shape[2]), -torch.inf).softmax(-1) @ v


def less_the_maximum(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax would take no notice of it, tanh does."""
    scores = (q @ k.mT).masked_fill(~lower(q.shape[2]), -1e9)
    scores = torch.tanh(scores - scores.amax(-1, keepdim=True))
    return scores.masked_fill(~lower(q.shape[2]), -torch.inf).softmax(-1) @ v


def less_the_maximum_of_some(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Times a number for each key."""
    scores = (q @ k.mT).masked_fill(~lower(q.shape[2]), -1e9)
    scores = (scores - scores.amax(-1, keepdim=True)) * torch.linspace(0.5, 2, q.shape[2])
    return scores.softmax(-1) @ v


def of_probabilities(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.tanh((q @ k.mT).masked_fill(~lower(q.shape[2]), -torch.inf).softmax(-1)) @ v


BEFORE = "aten.tanh.default of products of queries and keys that were capped, lowered or made probabilities before"


@pytest.mark.parametrize(
    ("attend", "error", "text"),
    [
        (off_by_one, NotCausal, r"colour 0 at \(y\+1, x-5\)"),
        (masked_before, UnsupportedModel, "that had a bias or a mask before they were capped"),
        (biased_before, UnsupportedModel, "that had a bias or a mask before they were capped"),
        (of_heads, UnsupportedModel, "of capped products of queries and keys times what differs between them"),
        (twice, UnsupportedModel, BEFORE),
        (less_the_maximum, UnsupportedModel, BEFORE),
        (of_probabilities, UnsupportedModel, BEFORE),
        (less_the_maximum_of_some, UnsupportedModel, "less their maximum, times what differs between keys"),
    ],
)
def test_refused(attend: Callable, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Sampler(network(attend), **GIVEN)
