"""Whole causal networks with attention, in the styles of others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.sampling import Categorical

from .attention_networks import Case, Prior, angles, hugging_face_additive, lower, rotate_half
from .networks import LEVELS, MaskedInPlace

IMAGES = Categorical(LEVELS)


class CausalConv2d(nn.Module):
    """rosinality's: padding that makes a convolution causal."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], padding: str):
        super().__init__()
        kh, kw = kernel
        self.pad = {
            "downright": (kw - 1, 0, kh - 1, 0),
            "down": (kw // 2, kw // 2, kh - 1, 0),
            "causal": (kw // 2, kw // 2, kh - 1, 0),
        }[padding]
        self.causal = kw // 2 if padding == "causal" else 0
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(inputs, outputs, kernel))

    def forward(self, x: Tensor) -> Tensor:
        if self.causal > 0:
            self.conv.parametrizations.weight.original1.data[:, :, -1, self.causal :].zero_()
        return self.conv(F.pad(x, self.pad))


class GatedResBlock(nn.Module):
    def __init__(self, dim: int, conv: Callable[[int, int], nn.Module], auxiliary: int = 0, condition: int = 0):
        super().__init__()
        self.conv1, self.conv2 = conv(dim, dim), conv(dim, 2 * dim)
        self.aux = nn.Conv2d(auxiliary, dim, 1) if auxiliary else None
        self.condition = nn.Conv2d(condition, 2 * dim, 1, bias=False) if condition else None

    def forward(self, x: Tensor, aux: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        h = self.conv1(F.elu(x))
        if self.aux is not None:
            h = h + self.aux(F.elu(aux))
        h = self.conv2(F.elu(h))
        if self.condition is not None:
            h += self.condition(condition)
        return F.glu(h, 1) + x


def causal_mask(size: int) -> tuple[Tensor, Tensor]:
    mask = torch.from_numpy(np.triu(np.ones([size, size]), k=1).astype(np.uint8).T)
    start = torch.ones(size)
    start[0] = 0
    return mask.unsqueeze(0), start.unsqueeze(1)


class CausalAttention(nn.Module):
    """rosinality's vq-vae-2-pytorch."""

    def __init__(self, query: int, key: int, dim: int, heads: int = 2):
        super().__init__()
        sizes = (query, key, key)
        self.query, self.key, self.value = (nn.utils.weight_norm(nn.Linear(size, dim)) for size in sizes)
        self.dim_head, self.n_head, self.dropout = dim // heads, heads, nn.Dropout(0.1)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        batch, _, height, width = key.shape

        def reshape(x: Tensor) -> Tensor:
            return x.view(batch, -1, self.n_head, self.dim_head).transpose(1, 2)

        query_flat = query.view(batch, query.shape[1], -1).transpose(1, 2)
        key_flat = key.view(batch, key.shape[1], -1).transpose(1, 2)
        query = reshape(self.query(query_flat))
        key = reshape(self.key(key_flat)).transpose(2, 3)
        value = reshape(self.value(key_flat))
        attn = torch.matmul(query, key) / math.sqrt(self.dim_head)
        mask, start_mask = causal_mask(height * width)
        attn = attn.masked_fill(mask == 0, -1e4)
        attn = torch.softmax(attn, 3) * start_mask
        attn = self.dropout(attn)
        out = attn @ value
        out = out.transpose(1, 2).reshape(batch, height, width, self.dim_head * self.n_head)
        return out.permute(0, 3, 1, 2)


class PixelBlock(nn.Module):
    def __init__(self, dim: int, condition: int):
        super().__init__()

        def causal(inputs: int, outputs: int) -> nn.Module:
            return CausalConv2d(inputs, outputs, (3, 3), "causal")

        def point(inputs: int, outputs: int) -> nn.Module:
            return nn.utils.weight_norm(nn.Conv2d(inputs, outputs, 1))

        self.resblocks = nn.ModuleList([GatedResBlock(dim, causal, condition=condition)])
        self.key_resblock = GatedResBlock(2 * dim + 2, point)
        self.query_resblock = GatedResBlock(dim + 2, point)
        self.attention = CausalAttention(dim + 2, 2 * dim + 2, dim // 2 * 2)
        self.out_resblock = GatedResBlock(dim, point, dim // 2 * 2)

    def forward(self, x: Tensor, background: Tensor, condition: Tensor | None) -> Tensor:
        out = x
        for block in self.resblocks:
            out = block(out, condition=condition)
        key = self.key_resblock(torch.cat([x, out, background], 1))
        query = self.query_resblock(torch.cat([out, background], 1))
        return self.out_resblock(out, self.attention(query, key))


class PixelSNAIL(nn.Module):
    """rosinality's, of one hot codes, background coordinates, and a condition of coarser codes."""

    def __init__(self, height: int, width: int, dim: int = 4, blocks: int = 2, conditional: bool = False):
        super().__init__()
        self.horizontal = CausalConv2d(LEVELS, dim, (2, 3), "down")
        self.vertical = CausalConv2d(LEVELS, dim, (2, 1), "downright")
        y = ((torch.arange(height, dtype=torch.float32) - height / 2) / height).view(1, 1, height, 1)
        x = ((torch.arange(width, dtype=torch.float32) - width / 2) / width).view(1, 1, 1, width)
        background = torch.cat([y.expand(1, 1, height, width), x.expand(1, 1, height, width)], 1)
        self.register_buffer("background", background)
        self.blocks = nn.ModuleList(PixelBlock(dim, 3 if conditional else 0) for _ in range(blocks))
        self.cond = nn.Sequential(nn.Conv2d(LEVELS, 3, 3, padding=1), nn.ELU()) if conditional else None
        self.out = nn.Sequential(nn.ELU(inplace=True), nn.Conv2d(dim, LEVELS, 1))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        batch, height, width = x.shape
        x = F.one_hot(x, LEVELS).permute(0, 3, 1, 2).type_as(self.background)
        horizontal = F.pad(self.horizontal(x), [0, 0, 1, 0])[:, :, : x.shape[2], :]
        vertical = F.pad(self.vertical(x), [1, 0, 0, 0])[:, :, :, : x.shape[3]]
        out = horizontal + vertical
        background = self.background[:, :, :height, :].expand(batch, 2, height, width)
        if condition is not None:
            condition = F.one_hot(condition, LEVELS).permute(0, 3, 1, 2).type_as(self.background)
            condition = F.interpolate(self.cond(condition), scale_factor=2)[:, :, :height, :width]
        for block in self.blocks:
            out = block(out, background, condition)
        return self.out(out)


class OriginalSNAIL(nn.Module):
    """PixelSNAIL as its TensorFlow code has it: 1x1 convolutions, causal mask by arithmetic, images of any colours."""

    def __init__(self, colours: int = 1, dim: int = 6, heads: int = 1):
        super().__init__()
        self.conv = MaskedInPlace("A", colours, dim, 3, padding=1)
        self.query, self.key, self.value = (
            nn.Conv2d(dim + 2, 5, 1),
            nn.Conv2d(dim + 2 + colours, 5, 1),
            nn.Conv2d(dim + 2 + colours, 7, 1),
        )
        self.out = nn.Conv2d(dim + 7, colours * LEVELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        h = torch.tanh(self.conv(x))
        y = torch.linspace(-0.5, 0.5, height).view(1, 1, -1, 1).expand(n, 1, height, width)
        background = torch.cat([y, torch.linspace(-0.5, 0.5, width).expand(n, 1, height, width)], 1)
        q = self.query(torch.cat([h, background], 1)).flatten(2).permute(0, 2, 1)
        raw = torch.cat([x, h, background], 1)
        k, v = self.key(raw).view(n, 5, -1), self.value(raw).view(n, 7, -1).permute(0, 2, 1)
        count = height * width
        causal = torch.tril(torch.ones(count, count), -1)[None]
        scores = torch.matmul(q, k) * causal - 1e10 * (1 - causal)
        probs = torch.softmax(scores, -1) * causal
        mixed = torch.matmul(probs, v).permute(0, 2, 1).reshape(n, 7, height, width)
        return self.out(F.elu(torch.cat([h, mixed], 1)))


class NeocxiSNAIL(nn.Module):
    """neocxi's / kamenbliznyuk's: two masked-shifted stacks, softmax over masked logits, then the mask again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = MaskedInPlace("A", 3, 6, 3, padding=1)
        self.nin_k, self.nin_q, self.nin_v = nn.Conv2d(9, 4, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(9, 6, 1)
        self.out = nn.Conv2d(6, 3 * LEVELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        ul = F.elu(self.conv(x))
        keys, values = self.nin_k(torch.cat([x, ul], 1)), self.nin_v(torch.cat([x, ul], 1))
        query = self.nin_q(ul)
        keys, query, values = (
            keys.reshape(b, 4, -1),
            query.reshape(b, 4, -1).transpose(1, 2),
            values.reshape(b, 6, -1).transpose(1, 2),
        )
        mask = torch.tril(torch.ones(h * w, h * w), diagonal=-1)
        logits = torch.bmm(query, keys) / 2
        logits = logits.masked_fill(mask.expand_as(logits) == 0, -1e10)
        attn = F.softmax(logits, dim=-1)
        attn = attn.masked_fill(mask.expand_as(attn) == 0, 0.0)
        out = torch.bmm(attn, values).transpose(1, 2).view(b, -1, h, w)
        return self.out(F.elu(ul + out))


class Tokens(nn.Module):
    """Codes [N, H, W] -> logits by layers of PyTorch: body(tokens, mask) of tokens [N, T, dim]."""

    def __init__(
        self, body: Callable, width: int = 5, height: int = 4, dim: int = 6, batch_first: bool = True, **parts: Callable
    ):
        super().__init__()
        self.embedding = nn.Embedding(LEVELS + 1, dim)
        self.rows, self.columns = nn.Embedding(height, dim), nn.Embedding(width, dim)
        self.parts = nn.ModuleDict({name: make() for name, make in parts.items()})
        self.body, self.batch_first, self.size = body, batch_first, (height, width)
        self.out = nn.Linear(dim, LEVELS)

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        n = len(x)
        codes = F.pad(x.flatten(1) + 1, (1, -1))  # the token 0 is the start
        h = self.embedding(codes)
        h = h + (self.rows.weight[:, None] + self.columns.weight[None]).flatten(0, 1)
        h = h if self.batch_first else h.transpose(0, 1)
        h = self.body(self, h, *rest)
        h = h if self.batch_first else h.transpose(0, 1)
        return self.out(h).permute(0, 2, 1).reshape(n, LEVELS, *self.size)


def mha(**options: Any) -> Case:
    def body(net: Tokens, h: Tensor) -> Tensor:
        count = h.shape[1 if net.batch_first else 0]
        mask = options.get("mask", lambda t: ~lower(t))(count)
        mask = mask.expand(len(h) * net.parts["mha"].num_heads, -1, -1) if options.get("expand") else mask
        out, _ = net.parts["mha"](h, h, h, attn_mask=mask, **options.get("call", {}))
        return h + out

    make = {"batch_first": True} | options.get("make", {})
    return Case(
        lambda: Tokens(
            body, mha=lambda: nn.MultiheadAttention(6, options.get("heads", 2), **make), batch_first=make["batch_first"]
        )
    )


def encoder(
    layers: int = 2, is_causal: bool | None = None, batch_first: bool = True, norm: bool = False, **options: Any
) -> Case:
    def body(net: Tokens, h: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(h.shape[1 if batch_first else 0])
        return net.parts["encoder"](h, mask=mask, **({} if is_causal is None else {"is_causal": is_causal}))

    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(6, 3, 8, batch_first=batch_first, **options)
        return nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(6) if norm else None, enable_nested_tensor=False)

    return Case(lambda: Tokens(body, encoder=make, batch_first=batch_first))


def decoder(batch_first: bool = True, **options: Any) -> Case:
    def body(net: Tokens, h: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(h.shape[1 if batch_first else 0])
        memory = memory if batch_first else memory.transpose(0, 1)
        return net.parts["decoder"](h, net.parts["read"](memory), tgt_mask=mask)

    def make() -> nn.Module:
        return nn.TransformerDecoderLayer(6, 2, 8, batch_first=batch_first, **options)

    return Case(
        lambda: Tokens(body, decoder=make, read=lambda: nn.Linear(3, 6), batch_first=batch_first),
        condition=torch.randn(7, 3),
    )


def cross() -> Case:
    """Keys and values of other sizes than queries."""

    def body(net: Tokens, h: Tensor, memory: Tensor) -> Tensor:
        return h + net.parts["mha"](h, memory, memory[..., :2])[0]

    def make() -> nn.Module:
        return nn.MultiheadAttention(6, 2, kdim=3, vdim=2, batch_first=True)

    return Case(lambda: Tokens(body, mha=make), condition=torch.randn(7, 3))


def transformer() -> Case:
    def body(net: Tokens, h: Tensor, memory: Tensor) -> Tensor:
        mask = net.parts["t"].generate_square_subsequent_mask(h.shape[1])
        return net.parts["t"](net.parts["read"](memory), h, tgt_mask=mask)

    return Case(
        lambda: Tokens(body, t=lambda: nn.Transformer(6, 2, 1, 1, 8, batch_first=True), read=lambda: nn.Linear(3, 6)),
        condition=torch.randn(7, 3),
    )


class ClassGPT(nn.Module):
    """taming-transformers: the class is the first token; or other condition tokens in front, and logits cut off."""

    def __init__(self, count: int, vocabulary: int, prefix: int = 1, dim: int = 6, size: tuple[int, int] = (4, 5)):
        super().__init__()
        self.tok_emb = nn.Embedding(vocabulary, dim)
        self.pos_emb = nn.Parameter(torch.randn(1, count + prefix, dim) * 0.3)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, 2, 8, batch_first=True, norm_first=True, activation="gelu")
            for _ in range(2)
        )
        self.ln_f, self.head = nn.LayerNorm(dim), nn.Linear(dim, LEVELS, bias=False)
        self.prefix, self.size, self.offset = prefix, size, vocabulary - LEVELS

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        c = condition.reshape(len(x), -1)
        cz = torch.cat((c, x.flatten(1) + self.offset), dim=1)[:, :-1]
        h = self.tok_emb(cz)
        h = h + self.pos_emb[:, : h.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(h.shape[1])
        for layer in self.layers:
            h = layer(h, mask)
        return self.head(self.ln_f(h))[:, self.prefix - 1 :].transpose(1, 2).reshape(len(x), LEVELS, *self.size)


class PrefixLM(ClassGPT):
    """Condition tokens see each other."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.tok_emb(torch.cat([condition, x.flatten(1) + self.offset], 1)[:, :-1])
        mask = lower(h.shape[1])
        mask[: self.prefix - 1, : self.prefix - 1] = True
        for layer in self.layers:
            h = layer(h + self.pos_emb[:, : h.shape[1]], ~mask)
        return self.head(h[:, self.prefix - 1 :]).transpose(1, 2).reshape(len(x), LEVELS, *self.size)


class EmbeddedClassGPT(ClassGPT):
    """minGPT with embeddings= : embeddings of the condition in front."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        c = self.tok_emb(condition.reshape(len(x), -1))
        h = torch.cat((c, self.tok_emb(x.flatten(1))[:, :-1]), dim=1)
        h = h + self.pos_emb[:, : h.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(h.shape[1])
        for layer in self.layers:
            h = layer(h, src_mask=mask, is_causal=True)
        return self.head(self.ln_f(h))[:, self.prefix - 1 :].transpose(1, 2).reshape(len(x), LEVELS, *self.size)


class Conv1D(nn.Module):
    """HuggingFace's."""

    def __init__(self, outputs: int, inputs: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) * 0.4), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], -1)


class GPT2(nn.Module):
    """HuggingFace's GPT-2, and ImageGPT's: Conv1D, split heads, learned token 0 + 1 shifted by a cat of integers."""

    def __init__(self, count: int, size: tuple[int, int], dim: int = 6, heads: int = 2):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(LEVELS + 1, dim), nn.Embedding(count, dim)
        self.ln_1, self.ln_2, self.ln_f = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.c_attn, self.c_proj, self.c_fc, self.c_out = (
            Conv1D(3 * dim, dim),
            Conv1D(dim, dim),
            Conv1D(4 * dim, dim),
            Conv1D(dim, 4 * dim),
        )
        self.register_buffer("bias", lower(count).view(1, 1, count, count), persistent=False)
        self.lm_head, self.heads, self.size = nn.Linear(dim, LEVELS + 1, bias=False), heads, size
        self.drop = nn.Dropout(0.1)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, count = len(x), x[0].numel()
        ids = torch.cat([torch.full((n, 1), LEVELS, dtype=torch.long), x.reshape(n, -1)[:, :-1]], dim=1)
        positions = torch.arange(0, count, dtype=torch.long).unsqueeze(0)
        h = self.drop(self.wte(ids) + self.wpe(positions))
        query, key, value = (self.split(t) for t in self.c_attn(self.ln_1(h)).split(h.shape[-1], dim=2))
        weights = torch.matmul(query, key.transpose(-1, -2)) / torch.full([], value.size(-1) ** 0.5)
        mask = self.bias[:, :, key.size(-2) - query.size(-2) : key.size(-2), : key.size(-2)]
        weights = torch.where(mask, weights, torch.full([], torch.finfo(weights.dtype).min))
        weights = self.drop(nn.functional.softmax(weights, dim=-1).type(value.dtype))
        out = torch.matmul(weights, value).permute(0, 2, 1, 3).contiguous()
        h = h + self.drop(self.c_proj(out.view(n, count, -1)))
        m = self.c_fc(self.ln_2(h))
        m = 0.5 * m * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (m + 0.044715 * torch.pow(m, 3.0))))
        h = h + self.c_out(m)
        logits = self.lm_head(self.ln_f(h))[..., :-1]
        return logits.view(n, *self.size, LEVELS).permute(0, 3, 1, 2)


