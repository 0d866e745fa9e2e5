"""Small causal networks with attention, in the styles that people write them in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgen.sampling import Categorical, NotCausal, Sampler, UnsupportedModel, audit, naive_sample

from .networks import LEVELS

CODES = Categorical(LEVELS, input_range=None)


def check_equals_naive_loop(net: nn.Module, given: dict[str, Any]) -> None:
    """And the audit tells its images from others."""
    expected = naive_sample(net, 3, **given)
    for backend in ("reference", "cpu"):
        assert torch.equal(Sampler(net, **given, backend=backend).sample(3), expected)
    assert audit(net, expected, **given).ok
    assert not audit(net, (expected + 1) % LEVELS, **given).ok


def lower(count: int) -> Tensor:
    """bool [count, count]: which keys a query sees, itself included."""
    return torch.ones(count, count, dtype=torch.bool).tril()


class Prior(nn.Module):
    """Codes [N, H, W] -> logits, by one block of attention in some style: attend(net, query, keys, values), each [N,
    heads, T, depth].
    """

    def __init__(self, attend: Callable, height: int, width: int, heads: int = 2, depth: int = 3, keys: int = 0):
        super().__init__()
        self.attend, self.heads, self.depth, self.size = attend, heads, depth, (height, width)
        dim, count = heads * depth, height * width
        self.embedding = nn.Embedding(LEVELS, dim)
        self.sos = nn.Parameter(torch.randn(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, count, dim))
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.keys = nn.Linear(dim, (keys or heads) * depth)
        self.values = nn.Linear(dim, (keys or heads) * depth)
        self.project = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, LEVELS)
        self.drop = nn.Dropout(0.1)
        self.register_buffer("tril", torch.tril(torch.ones(count + 3, count + 3))[None, None])
        self.register_buffer("bias", torch.randn(heads, count, count))
        self.temperature = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)
        self.table = nn.Parameter(torch.randn((2 * height - 1) * (2 * width - 1), heads))
        self.query_norm, self.key_norm = nn.LayerNorm(depth), nn.LayerNorm(depth)

    def tokens(self, x: Tensor) -> Tensor:
        tokens = self.embedding(x.flatten(1))
        return torch.cat([self.sos.expand(len(x), -1, -1), tokens[:, :-1]], 1) + self.position

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x)
        h = self.norm(tokens)
        q, k, v = (f(h).unflatten(2, (-1, self.depth)).transpose(1, 2) for f in (self.query, self.keys, self.values))
        y = self.attend(self, q, k, v).transpose(1, 2).flatten(2)
        return self.out(tokens + self.project(F.gelu(y))).transpose(1, 2).unflatten(2, self.size)


# Ways to attend.


def min_gpt(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    count = q.size(-2)
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(net.tril[:, :, :count, :count] == 0, float("-inf"))
    return net.drop(F.softmax(att, dim=-1)) @ v


def nano_gpt(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0, is_causal=True)


def own_kernel(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Kernels by choice, as LlamaGen has them."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).view(len(y), -1, net.heads * net.depth).unflatten(2, (net.heads, -1)).transpose(1, 2)


def own_kernel_masked(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A mask that is a number for each head, query and key, and one of booleans."""
    mask = torch.zeros(len(q), 1, *net.bias.shape[1:]).masked_fill(~lower(q.shape[2]), -torch.inf)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask + net.bias, scale=0.3)
        return found + F.scaled_dot_product_attention(q, k, v, attn_mask=lower(q.shape[2]))


