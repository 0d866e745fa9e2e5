"""One softmax over the scores of several products: those of a text and of rows of the image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, einsum, nn

from fastgen.sampling import NotCausal, Sampler, UnsupportedModel, audit, naive_sample

from .attention_networks import CODES, Prior, lower
from .networks import LEVELS

SIZE, TEXT = (3, 4), 3


class AxialCausalAttention(nn.Module):
    """dalle-pytorch's: the text by itself, pixels their row (or column) so far and all of the text."""

    def __init__(self, dim: int, seq_len: int, size: tuple[int, int], axis: int, heads: int = 2, depth: int = 3):
        super().__init__()
        self.axis, self.seq_len, self.size, self.heads, self.scale = axis, seq_len, size, heads, depth**-0.5
        self.to_qkv = nn.Linear(dim, 3 * heads * depth, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * depth, dim), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        h, pixels = self.heads, self.size[0] * self.size[1]
        text_len = self.seq_len + 1 - pixels
        x = nn.functional.pad(x, (0, 0, 0, self.seq_len - n + 1), value=0)
        qkv = self.to_qkv(x).chunk(3, dim=-1)
        q, k, v = (t.view(b, x.shape[1], h, -1).transpose(1, 2).reshape(b * h, x.shape[1], -1) for t in qkv)
        q = q * self.scale
        (q_text, q_img), (k_text, k_img), (v_text, v_img) = ((t[:, :-pixels], t[:, -pixels:]) for t in (q, k, v))

        dots_text = einsum("b i d, b j d -> b i j", q_text, k_text)
        mask_value = -torch.finfo(dots_text.dtype).max
        i, j = dots_text.shape[-2:]
        dots_text.masked_fill_(torch.ones(i, j).triu_(j - i + 1).bool(), mask_value)
        out_text = einsum("b i j, b j d -> b i d", torch.softmax(dots_text, dim=-1), v_text)

        q_img, k_img, v_img = (t.unflatten(1, self.size) for t in (q_img, k_img, v_img))
        if self.axis:
            q_img, k_img, v_img = (t.transpose(1, 2) for t in (q_img, k_img, v_img))
        dots_image_to_image = einsum("b x i d, b x j d -> b x i j", q_img, k_img)
        dots_image_to_text = einsum("b x i d, b j d -> b x i j", q_img, k_text)
        dots = torch.cat((dots_image_to_text, dots_image_to_image), dim=-1)
        bh, rows, i, _ = dots.shape
        causal_mask = torch.ones(i, i).triu_(1).bool().expand(bh, rows, i, i)
        mask = torch.ones(b, text_len).bool().repeat_interleave(h, 0)[:, None, None].expand(bh, rows, i, text_len)
        dots.masked_fill_(torch.cat((~mask, causal_mask), dim=-1), mask_value)
        attn = torch.softmax(dots, dim=-1)
        attn_image_to_text, attn_image_to_image = attn[..., :text_len], attn[..., text_len:]
        out_image_to_image = einsum("b x i j, b x j d -> b x i d", attn_image_to_image, v_img)
        out_image_to_text = einsum("b x i j, b j d -> b x i d", attn_image_to_text, v_text)
        out_image = out_image_to_image + out_image_to_text
        if self.axis:
            out_image = out_image.transpose(1, 2)
        out = torch.cat((out_text, out_image.flatten(1, 2)), dim=1)
        return self.to_out(out.unflatten(0, (b, h)).transpose(1, 2).flatten(2))[:, :n]


class DALLE(nn.Module):
    """dalle-pytorch's: a start and a text in front of the image, one token later."""

    def __init__(self, axes: tuple[int, ...], size: tuple[int, int] = SIZE, text: int = TEXT, dim: int = 6):
        super().__init__()
        self.size, self.text = size, text
        pixels = size[0] * size[1]
        self.text_emb, self.image_emb = nn.Embedding(5, dim), nn.Embedding(LEVELS, dim)
        self.text_pos, self.image_pos = nn.Embedding(text + 1, dim), nn.Parameter(torch.randn(1, pixels, dim))
        self.layers = nn.ModuleList([AxialCausalAttention(dim, text + pixels, size, axis) for axis in axes])
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in axes])
        self.to_logits = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, LEVELS))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        text = nn.functional.pad(text + 1, (1, 0), value=0)
        tokens = self.text_emb(text) + self.text_pos(torch.arange(text.shape[1]))
        tokens = torch.cat((tokens, self.image_emb(image.flatten(1)) + self.image_pos), dim=1)[:, :-1]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            tokens = tokens + layer(norm(tokens))
        return self.to_logits(tokens[:, self.text :]).mT.unflatten(2, self.size)