class Axial(nn.Module):
    """Attention along rows, up to the pixel; along columns, over the rows above; of an image of masked features."""

    def __init__(self, colours: int = 1, heads: int = 1, only: str = "both", rows: int = 0):
        super().__init__()
        dim = 6
        self.biases = nn.Parameter(3 * torch.randn(rows, 1, 1, 5)) if rows else None  # of each row
        self.conv, self.only, self.heads = MaskedInPlace("A", colours, dim, 3, padding=1), only, heads
        self.row, self.column = nn.Linear(dim, 3 * dim), nn.Linear(dim, 3 * dim)
        self.out = nn.Conv2d(dim, colours * LEVELS, 1)

    def attend(self, qkv: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        scores = q @ k.transpose(2, 3) / 2 + mask
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        h = torch.tanh(self.conv(x))
        if self.only != "column":
            mask = torch.zeros(width, width).masked_fill(~lower(width), -1e9)
            if self.biases is not None:
                mask = self.biases.repeat(n, 1, 1, 1) + mask
            rows = h.permute(0, 2, 3, 1).reshape(n * height, width, -1)
            h = h + self.attend(self.row(rows), mask).view(n, height, width, -1).permute(0, 3, 1, 2)
        if self.only != "row":
            columns = h.permute(0, 3, 2, 1).reshape(n * width, height, -1)
            mask = torch.zeros(height, height).masked_fill(~lower(height), -1e9)
            y = self.attend(self.column(columns), mask).view(n, width, height, -1).permute(0, 3, 2, 1)
            h = h + y
        return self.out(h)


class Pooled(nn.Module):
    """Keys of a coarser level that has seen finished rows only; queries at all pixels."""

    def __init__(self, inside: bool = False) -> None:
        super().__init__()
        self.conv = MaskedInPlace("A", 1, 6, 3, padding=1)
        self.down = nn.Conv2d(6, 6, 2, stride=2)
        self.up = nn.ConvTranspose2d(6, 6, 2, stride=2)
        self.q, self.kv, self.out = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 10, 1), nn.Conv2d(12, LEVELS, 1)
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        _, _, height, width = x.shape
        h = torch.tanh(self.conv(x))
        low = F.elu(self.down(F.pad(h, (0, 0, 2, 0))[:, :, :height]))  # row Y holds rows 2Y-2 and 2Y-1
        k, v = self.kv(low).flatten(2).split([4, 6], 1)
        if self.inside:
            q = self.q(low).flatten(2).transpose(1, 2)
            mask = lower(k.shape[2])
            y = ((q @ k).masked_fill(~mask, -torch.inf).softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)
            y = self.up(y.unflatten(2, low.shape[2:]))
        else:
            q = self.q(h).flatten(2).transpose(1, 2)
            rows = torch.arange(height).repeat_interleave(width)
            mask = torch.arange(height // 2).repeat_interleave(width // 2) * 2 <= rows[:, None]
            y = ((q @ k).masked_fill(~mask, -torch.inf).softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)
            y = y.unflatten(2, (height, width))
        return self.out(torch.cat([h, y], 1))


class PixelGPT(nn.Module):
    """Colour images, a token for each pixel, shifted by zero padding; all colours of a pixel at once."""

    def __init__(self, style: str = "pad"):
        super().__init__()
        self.inp, self.style = nn.Linear(3, 8), style
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.out = nn.Linear(8, 3 * LEVELS)
        self.position = nn.Parameter(torch.randn(1, 20, 8))

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        t = x.permute(0, 2, 3, 1).reshape(n, -1, 3)
        if self.style == "pad":
            t = self.inp(F.pad(t, (0, 0, 1, -1)))
        elif self.style == "cat":
            t = torch.cat([torch.zeros(n, 1, 8), self.inp(t)[:, :-1]], 1)
        elif self.style == "roll":
            t = torch.roll(self.inp(t), 1, 1)
            t[:, 0] = 0
        elif self.style == "first":
            t = F.pad(self.inp(t), (0, 0, 1, 0))[:, :-1]
        t = self.layer(t + self.position, nn.Transformer.generate_square_subsequent_mask(t.shape[1]))
        return self.out(t).permute(0, 2, 1).view(n, -1, height, width)


class Subpixels(nn.Module):
    """A token for each colour of each pixel."""

    def __init__(self, size: tuple[int, int] = (3, 4)):
        super().__init__()
        self.emb, self.sos, self.pos = (
            nn.Embedding(LEVELS, 6),
            nn.Parameter(torch.randn(1, 1, 6)),
            nn.Parameter(torch.randn(1, 3 * size[0] * size[1], 6)),
        )
        self.layer, self.out = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Linear(6, LEVELS)

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        t = self.emb(x.permute(0, 2, 3, 1).reshape(n, -1))
        t = torch.cat([self.sos.expand(n, -1, -1), t[:, :-1]], 1) + self.pos
        t = self.layer(t, nn.Transformer.generate_square_subsequent_mask(t.shape[1]))
        return self.out(t).view(n, height, width, 3, LEVELS).permute(0, 4, 3, 1, 2)


class LabelGPT(nn.Module):
    """The class embedding is the first token; sinusoidal positions; adaptive layer norm by the class."""

    def __init__(self, adaptive: bool = False):
        super().__init__()
        self.emb, self.labels = nn.Embedding(LEVELS, 6), nn.Embedding(4, 6)
        angle = torch.outer(torch.arange(20).float(), 1e4 ** -(torch.arange(0, 6, 2) / 6))
        self.register_buffer("pe", torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[None])
        self.layer, self.out = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Linear(6, LEVELS)
        self.ada = nn.Linear(6, 12) if adaptive else None

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        y = self.labels(labels)
        t = torch.cat([y[:, None], self.emb(x.flatten(1))], 1)[:, :-1] + self.pe
        if self.ada is not None:
            shift, scale = self.ada(F.silu(y))[:, None].chunk(2, -1)
            t = F.layer_norm(t, (6,)) * (1 + scale) + shift
        t = self.layer(t, nn.Transformer.generate_square_subsequent_mask(20))
        return self.out(t).transpose(1, 2).reshape(len(x), LEVELS, *x.shape[-2:])


class CrossLabels(nn.Module):
    """Queries of the image, keys and values of a table, of labels or of the condition's feature map."""

    def __init__(self, kind: str):
        super().__init__()
        self.conv, self.kind = MaskedInPlace("A", 1, 6, 3, padding=1), kind
        self.q, self.kv, self.out = nn.Conv2d(6, 6, 1), nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(6, LEVELS, 1)
        self.table, self.labels = nn.Parameter(torch.randn(1, 5, 12)), nn.Embedding(4, 4 * 12)

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        n = len(x)
        h = torch.tanh(self.conv(x))
        if self.kind == "map":
            kv = self.kv(given).flatten(2).transpose(1, 2)
        elif self.kind == "labels":
            kv = self.labels(given).view(n, 4, 12)
        else:
            kv = self.table.expand(n, -1, -1)
        q = self.q(h).flatten(2).transpose(1, 2)
        q, k, v = (t.unflatten(2, (2, 3)).transpose(1, 2) for t in (q, *kv.chunk(2, 2)))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).transpose(1, 2)
        return self.out(h + y.unflatten(2, h.shape[2:]))