def own_kernel_grouped(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def chosen_math(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def tensorflow(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = net.tril[..., : q.shape[2], : q.shape[2]]
    scores = torch.matmul(q, k.permute(0, 1, 3, 2)) * net.depth**-0.5
    scores = scores * mask - 1e10 * (1 - mask)
    return torch.matmul(torch.softmax(scores, -1), v)


def tensorflow_by_samples(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = net.tril[0, 0, : q.shape[2], : q.shape[2]]
    scores = torch.matmul(q, k.transpose(2, 3))
    scores = mask * scores + (1 - mask) * torch.full_like(scores, -1e9)
    return torch.matmul(torch.softmax(scores, -1), v)


def hugging_face(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2))
    scores = scores / torch.full([], v.size(-1) ** 0.5, dtype=scores.dtype)
    mask = net.tril.bool()[:, :, : k.size(-2), : k.size(-2)]
    value = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype)
    scores = torch.where(mask, scores.to(scores.dtype), value)
    return torch.matmul(nn.functional.softmax(scores, dim=-1).type(v.dtype), v)


def hugging_face_additive(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = (1.0 - net.tril[:, :, : k.size(-2), : k.size(-2)]) * torch.finfo(q.dtype).min
    scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(net.depth) + mask
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def baddbmm(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n, heads, count, depth = q.shape
    bias = net.bias.masked_fill(~lower(count), -torch.inf).repeat(n, 1, 1)
    q, k, v = (t.reshape(n * heads, count, depth) for t in (q, k, v))
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=0.7)
    return torch.bmm(scores.softmax(-1), v).view(n, heads, count, depth)


def baddbmm_upcast(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """HuggingFace's reordered and upcast attention: an empty matrix, times zero."""
    n, heads, count, depth = q.shape
    weights = torch.empty(n * heads, count, count, dtype=torch.float32)
    q, k = q.reshape(-1, count, depth), k.transpose(-1, -2).reshape(-1, depth, count)
    weights = torch.baddbmm(weights, q.float(), k.float(), beta=0, alpha=0.5).reshape(n, heads, count, count)
    weights = torch.where(lower(count), weights, torch.finfo(torch.float32).min)
    return torch.matmul(weights.softmax(-1), v)


def by_einsum(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * net.depth**-0.5
    scores.masked_fill_(~lower(q.shape[2]), -torch.finfo(scores.dtype).max)
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(dim=-1), v)


def by_einsum_over_positions(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads behind positions."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = torch.einsum("blhe,bshe->bhls", q, k).masked_fill(~lower(q.shape[1]), -torch.inf)
    return torch.einsum("bhls,bshd->blhd", torch.softmax(scores * 0.6, -1), v).transpose(1, 2)


def by_einsum_of_batches(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n, heads, count, depth = q.shape
    q, k, v = (t.reshape(n * heads, count, depth) for t in (q, k, v))
    scores = torch.einsum("bid,bjd->bij", q, k) / depth
    scores = scores.masked_fill(~lower(count), -torch.inf)
    return torch.einsum("bij,bjd->bid", scores.softmax(2), v).view(n, heads, count, depth)


def by_einsum_of_heads_first(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.permute(1, 0, 2, 3).reshape(-1, *t.shape[2:]) for t in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).masked_fill(~lower(q.shape[1]), -torch.inf)
    return torch.bmm(scores.softmax(-1), v).view(net.heads, -1, *v.shape[1:]).transpose(0, 1)


def sagan(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n, heads, count, depth = q.shape
    q, k, v = (t.reshape(n * heads, count, depth) for t in (q, k, v))
    energy = torch.bmm(q, k.permute(0, 2, 1)) + torch.zeros(count, count).masked_fill(~lower(count), -torch.inf)
    return (
        torch.bmm(v.permute(0, 2, 1), F.softmax(energy, dim=-1).permute(0, 2, 1))
        .permute(0, 2, 1)
        .view(n, heads, count, depth)
    )


def keys_times_queries(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Transposed scores, softmax over the last but one dimension."""
    scores = torch.einsum("bhjd,bhid->bhji", k, q).masked_fill(~lower(q.shape[2]).T, -torch.inf)
    return torch.einsum("bhji,bhjd->bhid", scores.softmax(-2), v)


def scaled_query(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * net.depth**-0.5) @ k.mT
    return (scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)).softmax(-1) @ v


def scaled_both(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scale = 1 / math.sqrt(math.sqrt(net.depth))
    scores = torch.einsum("bhtc,bhsc->bhts", q * scale, k * scale)
    scores = torch.where(lower(q.shape[2]), scores, torch.tensor(-1e30))
    return torch.einsum("bhts,bhsc->bhtc", torch.softmax(scores.float(), -1).type(scores.dtype), v)


def less_the_maximum(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(2, 3)).masked_fill(~lower(q.shape[2]), -1e9)
    scores = scores - scores.amax(dim=-1, keepdim=True).detach()
    return scores.softmax(-1) @ v


def less_the_maximum_first(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(2, 3)
    scores = scores - torch.max(scores, dim=-1, keepdim=True)[0]
    return scores.masked_fill(~lower(q.shape[2]), -1e9).softmax(-1) @ v


def softmax_by_hand(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(2, 3)).masked_fill(~lower(q.shape[2]), -torch.inf)
    weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
    return (weights / weights.sum(-1, keepdim=True)) @ v


def softmax_by_hand_masked(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.exp(q @ k.transpose(2, 3)) * lower(q.shape[2])
    return (weights @ v) / weights.sum(-1, keepdim=True)


def cosine(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Swin v2: cosines with a temperature for each head."""
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scores = scores * torch.clamp(net.temperature, max=math.log(100.0)).exp()
    return scores.masked_fill(~lower(q.shape[2]), -torch.inf).softmax(-1) @ v


def normed(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(net.query_norm(q), net.key_norm(k), v, is_causal=True, scale=0.9)


def normed_by_squares(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The mean square is one channel of each head."""
    q, k = (t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6) * net.query_norm.weight for t in (q, k))
    return F.scaled_dot_product_attention(q, k, F.rms_norm(v, (net.depth,)), is_causal=True, scale=0.9)


def temperature_of_positions(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores divided by the logarithm of how much is seen."""
    scores = q @ k.transpose(2, 3) * torch.arange(2, q.shape[2] + 2)[:, None].float().log() * 3
    return scores.masked_fill(~lower(q.shape[2]), -torch.inf).softmax(-1) @ v


def bool_mask(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=lower(q.shape[2]))


def float_mask(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[2], q.shape[2]).masked_fill(~lower(q.shape[2]), -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask + net.bias, scale=0.3)


def grouped_keys(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def repeated_keys(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(net.heads // t.shape[1], 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def one_key_head(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Broadcast by matmul."""
    return (q @ k.transpose(2, 3)).masked_fill(~lower(q.shape[2]), -torch.inf).softmax(-1) @ v


def one_key_head_einsum(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k[:, 0], v[:, 0]
    scores = torch.einsum("bhid,bjd->bhij", q, k).masked_fill(~lower(q.shape[2]), -torch.inf)
    return torch.einsum("bhij,bjd->bhid", scores.softmax(-1), v)


def swin(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    height, width = net.size
    coords = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).flatten(1)
    relative = coords[:, :, None] - coords[:, None]
    index = (relative[0] + height - 1) * (2 * width - 1) + relative[1] + width - 1
    bias = net.table[index.view(-1)].view(*index.shape, -1).permute(2, 0, 1).contiguous()
    scores = q @ k.transpose(-2, -1) + bias.unsqueeze(0)
    return scores.masked_fill(~lower(q.shape[2]), -100.0 * 1000).softmax(-1) @ v


def t5(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    count = q.shape[2]
    distance = (torch.arange(count)[:, None] - torch.arange(count)).clamp(0, len(net.table) - 1)
    bias = F.embedding(distance, net.table).permute(2, 0, 1).unsqueeze(0)
    bias = bias + torch.where(lower(count), 0.0, torch.finfo(q.dtype).min)
    scores = torch.matmul(q, k.transpose(3, 2))
    scores += bias
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v)


def t5_old(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A mask of -10000, plus a bias."""
    bias = net.bias.abs() + (1 - lower(q.shape[2]).float()) * -10000.0
    return (q @ k.mT + bias).softmax(-1) @ v


def alibi(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    count = q.shape[2]
    slopes = 2.0 ** -torch.arange(1, net.heads + 1)
    bias = slopes[:, None, None] * (torch.arange(count) - torch.arange(count)[:, None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(~lower(count), -torch.inf))


def window(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A neighbourhood of two rows above and a column beside: the masks of most rows have holes."""
    y, x = (t.flatten() for t in torch.meshgrid(*(torch.arange(s) for s in net.size), indexing="ij"))
    near = ((y[:, None] - y).abs() <= 2) & ((x[:, None] - x).abs() <= 1) & lower(q.shape[2])
    return (q @ k.mT).masked_fill(~near, -1e9).softmax(-1) @ v


def band(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    count = q.shape[2]
    mask = torch.ones(count, count).tril().triu(-3)
    return (q @ k.mT).masked_fill(mask == 0, -torch.inf).softmax(-1) @ v


def heads_that_see_differently(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sparse transformer: one head near, the other at strides."""
    count = q.shape[2]
    distance = torch.arange(count)[:, None] - torch.arange(count)
    masks = torch.stack([(distance >= 0) & (distance < 3), (distance >= 0) & (distance % 2 == 0)])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=masks)


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def angles(count: int, depth: int) -> Tensor:
    return torch.outer(torch.arange(count).float(), 10.0 ** -(torch.arange(0, depth, 2) / depth))


def rotary_halves(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Llama: halves."""
    both = torch.cat([angles(q.shape[2], net.depth)] * 2, -1)
    cos, sin = both.cos(), both.sin()
    q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def rotary_pairs(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stacked and flattened: neighbouring channels."""
    angle = angles(q.shape[2], net.depth)
    cos, sin = angle.cos(), angle.sin()

    def turn(x: Tensor) -> Tensor:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)

    return F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)


def rotary_unbound(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """lucidrains: repeated angles, pairs by unflatten and unbind."""
    angle = angles(q.shape[2], net.depth).repeat_interleave(2, dim=-1)

    def turn(x: Tensor) -> Tensor:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * angle.cos() + torch.stack([-b, a], -1).flatten(-2) * angle.sin()

    scores = torch.einsum("bhid,bhjd->bhij", turn(q), turn(k)).masked_fill(~lower(q.shape[2]), -1e9)
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


def rotary_partial(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Only some of the channels turn."""
    both = torch.cat([angles(q.shape[2], 2)] * 2, -1)

    def turn(x: Tensor) -> Tensor:
        x, rest = x[..., :2], x[..., 2:]
        return torch.cat([x * both.cos() + rotate_half(x) * both.sin(), rest], -1)

    return F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)


def rotary_complex(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    turns = torch.polar(torch.ones(q.shape[2], net.depth // 2), angles(q.shape[2], net.depth))

    def turn(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)

    return F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)


def values_of_inputs(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys are queries."""
    return (q @ q.mT * 0.5).masked_fill(~lower(q.shape[2]), -torch.inf).softmax(-1) @ v


def each_head(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By itself."""
    out = []
    for head in range(net.heads):
        scores = q[:, head] @ k[:, head].transpose(1, 2) / 2
        scores = scores.masked_fill(~lower(q.shape[2]), -torch.inf)
        out.append(torch.softmax(scores, -1) @ v[:, head])
    return torch.stack(out, 1)


def talking_heads(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhij,hg->bgij", q @ k.mT, net.bias[:, : net.heads, 0])
    return scores.masked_fill(~lower(q.shape[2]), -torch.inf).softmax(-1) @ v


def renormalised(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1) * lower(q.shape[2])
    return (weights / weights.sum(-1, keepdim=True)) @ v


def attention_sink(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """add_zero_attn and add_bias_kv: one more key, that everybody sees."""
    k, v = (torch.cat([t, torch.zeros_like(t[:, :, :1])], 2) for t in (k, v))
    mask = F.pad(lower(q.shape[2]), (0, 1), value=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def sigmoid_attention(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.sigmoid(q @ k.mT) * lower(q.shape[2])) @ v


def linear_attention(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * lower(q.shape[2])) @ v


def grouped_by_hand(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Five dimensions: groups of heads that share their keys."""
    q = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bghid,bgjd->bghij", q, k).masked_fill(~lower(q.shape[3]), -torch.inf)
    return torch.einsum("bghij,bgjd->bghid", scores.softmax(-1), v).flatten(1, 2)


def grouped_by_matmul(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.unflatten(1, (k.shape[1], -1))
    scores = (q @ k[:, :, None].mT).masked_fill(~lower(q.shape[3]), -torch.inf)
    return (scores.softmax(-1) @ v[:, :, None]).flatten(1, 2)


def in_chunks(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Some queries at a time, to save memory."""
    out, mask = [], lower(q.shape[2])
    for first in range(0, q.shape[2], 6):
        chunk = slice(first, first + 6)
        scores = (q[:, :, chunk] @ k.mT).masked_fill(~mask[chunk], -torch.inf)
        out.append(scores.softmax(-1) @ v)
    return torch.cat(out, 2)


def in_chunks_of_keys(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each chunk of queries with the keys so far."""
    out, mask = [], lower(q.shape[2])
    for first in range(0, q.shape[2], 6):
        chunk, last = slice(first, first + 6), first + 6
        scores = (q[:, :, chunk] @ k[:, :, :last].mT).masked_fill(~mask[chunk, :last], -torch.inf)
        out.append(scores.softmax(-1) @ v[:, :, :last])
    return torch.cat(out, 2)


def not_a_number(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A strict mask: the first position, which sees nothing, becomes zero."""
    scores = (q @ k.mT).masked_fill(lower(q.shape[2]).T, -torch.inf)
    return torch.nan_to_num(scores.softmax(-1)) @ v


def masked_twice(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = lower(q.shape[2]).T
    return (q @ k.mT).masked_fill(mask, torch.finfo(q.dtype).min).softmax(-1).masked_fill(mask, 0.0) @ v


def unfolded(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys by F.unfold: a neighbourhood of each pixel."""
    n, heads, count, depth = q.shape
    grids = (F.pad(t.transpose(2, 3).reshape(n, -1, *net.size), (1, 1, 1, 0)) for t in (k, v))
    k, v = (F.unfold(t, (2, 3))[:, :, :count].view(n, heads, depth, 6, count) for t in grids)
    scores = torch.einsum("nhtd,nhdkt->nhtk", q, k)[..., :4]
    return torch.einsum("nhtk,nhdkt->nhtd", scores.softmax(-1), v[:, :, :, :4])


def in_place(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores *= 0.5
    scores.div_(1.5)
    scores += net.bias
    scores.masked_fill_(~lower(q.shape[2]), -torch.inf)
    return torch.softmax(scores, -1) @ v


def written_by_mask(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = -(q @ k.mT)
    scores[:, :, ~lower(q.shape[2])] = -torch.inf
    return scores.softmax(-1) @ v


def heads_last(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bijh", q, k).masked_fill(~lower(q.shape[2])[..., None], -torch.inf)
    return torch.einsum("bijh,bhjd->bhid", scores.softmax(2), v)


def position_by_position(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = []
    for t in range(q.shape[2]):
        probabilities = (q[:, :, t : t + 1] @ k[:, :, : t + 1].mT).softmax(-1)
        out.append(probabilities @ v[:, :, : t + 1])
    return torch.cat(out, 2)


def twice(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The probabilities are used again."""
    probabilities = (q @ k.mT).masked_fill(~lower(q.shape[2]), -torch.inf).softmax(-1)
    return probabilities @ (probabilities @ v) + probabilities @ v


def lower_triangle_of_scores(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tril(q @ k.mT)
    return scores.masked_fill(scores == 0, -torch.inf).softmax(-1) @ v


def of_log_probabilities(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~lower(q.shape[2]), -torch.inf)
    return F.log_softmax(scores, -1).exp() @ v


def less_a_logarithm(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~lower(q.shape[2]), -torch.inf)
    return torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True)) @ v


def weights_of_keys(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Probabilities times a number for each key."""
    probabilities = (q @ k.mT).masked_fill(~lower(q.shape[2]), -torch.inf).softmax(-1)
    return (probabilities * torch.linspace(0.5, 2, q.shape[2])) @ v


def added_keys(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of two products."""
    scores = q @ k.mT + q @ q.mT
    return scores.masked_fill(~lower(q.shape[2]), -torch.inf).softmax(-1) @ v


def relative_keys(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Shaw et al.: a vector for each distance, times the query."""
    count = q.shape[2]
    table = net.table[:, :1].expand(-1, net.depth)
    distance = (torch.arange(count)[:, None] - torch.arange(count)).clamp(0, len(table) - 1)
    scores = q @ k.mT + torch.einsum("bhid,ijd->bhij", q, table[distance])
    return scores.masked_fill(~lower(count), -torch.inf).softmax(-1) @ v


def skewed(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Music transformer: relative keys by padding and reshaping."""
    count = q.shape[2]
    relative = q @ net.position[0, :, : net.depth].T
    relative = F.pad(relative, (1, 0)).view(*q.shape[:2], count + 1, count)[:, :, 1:]
    return (q @ k.mT + relative).masked_fill(~lower(count), -torch.inf).softmax(-1) @ v


@dataclass
class Case:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4, 5)
    head: Categorical = CODES
    num_classes: int | None = None
    condition: Tensor | None = None


def prior(attend: Callable, size: tuple[int, int] = (4, 5), heads: int = 2, depth: int = 3, **options: Any) -> Case:
    return Case(lambda: Prior(attend, *size, heads, depth, **options), size)


STYLES: dict[str, Case] = {
    f.__name__: prior(f)
    for f in (
        min_gpt, nano_gpt, tensorflow, tensorflow_by_samples, hugging_face, hugging_face_additive, baddbmm,
        baddbmm_upcast, by_einsum, by_einsum_over_positions, by_einsum_of_batches, by_einsum_of_heads_first, sagan,
        keys_times_queries, scaled_query, scaled_both, less_the_maximum, less_the_maximum_first, softmax_by_hand,
        renormalised, cosine, normed, normed_by_squares, temperature_of_positions, bool_mask, float_mask, swin, t5,
        t5_old, alibi, window, band, heads_that_see_differently, values_of_inputs, each_head, in_chunks,
        in_chunks_of_keys, not_a_number, masked_twice, written_by_mask, heads_last, twice, in_place, attention_sink,
        own_kernel, own_kernel_masked, chosen_math,
    )
}  # fmt: skip
STYLES |= {
    f.__name__: prior(f, depth=4) for f in (rotary_halves, rotary_pairs, rotary_unbound, rotary_partial, rotary_complex)
}
STYLES |= {
    f.__name__: prior(f, (3, 3), 4, 2, keys=2)
    for f in (grouped_keys, own_kernel_grouped, repeated_keys, grouped_by_hand, grouped_by_matmul)
}
STYLES |= {f.__name__: prior(f, (3, 3), 3, 3, keys=1) for f in (one_key_head, one_key_head_einsum)}
STYLES |= {
    f"{f.__name__} {size} {heads} {depth}": prior(f, size, heads, depth)
    for f, size, heads, depth in (
        (min_gpt, (1, 6), 1, 5), (nano_gpt, (6, 1), 3, 3), (by_einsum_of_heads_first, (2, 2), 2, 2), (t5, (1, 1), 3, 1),
        (sagan, (1, 1), 2, 3), (position_by_position, (3, 3), 2, 3), (nano_gpt, (4, 4), 1, 1), (cosine, (1, 6), 3, 2),
        (normed, (6, 1), 2, 6),
    )
}  # fmt: skip


# Networks that are not causal.


def no_mask(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def off_by_one(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(1)
    return (q @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def transposed_mask(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~lower(q.shape[2]).T, -torch.inf).softmax(-1) @ v


def strict_mask(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first position sees nothing."""
    return (q @ k.mT).masked_fill(lower(q.shape[2]).T, -1e9).softmax(-1) @ v


def strict_mask_nan(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(lower(q.shape[2]).T, -torch.inf).softmax(-1) @ v


def mask_behind_softmax(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) * lower(q.shape[2])) @ v


def mild_mask(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~lower(q.shape[2]), -50.0).softmax(-1) @ v


def softmax_of_queries(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~lower(q.shape[2]), -torch.inf).softmax(-2) @ v


def only_one_head_masked(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.stack([lower(q.shape[2]), torch.ones_like(lower(q.shape[2]))])
    return (q @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def mixed_samples(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.flip(0), k.flip(0), v, is_causal=True)


def mask_of_the_image(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(q[..., :1] > 0, -torch.inf).softmax(-1) @ v


def probabilities_as_features(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probabilities = (q @ k.mT).masked_fill(~lower(q.shape[2]), -torch.inf).softmax(-1)
    return probabilities @ v + probabilities[..., :1]


def renormalised_off_by_one(net: Prior, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1) * torch.ones(q.shape[2], q.shape[2]).tril(1)
    return (weights / weights.sum(-1, keepdim=True)) @ v


ALONE = "of a position that sees no key: softmax makes it see all of them, or NaN"
# network -> error, and what it says
WRONG: dict[str, tuple[Case, type[Exception], str]] = {
    f.__name__: (prior(f), error, text)
    for f, error, text in (
        (no_mask, NotCausal, r"colour 0 at \(y\+3, x\+3\); the layers between: norm -> values -> "),
        (off_by_one, NotCausal, r"colour 0 at \(y\+1, x-5\)"),
        (transposed_mask, NotCausal, r"colour 0 at \(y\+3, x\+3\)"),
        (only_one_head_masked, NotCausal, r"colour 0 at \(y\+3, x\+3\)"),
        (renormalised_off_by_one, NotCausal, r"colour 0 at \(y\+1, x-5\)"),
        (strict_mask, UnsupportedModel, ALONE),
        (strict_mask_nan, UnsupportedModel, ALONE),
        (mask_behind_softmax, UnsupportedModel, "of probabilities times what differs between keys"),
        (mild_mask, UnsupportedModel, "of products of queries and keys times what differs between both"),
        (softmax_of_queries, UnsupportedModel, "that sums over anything but the keys"),
        (mixed_samples, UnsupportedModel, "that mixes samples|of matrices that do not belong to samples"),
        (mask_of_the_image, UnsupportedModel, "products of queries and keys and what depends on the image"),
        (probabilities_as_features, UnsupportedModel, "to probabilities of attention"),
        (
            softmax_by_hand_masked,
            UnsupportedModel,
            "of products of queries and keys and anything but softmax and values",
        ),
        (unfolded, UnsupportedModel, "aten._softmax.default on some of the products of queries and keys"),
        (lower_triangle_of_scores, UnsupportedModel, "on what aten.tril.default makes of products of queries and keys"),
        (
            of_log_probabilities,
            UnsupportedModel,
            "on what aten._log_softmax.default makes of products of queries and keys",
        ),
        (less_a_logarithm, UnsupportedModel, "on what aten.logsumexp.default makes of products of queries and keys"),
        (weights_of_keys, UnsupportedModel, "of probabilities times what differs between keys"),
        (added_keys, UnsupportedModel, "aten.add.Tensor on products of queries and keys and what depends on the image"),
        (relative_keys, UnsupportedModel, "of matrices that do not belong to samples"),
        (skewed, UnsupportedModel, "aten.add.Tensor on products of queries and keys and what depends on the image"),
        (talking_heads, UnsupportedModel, "on products of queries and keys in another layout"),
        (sigmoid_attention, UnsupportedModel, "on what aten.sigmoid.default makes of products of queries and keys"),
        (linear_attention, UnsupportedModel, "of products of queries and keys and anything but softmax and values"),
    )
}