def memory(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Learned keys and values of each head, that all see, behind those of the tokens."""
    own = net.position[:, :4].unflatten(2, (net.heads, -1)).transpose(1, 2).expand(len(q), -1, -1, -1)
    dots = torch.cat([q @ k.mT, q @ (2 * own).mT], dim=-1) * 0.8
    seen = torch.cat([lower(q.shape[2]), torch.ones(q.shape[2], own.shape[2], dtype=torch.bool)], 1)
    attn = dots.masked_fill(~seen, -torch.inf).softmax(-1)
    return attn[..., : k.shape[2]] @ v + attn[..., k.shape[2] :] @ own


def near_and_far(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of the tokens by two masks: two scores of each key, of which one is seen."""
    near = lower(q.shape[2]) & ~lower(q.shape[2]).tril(-3)
    scores = q @ k.mT, q @ k.mT
    dots = torch.cat([scores[0].masked_fill(~near, -1e9), scores[1].masked_fill(near | ~lower(q.shape[2]), -1e9)], -1)
    attn = dots.softmax(-1)
    return attn[..., : q.shape[2]] @ v + attn[..., q.shape[2] :] @ v


def split_before(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Halves of the keys, joined before softmax, multiplied at once."""
    half = 5
    dots = torch.cat([q @ k[:, :, :half].mT, q @ k[:, :, half:].mT], dim=-1)
    return dots.masked_fill(~lower(q.shape[2]), -torch.inf).softmax(-1) @ v


def in_place(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Three parts, one after the other."""
    parts = [(k[:, :, i : i + 4], v[:, :, i : i + 4]) for i in (0, 4, 8)]
    dots = torch.cat([q @ k.mT for k, _ in parts], dim=-1)
    attn = dots.masked_fill_(~lower(q.shape[2]), -torch.inf).softmax(-1)
    y = attn[..., :4] @ parts[0][1]
    for i, (_, values) in enumerate(parts[1:], 1):
        y += attn[..., 4 * i : 4 * i + 4] @ values
    return y


def in_rows(axis: int, mask: Callable = lower) -> Callable:
    """Each row with what is learned for all."""

    def of(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own = net.position[0, :2, : net.depth].expand(len(q) * net.heads, -1, -1) * 2
        q, k, v = (t.flatten(0, 1).unflatten(1, net.size) for t in (q, k, v))
        if axis:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        dots = torch.cat([einsum("bxid,bjd->bxij", q, own), einsum("bxid,bxjd->bxij", q, k)], -1)
        seen = torch.cat([torch.ones(q.shape[2], 2, dtype=torch.bool), mask(q.shape[2])], 1)
        attn = dots.masked_fill(~seen, -torch.finfo(q.dtype).max).softmax(-1)
        y = einsum("bxij,bxjd->bxid", attn[..., 2:], v) + einsum("bxij,bjd->bxid", attn[..., :2], own.flip(1))
        return (y.transpose(1, 2) if axis else y).flatten(1, 2).unflatten(0, (-1, net.heads))

    return of


Given = tuple[nn.Module, dict[str, Any], dict[str, Any]]


def network(build: Callable[[], nn.Module]) -> Given:
    """A network, what its sampler is given, and what a batch is."""
    torch.manual_seed(2)
    net = build().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    of_text = {"condition": torch.randint(4, (3, net.text))} if isinstance(net, DALLE) else {}
    return net, {"image_shape": net.size, "head": CODES}, of_text


def prior(attend: Callable) -> Callable[[], nn.Module]:
    return lambda: Prior(attend, *SIZE, 2, 3)


WAYS: dict[str, Callable[[], nn.Module]] = {
    "memory": prior(memory),
    "near and far": prior(near_and_far),
    "split before": prior(split_before),
    "in place": prior(in_place),
    "rows": prior(in_rows(0)),
    "columns": prior(in_rows(1)),
    "dalle rows": lambda: DALLE((0,)),
    "dalle columns": lambda: DALLE((1,)),
    "dalle rows and columns": lambda: DALLE((0, 1)),
    "dalle square": lambda: DALLE((1, 0), (3, 3), 4),
}


@pytest.mark.parametrize("build", WAYS.values(), ids=WAYS)
def test_equals_naive_loop(build: Callable[[], nn.Module]) -> None:
    net, given, of_batch = network(build)
    expected = naive_sample(net, 3, **given, **of_batch)
    example = {name: value[0] for name, value in of_batch.items()}
    for backend in ("reference", "cpu"):
        assert torch.equal(Sampler(net, **given, **example, backend=backend).sample(3, **of_batch), expected)
    assert audit(net, expected, **given, **of_batch).ok
    assert not audit(net, (expected + 1) % LEVELS, **given, **of_batch).ok


def steps(build: Callable[[], nn.Module]) -> int:
    net, given, of_batch = network(build)
    example = {name: value[0] for name, value in of_batch.items()}
    return len(Sampler(net, **given, **example, backend="reference").plan.steps)


def test_steps_do_not_grow_with_the_image() -> None:
    assert steps(lambda: DALLE((0, 1), (5, 6), 4)) <= steps(lambda: DALLE((0, 1))) == 23


def test_joined_scores_that_nobody_uses() -> None:
    """Some layers return those of all heads, one after the other."""

    def attend(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attn = (q @ k.mT).masked_fill(~lower(q.shape[2]), -torch.inf).softmax(-1)
        net.all = torch.cat([attn, attn], 1)
        return attn @ v

    net, given, _ = network(prior(attend))
    assert torch.equal(Sampler(net, **given).sample(2), naive_sample(net, 2, **given))


# What is refused.


def ahead(count: int) -> Tensor:
    return torch.ones(count, count, dtype=torch.bool).tril(1)


def joined(net: Prior, q: Tensor, k: Tensor, v: Tensor, *, other: bool = False) -> Tensor:
    """Probabilities of the keys, twice."""
    dots = torch.cat([q @ k.mT, (v if other else q) @ k.mT], dim=-1)
    return dots.masked_fill(~lower(q.shape[2]).repeat(1, 2), -torch.inf).softmax(-1)


def other_queries(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attn = joined(net, q, k, v, other=True)
    return attn[..., : q.shape[2]] @ v + attn[..., q.shape[2] :] @ v


def along_queries(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([q @ k.mT, q @ k.mT], dim=-2).softmax(-1)[..., : q.shape[2], :] @ v


def seen_twice(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attn = joined(net, q, k, v)
    return attn[..., : q.shape[2]] @ v + attn[..., q.shape[2] :] @ v


def only_some(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined(net, q, k, v)[..., : q.shape[2]] @ v


def less(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attn = joined(net, q, k, v)
    return attn[..., : q.shape[2]] @ v - attn[..., q.shape[2] :] @ v


def overlapping(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attn = joined(net, q, k, v)
    return attn[..., : q.shape[2]] @ v + attn[..., : q.shape[2]] @ v


def of_others(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Values that another softmax weighs."""
    a, b = joined(net, q, k, v), joined(net, 2 * q, k, v)
    return a[..., : q.shape[2]] @ v + b[..., q.shape[2] :] @ v


def every_second(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attn = joined(net, q, k, v)
    return attn[..., ::2] @ v + attn[..., 1::2] @ v


@pytest.mark.parametrize(
    ("attend", "error", "text"),
    [
        (in_rows(0, ahead), NotCausal, r"depend on colour 0 at \(y\+0, x\+0\)"),
        (in_rows(1, ahead), NotCausal, r"depend on colour 0 at \(y\+1, x-1\)"),
        (other_queries, UnsupportedModel, "on what aten.cat.default makes of products of queries and keys"),
        (along_queries, UnsupportedModel, "on what aten.cat.default makes of products of queries and keys"),
        (seen_twice, UnsupportedModel, "aten.add.Tensor of keys that are seen twice"),
        (only_some, UnsupportedModel, "of probabilities of some keys times values"),
        (less, UnsupportedModel, "aten.sub.Tensor of probabilities of some keys times values"),
        (overlapping, UnsupportedModel, "aten.add.Tensor of probabilities of the same keys times values"),
        (of_others, UnsupportedModel, "aten.add.Tensor to probabilities of some keys times values"),
        (every_second, UnsupportedModel, "of some of the probabilities of attention in another layout"),
    ],
)
def test_refused(attend: Callable, error: type[Exception], text: str) -> None:
    net, given, _ = network(prior(attend))
    with pytest.raises(error, match=text):
        Sampler(net, **given)