class ShiftedLogits(nn.Module):
    """Predictions of the next code, shifted at the end."""

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.embedding, self.position = nn.Embedding(LEVELS, 6), nn.Parameter(torch.randn(1, size[0] * size[1], 6))
        self.layer, self.out = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Linear(6, LEVELS)
        self.first = nn.Parameter(torch.randn(1, 1, LEVELS))

    def forward(self, x: Tensor) -> Tensor:
        t = self.embedding(x.flatten(1)) + self.position
        t = self.layer(t, nn.Transformer.generate_square_subsequent_mask(t.shape[1]))
        logits = torch.cat([self.first.expand(len(x), -1, -1), self.out(t)[:, :-1]], 1)
        return logits.transpose(1, 2).reshape(len(x), LEVELS, *x.shape[1:])


class Joined(nn.Module):
    """Keys of the condition and of the image in one tensor."""

    def __init__(self, behind: bool, fused: bool):
        super().__init__()
        self.embedding, self.sos, self.read = (
            nn.Embedding(LEVELS, 6),
            nn.Parameter(torch.randn(1, 1, 6)),
            nn.Linear(3, 6),
        )
        self.q, self.kv, self.out = nn.Linear(6, 6), nn.Linear(6, 12), nn.Linear(6, LEVELS)
        self.behind, self.fused = behind, fused

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        t = self.embedding(x.flatten(1))
        t = torch.cat([self.sos.expand(len(x), -1, -1), t[:, :-1]], 1)
        count, more = t.shape[1], memory.shape[1]
        memory, own = self.kv(self.read(memory)), self.kv(t)
        mask = F.pad(lower(count), (0, more) if self.behind else (more, 0), value=True)
        kv = torch.cat([own, memory] if self.behind else [memory, own], 1)
        q, k, v = (a.unflatten(2, (2, 3)).transpose(1, 2) for a in (self.q(t), *kv.chunk(2, 2)))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            y = (q @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ v
        return self.out(t + y.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(len(x), LEVELS, *x.shape[1:])


class Llama(nn.Module):
    """RMS norms of tokens and heads, rotations, one key for two heads, SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        linear = {name: nn.Linear(*size, bias=False) for name, size in (("q", (8, 8)), ("kv", (8, 8)), ("o", (8, 8)))}
        linear |= {"gate": nn.Linear(8, 12), "up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}
        self.parts, self.embedding, self.head = nn.ModuleDict(linear), nn.Embedding(LEVELS + 1, 8), nn.Linear(8, LEVELS)
        self.weight, self.norm = nn.Parameter(torch.rand(8)), nn.RMSNorm(8)
        self.norm_of_query, self.norm_of_key = nn.RMSNorm(4), nn.RMSNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        n, count = len(x), x[0].numel()
        t = self.embedding(torch.cat([torch.full((n, 1), LEVELS), x.flatten(1)[:, :-1]], 1))
        h = self.weight * (t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6))
        k, v = self.parts["kv"](h).chunk(2, -1)
        q = self.norm_of_query(self.parts["q"](h).view(n, count, 2, 4)).transpose(1, 2)
        k = self.norm_of_key(k.view(n, count, 1, 4)).transpose(1, 2)
        both = torch.cat([angles(count, 4)] * 2, -1)
        q, k = (a * both.cos() + rotate_half(a) * both.sin() for a in (q, k))
        v = v.view(n, count, 1, 4).transpose(1, 2)
        k, v = (a[:, :, None].expand(n, 1, 2, count, 4).reshape(n, 2, count, 4) for a in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, count, 8)
        t = t + self.parts["o"](y)
        h = self.norm(t)
        t = t + self.parts["down"](F.silu(self.parts["gate"](h)) * self.parts["up"](h))
        return self.head(t).permute(0, 2, 1).reshape(n, LEVELS, *x.shape[1:])


class Windows(nn.Module):
    """Windows of pixels attend by themselves."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv, self.qkv = MaskedInPlace("A", 1, 6, 3, padding=1), nn.Linear(6, 18)
        self.out, self.size = nn.Conv2d(6, LEVELS, 1), size

    def forward(self, x: Tensor) -> Tensor:
        (n, _, height, width), size = x.shape, self.size
        h = torch.tanh(self.conv(x))
        t = h.view(n, 6, height // size, size, width // size, size).permute(0, 2, 4, 3, 5, 1).reshape(-1, size**2, 6)
        q, k, v = self.qkv(t).reshape(-1, size**2, 3, 2, 3).permute(2, 0, 3, 1, 4)
        scores = (q * 0.6 @ k.transpose(-2, -1)).masked_fill(~lower(size**2), -1e9)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, height // size, width // size, size, size, 6)
        return self.out(h + y.permute(0, 5, 1, 3, 2, 4).reshape(n, 6, height, width))


class Blocks(nn.Module):
    """Image transformer: tokens see their block and the one before."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.embedding, self.sos = nn.Embedding(LEVELS, 6), nn.Parameter(torch.randn(1, 1, 6))
        self.q, self.k, self.v, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, LEVELS)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        n, size = len(x), self.size
        t = torch.cat([self.sos.expand(n, -1, -1), self.embedding(x.flatten(1))[:, :-1]], 1)
        q, k, v = (f(t).view(n, -1, size, 6) for f in (self.q, self.k, self.v))
        k, v = (torch.cat([F.pad(a, (0, 0, 0, 0, 1, 0))[:, :-1], a], 2) for a in (k, v))
        mask = torch.cat([torch.ones(size, size, dtype=torch.bool), lower(size)], 1)
        y = (q @ k.mT).masked_fill(~mask, -1e9).softmax(-1) @ v
        return self.out(t + y.flatten(1, 2)).transpose(1, 2).reshape(n, LEVELS, *x.shape[1:])


class Arithmetic(nn.Module):
    """Tokens that are numbers made of codes."""

    def __init__(self, token: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embedding, self.conv = nn.Embedding(3 * LEVELS, 6), MaskedInPlace("A", 6, LEVELS, 3, padding=1)
        self.token = token

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.embedding(self.token(x)).permute(0, 3, 1, 2))


def half(dtype: torch.dtype) -> Case:
    return Case(lambda: Prior(hugging_face_additive, 4, 5).to(dtype))


MODELS: dict[str, Case] = {
    "rosinality": Case(lambda: PixelSNAIL(4, 5)),
    "rosinality deep": Case(lambda: PixelSNAIL(6, 3, 6, 3), (6, 3)),
    "rosinality conditional": Case(
        lambda: PixelSNAIL(4, 4, conditional=True), (4, 4), condition=torch.randint(3, (2, 2))
    ),
    "original": Case(OriginalSNAIL, (1, 4, 5), IMAGES),
    "original rgb": Case(lambda: OriginalSNAIL(3), (3, 4, 5), IMAGES),
    "neocxi": Case(NeocxiSNAIL, (3, 4, 5), IMAGES),
    "mha": mha(),
    "mha batch second": mha(make={"batch_first": False}),
    "mha float": mha(mask=nn.Transformer.generate_square_subsequent_mask, call={"need_weights": False}),
    "mha is_causal": mha(
        mask=nn.Transformer.generate_square_subsequent_mask, call={"is_causal": True, "need_weights": False}
    ),
    "mha is_causal weights": mha(call={"is_causal": True}),
    "mha each": mha(call={"average_attn_weights": False}),
    "mha 3d mask": mha(expand=True),
    "mha bias_kv": mha(make={"add_bias_kv": True}),
    "mha zero": mha(make={"add_zero_attn": True}),
    "encoder": encoder(),
    "encoder norm first": encoder(norm_first=True, activation="gelu", norm=True),
    "encoder is_causal": encoder(is_causal=True, dropout=0.3),
    "encoder batch second": encoder(batch_first=False),
    "decoder": decoder(),
    "decoder norm first": decoder(norm_first=True),
    "decoder batch second": decoder(batch_first=False),
    "cross": cross(),
    "transformer": transformer(),
    "class gpt": Case(lambda: ClassGPT(20, LEVELS + 4), num_classes=4),
    "prefix gpt rows": Case(lambda: ClassGPT(20, LEVELS + 4, 6), condition=torch.randint(3, (6,))),
    "prefix gpt": Case(lambda: ClassGPT(20, LEVELS + 4, 4), condition=torch.randint(3, (4,))),
    "prefix gpt line": Case(lambda: ClassGPT(6, LEVELS + 4, 4, size=(1, 6)), (1, 6), condition=torch.randint(3, (4,))),
    "prefix gpt emb": Case(lambda: EmbeddedClassGPT(20, LEVELS + 4, 4), condition=torch.randint(3, (4,))),
    "prefix gpt emb line": Case(
        lambda: EmbeddedClassGPT(6, LEVELS + 4, 4, size=(1, 6)), (1, 6), condition=torch.randint(3, (4,))
    ),
    "embedded class gpt": Case(lambda: EmbeddedClassGPT(20, LEVELS + 4), num_classes=4),
    "gpt2": Case(lambda: GPT2(20, (4, 5))),
    "gpt2 line": Case(lambda: GPT2(6, (1, 6)), (1, 6)),
    "gpt2 one channel": Case(lambda: GPT2(20, (4, 5)), (1, 4, 5)),
    "axial": Case(Axial, (1, 4, 5), IMAGES),
    "axial rows": Case(lambda: Axial(only="row"), (1, 4, 5), IMAGES),
    "axial columns": Case(lambda: Axial(only="column"), (1, 4, 5), IMAGES),
    "axial biased": Case(lambda: Axial(only="row", rows=4), (1, 4, 5), IMAGES),
    "axial heads": Case(lambda: Axial(heads=2), (1, 3, 3), IMAGES),
    "axial rgb": Case(lambda: Axial(3, heads=3), (3, 2, 4), IMAGES),
    "pooled": Case(Pooled, (1, 4, 6), IMAGES),
    "pooled inside": Case(lambda: Pooled(True), (1, 4, 6), IMAGES),
    **{
        f"pixel gpt {style}": Case(lambda style=style: PixelGPT(style), (3, 4, 5), IMAGES)
        for style in ("pad", "cat", "roll", "first")
    },
    "pixel gpt line": Case(lambda: PixelGPT("pad"), (3, 1, 20), IMAGES),
    "pixel gpt column": Case(lambda: PixelGPT("cat"), (3, 20, 1), IMAGES),
    "labels": Case(LabelGPT, num_classes=4),
    "adaptive": Case(lambda: LabelGPT(True), num_classes=4),
    "cross map": Case(lambda: CrossLabels("map"), (1, 4, 5), IMAGES, condition=torch.randn(3, 3, 2)),
    "cross labels": Case(lambda: CrossLabels("labels"), (1, 4, 5), IMAGES, num_classes=4),
    "cross table": Case(lambda: CrossLabels("table"), (1, 4, 5), IMAGES),
    "shifted logits": Case(lambda: ShiftedLogits((4, 5))),
    "shifted logits line": Case(lambda: ShiftedLogits((1, 7)), (1, 7)),
    **{
        f"joined {b} {f}": Case(lambda b=b, f=f: Joined(b, f), condition=torch.randn(7, 3))
        for b in (False, True)
        for f in (False, True)
    },
    "llama": Case(Llama),
    "windows": Case(lambda: Windows(2), (1, 4, 6), IMAGES),
    "blocks of a row": Case(lambda: Blocks(5)),
    "token of twice the code": Case(lambda: Arithmetic(lambda x: 2 * x + 1)),
    "token of the code backwards": Case(lambda: Arithmetic(lambda x: LEVELS - 1 - x)),
    "token of code and column": Case(lambda: Arithmetic(lambda x: x + torch.arange(5) % 2 * LEVELS)),
    "bfloat16": half(torch.bfloat16),
    "float16": half(torch.float16),
    "float64": half(torch.float64),
}
