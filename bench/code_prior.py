"""Sampling the codes of an image from a causal transformer, the second stage of a VQGAN: the compiled sampler, and what
people do in PyTorch.

"naive" runs the whole sequence for every code; "cached" keeps keys and values and runs one position at a time, as
careful implementations do, eagerly or compiled with keys and values of fixed size. The sampler gets the network as it
is, without a cache of its own. The floor is the arithmetic of every position once, and for small batches the weights,
read once for each code. "guided" draws are led by a class, away from none (classifier-free guidance): two sequences for
each map of codes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.harness.case import Case, Provider, Work

TESTS = ("tests/sampling/test_attention.py", "tests/sampling/test_engine.py")
SIZES = {"12 layers of 512, 16x16 codes": {"side": 16, "width": 512, "heads": 8, "layers": 12, "codes": 1024}}
QUICK_SIZES = {"1 layer of 16, 2x3 codes": {"side": 3, "width": 16, "heads": 2, "layers": 1, "codes": 5}}
BATCHES = (1, 8, 32)
CLASSES, GUIDANCE, GUIDED_BATCHES = 1000, 3.0, (1, 8)

Cache = tuple[Tensor, Tensor]  # keys and values [N, heads, positions, depth]


class Block(nn.Module):
    """Attention and a multilayer perceptron, each behind a norm, added to what they read (Radford et al. 2019)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(
        self, x: Tensor, cache: Cache | None = None, at: int | Tensor = 0, seen: Tensor | None = None
    ) -> Tensor:
        """[N, T, width]; with a cache one position, `at`, which sees those before it or, where given, `seen`."""
        heads = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=2))
        query, keys, values = heads
        if cache is not None:
            for kept, new in zip(cache, (keys, values), strict=True):
                kept[:, :, at] = new[:, :, 0] if isinstance(at, int) else new
            keys, values = cache if seen is not None else (kept[:, :, : at + 1] for kept in cache)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, is_causal=cache is None)
        x = x + self.projection(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Prior(nn.Module):
    """A class, of which the last is none, comes as the token in front of the codes."""

    def __init__(self, side: int, width: int, heads: int, layers: int, codes: int, classes: int = 0):
        super().__init__()
        self.embedding = nn.Embedding(codes, width)
        self.start = nn.Embedding(classes + 1, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, side * side, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, codes, bias=False)

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """int64 [N, H, W] and [N], or None for a prior without classes -> logits [N, codes, H, W]."""
        start = self.start.weight.expand(len(codes), -1) if labels is None else self.start(labels)
        before = self.embedding(codes.flatten(1))[:, :-1]
        x = torch.cat([start[:, None], before], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).transpose(1, 2).unflatten(2, codes.shape[1:])

    def step(self, x: Tensor, position: Tensor, caches: list[Cache], at: int | Tensor, seen: Tensor | None) -> Tensor:
        """Logits [N, codes] of one code, after what is embedded as x [N, 1, width]."""
        x = x + position
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache, at, seen)
        return self.head(self.norm(x))[:, 0]


def cached_loop(
    prior: Prior, batch: int, step: Callable[..., Tensor] | None = None, labels: Tensor | None = None
) -> Tensor:
    """Samples by `Prior.step`; with labels, guided. Compiled steps get keys and values of all positions, and a mask."""
    length, heads = prior.position.shape[1], prior.blocks[0].heads
    with torch.inference_mode():
        if labels is None:
            start = prior.start.weight.expand(batch, -1)
        else:
            start = prior.start(torch.cat([labels, torch.full_like(labels, CLASSES)]))
        size = (len(start), heads, length, prior.position.shape[2] // heads)
        caches = [(torch.zeros(size), torch.zeros(size)) for _ in prior.blocks]
        x, codes = start[:, None], []
        for t in range(length):
            position = prior.position[:, t : t + 1]
            if step is None:
                logits = prior.step(x, position, caches, t, None)
            else:
                logits = step(x, position, caches, torch.tensor([t]), torch.arange(length)[None] <= t)
            if labels is not None:
                given, null = logits.chunk(2)
                logits = null + GUIDANCE * (given - null)
            codes.append(logits.softmax(dim=1).multinomial(1))
            x = prior.embedding(codes[-1].repeat(len(start) // batch, 1))
        return torch.cat(codes, dim=1)


def forward(prior: Prior, codes: Tensor, labels: Tensor | None = None) -> Tensor:
    """Logits; with labels guided ones."""
    with torch.inference_mode():
        if labels is None:
            return prior(codes)
        given, null = (prior(codes, of) for of in (labels, torch.full_like(labels, CLASSES)))
        return null + GUIDANCE * (given - null)


def build(options: dict[str, Any], batch: int, guided: bool, compiler: str) -> Work:
    import fastgen
    from fastgen.sampling import Categorical

    torch.manual_seed(0)
    prior = Prior(**options, classes=CLASSES if guided else 0).eval()
    side, codes = options["side"], options["codes"]
    given: dict[str, Any] = {
        "image_shape": (side, side),
        "head": Categorical(codes, input_range=None),
        "num_classes": CLASSES + 1 if guided else None,
        "max_batch": 2 * batch if guided else batch,
        "backend": "cpu",
    }
    sampler = fastgen.Sampler(prior, **given)
    rounded = {p: fastgen.Sampler(prior, precision=p, **given) for p in ("bf16", "int8")}
    images, labels = torch.randint(codes, (batch, side, side)), torch.randint(CLASSES, (batch,)) if guided else None
    drawn = {"labels": labels, "guidance_scale": GUIDANCE, "null_labels": CLASSES} if guided else {}
    note = f"estimate: one forward pass times the {side * side} passes of the loop"
    step = torch.compile(prior.step, backend=compiler)
    providers = {
        "naive": Provider(partial(forward, prior, images, labels), baseline=True, scale=side * side, note=note),
        "forward": Provider(
            partial(forward, prior, images, labels), baseline=True, note="scores the batch, draws nothing"
        ),
        "cached": Provider(
            partial(cached_loop, prior, batch, None, labels), baseline=True, note="eager, a cache written by hand"
        ),
        "cached compiled": Provider(
            partial(cached_loop, prior, batch, step, labels), baseline=True, note="a cache of fixed size"
        ),
        "fastgen": Provider(partial(sampler.sample, batch, **drawn), extra={"weight_bytes": sampler.weight_bytes}),
    }
    for precision, other in rounded.items():
        note, size = f"weights in {precision}", {"weight_bytes": other.weight_bytes}
        providers[f"fastgen {precision}"] = Provider(partial(other.sample, batch, **drawn), note=note, extra=size)
    read = sampler.weight_bytes * side * side  # once for each code
    return Work(providers, flops=sampler.plan.flops * batch * (2 if guided else 1), bytes=read)


def cases(quick: bool) -> list[Case]:
    """Every size at every batch size, then guided."""
    sizes, batches, guided = (QUICK_SIZES, (2,), (2,)) if quick else (SIZES, BATCHES, GUIDED_BATCHES)
    compiler = "eager" if quick else "inductor"
    return [
        Case(
            f"{name}, {'guided, ' if led else ''}batch {batch}",
            {"batch": batch, "guidance": GUIDANCE if led else 1.0, **options},
            partial(build, options, batch, led, compiler),
        )
        for name, options in sizes.items()
        for led in (False, True)
        for batch in (guided if led else batches)
    ]
