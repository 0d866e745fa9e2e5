"""Image GPT: the published network by loops, weights of the common port, likelihoods by enumeration, the sampler."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import torch.nn.functional as F

import fastgen
from fastgen import models
from fastgen.models import ImageGPT
from fastgen.models.convert import image_gpt_from_port
from fastgen.sampling import naive_sample

SMALL = {"num_filters": 8, "num_blocks": 2, "num_heads": 2}


def build(image_shape=(1, 3, 5), levels=4, **options):
    """A small model whose parameters are all generic."""
    torch.manual_seed(0)
    model = ImageGPT(image_shape=image_shape, levels=levels, **{**SMALL, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def random_images(model, count):
    images = torch.randint(model.levels, (count, *model.image_shape), generator=torch.Generator().manual_seed(0))
    return images.to(model.head.dtype)


def test_published_configuration():
    """Of iGPT-S, matrix by matrix; the paper says 76M."""
    with torch.device("meta"):
        model = ImageGPT(image_shape=(1, 32, 32), levels=512, embedding_dim=512)
    d = 512
    block = d * 3 * d + d * d + 2 * d * 4 * d + 2 * d
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 24 * block + 512 * d + d + 1024 * d + d + d * 512 == 76_571_648


def port(levels=5, positions=15, d=8, layers=2, bias=True):
    """A state dict in the names and shapes of the port, whose matrices are [in, out] but for the last."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"wte.weight": (levels + 1, d), "wpe.weight": (positions, d), "ln_f.weight": (d,)}
    for i in range(layers):
        for name, inputs, outputs in (
            *(("attn.c_attn", d, 3 * d), ("attn.c_proj", d, d)),
            *(("mlp.c_fc", d, 4 * d), ("mlp.c_proj", 4 * d, d)),
        ):
            shapes |= {f"h.{i}.{name}.weight": (inputs, outputs), f"h.{i}.{name}.bias": (outputs,)}
        shapes |= {f"h.{i}.ln_1.weight": (d,), f"h.{i}.ln_2.weight": (d,)}
    state = {f"transformer.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    state["lm_head.weight"] = torch.randn(levels, d, generator=generator)
    if not bias:
        state = {name: 0 * tensor if name.endswith("bias") else tensor for name, tensor in state.items()}
    return {name: tensor.double() / 2 for name, tensor in state.items()}


def published(state, codes, heads):
    """The published forward pass for one image, position by position: int64 [T] -> logits [T, levels]."""
    t = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    tokens = [len(t["wte.weight"]) - 1, *codes[:-1].tolist()]
    xs = [t["wte.weight"][token] + t["wpe.weight"][i] for i, token in enumerate(tokens)]

    def norm(x, name):
        return x / (x.square().mean() + 1e-5).sqrt() * t[f"{name}.weight"]

    def linear(x, name):
        return x @ t[f"{name}.weight"] + t[f"{name}.bias"]

    depth = len(xs[0]) // heads
    for i in range(sum(name.endswith("ln_1.weight") for name in t)):
        made = [linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn") for x in xs]
        found = []
        for at in range(len(xs)):
            parts = []
            for head in range(heads):
                query, keys, values = (
                    [m.view(3, heads, depth)[which, head] for m in made[: at + 1]] for which in range(3)
                )
                odds = torch.stack([query[at] @ key / depth**0.5 for key in keys]).softmax(0)
                parts.append(sum(p * value for p, value in zip(odds, values, strict=True)))
            found.append(linear(torch.cat(parts), f"h.{i}.attn.c_proj"))
        xs = [x + more for x, more in zip(xs, found, strict=True)]
        hidden = [linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc") for x in xs]
        xs = [x + linear(h / (1 + torch.exp(-1.702 * h)), f"h.{i}.mlp.c_proj") for x, h in zip(xs, hidden, strict=True)]
    return torch.stack([t["lm_head.weight"] @ norm(x, "ln_f") for x in xs])


@pytest.mark.parametrize("bias", [True, False])
def test_weights_of_the_port(bias):
    state = port(bias=bias)
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 15, 15), "transformer.h.1.attn.masked_bias": torch.ones(())}
    model = image_gpt_from_port({**state, **masks}, image_size=(3, 5), num_heads=4)
    assert model.config["bias"] is bias and model.image_shape == (1, 3, 5) and model.levels == 5
    codes = torch.randint(5, (2, 1, 3, 5))
    logits = model(codes).flatten(2).mT
    for image, got in zip(codes, logits, strict=True):
        torch.testing.assert_close(got, published(state, image.flatten(), 4))


def spoiled(how):
    state = port()
    key = "transformer.h.1.mlp.c_fc.weight"
    if how == "missing":
        del state[key]
    elif how == "unexpected":
        state["transformer.h.0.crossattention.c_attn.weight"] = torch.zeros(1)
    elif how == "another network":
        return {"conv.weight": torch.zeros(3)}
    elif how == "shape":
        state[key] = state[key][:, :5]
    elif how == "dims":
        state["lm_head.weight"] = torch.zeros(())
    return state


@pytest.mark.parametrize(
    ("how", "options", "text"),
    [
        ("missing", {"image_size": (3, 5)}, r"missing transformer\.h\.1\.mlp\.c_fc\.weight; unexpected nothing"),
        ("unexpected", {"image_size": (3, 5)}, r"missing nothing; unexpected transformer\.h\.0\.cross"),
        ("another network", {}, r"missing lm_head\.weight, .* and \d more; unexpected conv\.weight"),
        ("shape", {"image_size": (3, 5)}, r"transformer\.h\.1\.mlp\.c_fc\.weight: \[8, 5\] does not fit"),
        ("dims", {"image_size": (3, 5)}, r"expected two dimensions of 'transformer\.wpe\.weight'"),
        ("", {}, r"image_size: expected \(H, W\) of 15 positions, got \(3, 3\)"),
        ("", {"image_size": (3, 5), "num_heads": 3}, "num_heads: expected a divisor of num_filters=8, got 3"),
    ],
)
def test_weights_that_do_not_fit(how, options, text):
    with pytest.raises(ValueError, match=text):
        image_gpt_from_port(spoiled(how), **options)


CASES = {
    "numbers": {},
    "embeddings": {"embedding_dim": 8},
    "another width": {"embedding_dim": 3, "num_classes": 2},
    "bernoulli": {"levels": 2, "head": "bernoulli", "bias": True},
    "many codes": {"levels": 300, "embedding_dim": 8},
    "colours": {"image_shape": (3, 2, 3), "head": "logistic_mixture", "num_mixtures": 2},
    "one pixel": {"image_shape": (1, 1, 1)},
    "classes, a column": {"image_shape": (2, 4, 1), "num_classes": 3},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_sampler_draws_the_images_of_the_naive_loop(options):
    model = build(**options)
    labels = None if model.num_classes is None else torch.tensor([0, 1, 1, 0, 1])
    sampler = fastgen.Sampler(model)
    images = sampler.sample(5, seed=2, labels=labels)
    assert torch.equal(images, naive_sample(model, 5, seed=2, labels=labels))
    assert fastgen.audit(model, images, seed=2, labels=labels).ok
    assert len(images.unique(dim=0)) > 1


@pytest.mark.parametrize(
    "options",
    [{}, {"embedding_dim": 8}, {"head": "bernoulli"}, {"image_shape": (2, 1, 2)}, {"num_classes": 2, "bias": True}],
    ids=str,
)
def test_a_distribution(options):
    model = build(**{"image_shape": (1, 2, 2), "levels": 2, **options}).double()
    every = torch.tensor(list(itertools.product(range(2), repeat=4))).to(model.head.dtype).view(-1, *model.image_shape)
    labels = None if model.num_classes is None else torch.ones(16, dtype=torch.int64)
    nats = model.log_prob(every, labels).detach()
    assert float(nats.exp().sum()) == pytest.approx(1.0, abs=1e-10)
    assert float(nats.std()) > 0.1


@pytest.mark.parametrize("options", [{}, {"embedding_dim": 5, "num_classes": 3, "dropout": 0.5}], ids=str)
def test_gradients_and_checkpoints(options, tmp_path):
    model = build(**options).train()
    images, labels = random_images(model, 6), torch.arange(6) % 3 if options else None
    model.log_prob(images, labels).sum().backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []
    model.eval()
    assert models.get("image_gpt")(**json.loads(json.dumps(model.config))).config == model.config
    fastgen.save(model, tmp_path / "m.safetensors")
    again = fastgen.load(tmp_path / "m.safetensors")
    assert torch.equal(again.log_prob(images, labels), model.log_prob(images, labels))


def test_initial_weights():
    """Those of the published code: every level as likely, whatever the image."""
    model = ImageGPT(image_shape=(1, 3, 5), levels=4, **SMALL, bias=True)
    images = random_images(model, 2)
    nats = F.cross_entropy(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)) * 15
    torch.testing.assert_close(model.log_prob(images), -nats.expand(2))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_heads": 3}, "num_heads: expected a divisor of num_filters=8, got 3"),
        ({"num_filters": 0}, "num_filters: expected an integer of at least 1, got 0"),
        ({"dropout": 1.0}, "dropout: expected"),
        ({"embedding_dim": 4, "image_shape": (3, 2, 2)}, "image_shape: expected one channel with embedding_dim=4"),
        ({"embedding_dim": 4, "head": "logistic_mixture"}, 'head: expected "categorical" with embedding_dim'),
        ({"levels": 300}, "levels: expected an integer in 2..256, got 300"),
    ],
    ids=str,
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        ImageGPT(**{"image_shape": (1, 3, 5), "levels": 4, **SMALL, **options})
