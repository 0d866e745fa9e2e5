"""PixelSNAIL: causality by autograd, attention by loops, likelihoods by hand, the sampler against the naive loop."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

import fastgen
from fastgen import models
from fastgen.models import PixelSNAIL
from fastgen.models.autoregressive.pixelsnail import attend, coordinates
from fastgen.models.autoregressive.weight_normed import GatedResidual, WeightNormed
from fastgen.sampling import naive_sample
from tests.sampling.parameters import errors, params_of_known

SMALL = {
    **{"num_filters": 6, "num_blocks": 2, "num_layers": 1, "num_mixtures": 2},
    **{"key_dim": 4, "value_dim": 6},
}


def build(image_shape=(1, 5, 7), levels=4, **options):
    """A small model in float64 whose parameters are all generic: no bias is zero, no g is one."""
    torch.manual_seed(0)
    model = PixelSNAIL(image_shape=image_shape, levels=levels, **{**SMALL, **options}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def random_images(model, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.levels, (count, *model.image_shape), generator=generator).to(torch.uint8)


def test_published_configuration():
    """The number of parameters of ``h12_noup_smallkey`` with 256 filters, layer by layer."""

    def conv(inputs, outputs, taps=1):
        return inputs * outputs * taps + 2 * outputs  # v, g, bias

    def gated(channels, taps=1, skip=0):
        return conv(channels, channels, taps) + conv(channels, 2 * channels, taps) + (skip and conv(skip, channels))

    attention = gated(256 + 6) + conv(256 + 6, 16) + gated(3 + 256 + 6) + conv(3 + 256 + 6, 16 + 128)
    block = 4 * gated(256, taps=4) + attention + gated(256, skip=128)
    with torch.device("meta"):
        model = PixelSNAIL()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == conv(4, 256, 3) + conv(4, 256, 2) + 12 * block + conv(256, 100) == 46_180_788
    assert model.config["dropout"] == model.blocks[11].layers[3].dropout == 0.5


def published(model, x):
    """The forward pass of the published code, written anew: x and the result are [N, H, W, channels]."""

    def conv(layer, x, left=None):
        v = layer.weight_v
        weight = layer.weight_g * v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        rows, columns = v.shape[2:]
        left = columns - 1 if left is None else left
        padded = F.pad(x, (0, 0, left, columns - 1 - left, rows - 1, 0))
        return sum(
            padded[:, dy : dy + x.shape[1], dx : dx + x.shape[2]] @ weight[:, :, dy, dx].T
            for dy, dx in itertools.product(range(rows), range(columns))
        ).add(layer.bias)

    def gated(layer, x, other=None):
        y = conv(layer.conv, F.elu(x))
        if other is not None:
            y = y + conv(layer.skip, F.elu(other))
        a, b = conv(layer.output, F.elu(y)).chunk(2, dim=3)
        return x + a * torch.sigmoid(b)

    def attention(keys, values, query):
        keys, values, query = (t.flatten(1, 2) for t in (keys, values, query))
        seen = torch.exp(query @ keys.transpose(1, 2) / math.sqrt(keys.shape[2])).tril(-1)
        return (seen / (seen.sum(2, keepdim=True) + 1e-30) @ values).unflatten(1, x.shape[1:3])

    _, height, width, _ = x.shape
    rows, columns = torch.arange(height).double(), torch.arange(width).double()
    background = [
        ((rows - height / 2) / height).view(-1, 1, 1) + 0 * x,
        ((columns - width / 2) / width)[:, None] + 0 * x,
    ]
    padded = torch.cat([x, torch.ones_like(x[..., :1])], dim=3)
    above = F.pad(conv(model.input.above, padded, left=1), (0, 0, 0, 0, 1, 0))[:, :-1]
    h = above + F.pad(conv(model.input.left, padded), (0, 0, 1, 0))[:, :, :-1]
    for block in model.blocks:
        for layer in block.layers:
            h = gated(layer, h)
        of = block.attention
        content = conv(of.content, gated(of.content_features, torch.cat([x, h, *background], dim=3)))
        query = conv(of.query, gated(of.query_features, torch.cat([h, *background], dim=3)))
        keys, values = content[..., : query.shape[3]], content[..., query.shape[3] :]
        h = gated(of.output, h, attention(keys, values, query))
    return conv(model.output, F.elu(h))


@pytest.mark.parametrize("image_shape", [(1, 5, 7), (3, 4, 5)], ids=str)
def test_forward_is_that_of_the_published_code(image_shape):
    model = build(image_shape, num_layers=2)
    x = torch.randn(2, *image_shape, dtype=torch.float64)
    torch.testing.assert_close(model(x), published(model, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


SHAPES = [(1, 5, 7), (3, 4, 5), (3, 3, 6), (1, 9, 2), (1, 1, 6), (1, 6, 1), (3, 1, 1)]


def dependence(model):
    """bool [P, P]: whether the parameters of pixel p (raster order) depend on any colour of pixel q."""
    x = torch.randn(4, *model.image_shape, dtype=torch.float64, requires_grad=True)
    params = model(x)
    outputs = torch.einsum("nkhw,k->hw", params, torch.randn(params.shape[1], dtype=torch.float64)).flatten()
    rows = [torch.autograd.grad(output, x, retain_graph=True)[0] for output in outputs]
    assert all(row.isfinite().all() for row in rows)
    return torch.stack([(row != 0).any(1).any(0).flatten() for row in rows])


@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("image_shape", SHAPES, ids=str)
def test_a_pixel_depends_on_all_earlier_pixels_and_on_no_other(image_shape, num_heads):
    depends = dependence(build(image_shape, num_blocks=1, num_heads=num_heads))
    assert torch.equal(depends, torch.ones_like(depends).tril(-1))


def test_only_attention_sees_what_is_above_to_the_right(monkeypatch):
    pixel, above_right = 7 + 2, 6  # pixel (1, 2), pixel (0, 6)
    assert dependence(build((1, 3, 7), num_blocks=1))[pixel, above_right]
    monkeypatch.setattr("fastgen.models.autoregressive.pixelsnail.attend", lambda q, k, values, heads: 0 * values)
    assert not dependence(build((1, 3, 7), num_blocks=1))[pixel, above_right]


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("size", [(3, 4), (1, 5), (4, 1), (1, 1)], ids=str)
def test_attention_by_loops(size, num_heads):
    height, width = size
    torch.manual_seed(0)
    query, keys = (torch.randn(2, 6, *size, dtype=torch.float64) for _ in range(2))
    values = torch.randn(2, 9, *size, dtype=torch.float64)
    expected = torch.zeros_like(values)
    key_dim, value_dim = 6 // num_heads, 9 // num_heads
    for n, head, y, x in itertools.product(range(2), range(num_heads), range(height), range(width)):
        of_keys = slice(head * key_dim, (head + 1) * key_dim)
        of_values = slice(head * value_dim, (head + 1) * value_dim)
        before = [(v, u) for v in range(height) for u in range(width) if v * width + u < y * width + x]
        weights = [
            math.exp(float(query[n, of_keys, y, x] @ keys[n, of_keys, v, u]) / math.sqrt(key_dim)) for v, u in before
        ]
        for weight, (v, u) in zip(weights, before, strict=True):
            expected[n, of_values, y, x] += weight / sum(weights) * values[n, of_values, v, u]
    found = attend(query, keys, values, num_heads)
    torch.testing.assert_close(found, expected)
    assert not found[:, :, 0, 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(3, 4), (1, 1)], ids=str)
def test_gradients_of_attention_are_finite(size, dtype):
    """The first position attends to nothing."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, channels, *size, dtype=dtype, requires_grad=True) for channels in (4, 4, 6)]
    attend(*inputs, 2).sum().backward()
    assert all(t.grad.isfinite().all() for t in inputs)
    assert not inputs[0].grad[:, :, 0, 0].any()
    assert not any(t.grad[:, :, -1, -1].any() for t in inputs[1:])


def test_coordinates():
    found = coordinates(torch.zeros(2, 3, 2, 4))
    assert torch.equal(found[1, 2], torch.tensor([-0.5, 0]).view(2, 1).expand(2, 4))
    assert torch.equal(found[0, 3], torch.tensor([-0.5, -0.25, 0, 0.25]).expand(2, 4))
    assert found.shape == (2, 6, 2, 4)


@pytest.mark.parametrize("image_shape", [*SHAPES, (3, 11, 13)], ids=str)
def test_any_image_size(image_shape):
    model = build(image_shape, levels=256)
    images = random_images(model, 2)
    nats = model.log_prob(images)
    assert nats.shape == (2,)
    assert model.log_prob(images[:0]).shape == (0,)
    torch.testing.assert_close(torch.cat([model.log_prob(image[None]) for image in images]), nats)


ENUMERATED = [
    ((1, 2, 2), 2, {}),
    ((3, 1, 2), 2, {}),
    ((1, 1, 3), 5, {}),
    ((3, 1, 1), 5, {"num_mixtures": 3}),
    ((1, 2, 2), 2, {"num_classes": 3}),
    ((2, 1, 2), 3, {"head": "categorical"}),
    ((1, 3, 2), 2, {"head": "bernoulli"}),
]


@pytest.mark.parametrize(("image_shape", "levels", "options"), ENUMERATED, ids=str)
def test_probabilities_of_all_images_sum_to_one(image_shape, levels, options):
    model = build(image_shape, levels, **options)
    every = torch.tensor(list(itertools.product(range(levels), repeat=math.prod(image_shape))), dtype=torch.uint8)
    labels = torch.full((len(every),), 1) if model.num_classes else None
    nats = model.log_prob(every.reshape(-1, *image_shape), labels)
    assert nats.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    assert nats.exp().max() > 1.01 * nats.exp().mean()  # not just the uniform distribution


def test_log_prob_is_the_sum_over_pixels_of_what_the_mixture_says():
    """By the distribution function of each logistic; what comes later is not there yet."""
    model = build((1, 3, 4), levels=5)
    images = random_images(model, 2)
    expected = torch.zeros(2, dtype=torch.float64)
    for y, x in itertools.product(range(3), range(4)):
        known = images.clone().flatten(2)
        known[..., y * 4 + x :] = 0
        params = model(model.head.encode(known.view_as(images)).double())[:, :, y, x]
        for n in range(2):
            logits, means, log_scales = params[n].view(3, 2)
            level, probability = int(images[n, 0, y, x]), 0.0
            for share, mean, log_scale in zip(logits.softmax(0), means, log_scales, strict=True):
                low, high = (((2 * k - 1) / 4 - 1 - mean) / log_scale.clamp(min=-7).exp() for k in (level, level + 1))
                below = torch.sigmoid(low) if level > 0 else 0
                up_to = torch.sigmoid(high) if level < 4 else 1
                probability = probability + share * (up_to - below)
            expected[n] += torch.log(probability)
    torch.testing.assert_close(model.log_prob(images), expected)


def test_log_prob_of_categories():
    model = build((3, 2, 3), levels=4, head="categorical")
    images = random_images(model, 5)
    params = model(model.head.encode(images).double()).unflatten(1, (3, 4))
    nats = -F.cross_entropy(params.transpose(1, 2), images.long(), reduction="none")
    torch.testing.assert_close(model.log_prob(images), nats.sum((1, 2, 3)))


def test_a_label_adds_a_bias_before_every_gate():
    conditional, plain = build((3, 5, 4), num_classes=2), build((3, 5, 4))
    plain.load_state_dict(conditional.state_dict(), strict=False)
    biases = {name: layer for name, layer in conditional.named_modules() if name.endswith("label_bias")}
    assert len(biases) == 2 * (1 + 3)  # of a block: its layer, and those of the query, the content and the output
    for name, layer in biases.items():
        plain.get_submodule(name.replace("label_bias", "output")).bias.data += layer.weight[1].detach()
    images = random_images(plain, 3)
    torch.testing.assert_close(plain.log_prob(images), conditional.log_prob(images, torch.tensor([1, 1, 1])))
    other = conditional.log_prob(images, torch.tensor([0, 0, 0]))
    assert (plain.log_prob(images) - other).abs().min() > 1e-3


@pytest.mark.parametrize("num_classes", [None, 2])
def test_initialisation_standardises_every_layer(num_classes):
    model = build((3, 6, 5), num_classes=num_classes).train()
    images = random_images(model, 6)
    labels = None if num_classes is None else torch.arange(6) % 2
    model.initialize(images, labels)
    assert model.training
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, WeightNormed):
            layer.register_forward_hook(lambda _, __, output, name=name: found.setdefault(name, output))
    model.eval().log_prob(images, labels)
    assert len(found) == 3 + 2 * (2 + 4 + 2 + 3)  # input and output; layer, query, content, output
    gates = {f"{name}.output" for name, layer in model.named_modules() if isinstance(layer, GatedResidual)}
    for name, output in found.items():
        std, mean = torch.std_mean(output, dim=(0, 2, 3), correction=0)
        expected = 0.1 if name in gates else 1.0
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-10, rtol=0, msg=name)
        torch.testing.assert_close(std, torch.full_like(std, expected), atol=1e-10, rtol=0, msg=name)


def test_every_parameter_gets_a_gradient():
    model = build((3, 4, 5), num_classes=2, num_heads=2).train()
    model.log_prob(random_images(model, 8), torch.arange(8) % 2).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.isfinite().all()] == []


def test_gradients_of_a_single_pixel_are_finite():
    model = build((3, 1, 1)).train()
    model.log_prob(random_images(model, 2)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_dropout_is_for_training():
    model = build((1, 4, 4))
    images = random_images(model, 2)
    assert torch.equal(model.log_prob(images), model.log_prob(images))
    model.train()
    assert not torch.equal(model.log_prob(images), model.log_prob(images))
    still = build((1, 4, 4), dropout=0).train()
    assert torch.equal(still.log_prob(images), still.eval().log_prob(images))


SAMPLED = [
    *(((1, 5, 7), {}), ((3, 4, 5), {}), ((1, 1, 6), {}), ((1, 6, 1), {}), ((3, 1, 1), {})),
    ((3, 4, 5), {"num_classes": 3, "num_heads": 2}),
    ((1, 5, 7), {"head": "categorical", "levels": 17, "num_classes": 3, "num_layers": 2}),
    ((2, 3, 4), {"head": "bernoulli", "levels": 2, "num_heads": 2}),
]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("image_shape", "options"), SAMPLED, ids=str)
def test_sampler_equals_the_naive_loop(image_shape, options, backend):
    model = build(image_shape, **{"levels": 256, **options}).float()
    labels = None if model.num_classes is None else torch.tensor([2, 0, 1, 1])
    sampler = fastgen.Sampler(model, backend=backend)
    images = sampler.sample(4, seed=3, labels=labels)
    assert torch.equal(images, naive_sample(model, 4, seed=3, labels=labels))
    assert torch.equal(images[2:], sampler.sample(2, seed=3, start=2, labels=None if labels is None else labels[2:]))
    assert fastgen.audit(model, images, seed=3, labels=labels).ok


def test_parameters_of_the_sampler_are_those_of_the_forward_pass():
    """Error against float64 at most twice that of PyTorch in float32."""
    model = build((3, 7, 9), levels=256, num_filters=20, key_dim=8, value_dim=20, num_heads=2)
    images = random_images(model, 3)
    with torch.no_grad():
        truth = model(model.head.encode(images).double())
        pytorch = model.float()(model.head.encode(images))
    found = params_of_known(fastgen.Sampler(model, backend="reference").plan, images)
    for ours, theirs in zip(errors(found, truth), errors(pytorch, truth), strict=True):
        assert ours <= 2 * theirs


def test_known_pixels_and_temperature_equal_the_naive_loop():
    model = build((3, 4, 5), levels=256, num_classes=4).float()
    mask = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    given = {"labels": torch.tensor([3, 0, 2]), "known": random_images(model, 3), "mask": mask, "temperature": 0.8}
    images = fastgen.Sampler(model).sample(3, seed=2**40, start=7, **given)
    assert torch.equal(images, naive_sample(model, 3, seed=2**40, start=7, **given))
    assert torch.equal(images.permute(0, 2, 3, 1)[mask], given["known"].permute(0, 2, 3, 1)[mask])


@pytest.mark.parametrize("options", [{}, {"head": "categorical", "num_classes": 3, "num_heads": 2}], ids=str)
def test_saved_and_loaded(tmp_path, options):
    model = build((3, 4, 5), levels=7, **options).float()
    assert json.loads(json.dumps(model.config)) == model.config
    fastgen.save(model, tmp_path / "m.safetensors")
    twin = fastgen.load(tmp_path / "m.safetensors")
    assert twin.config == model.config
    assert (type(twin), repr(twin.head)) == (models.get("pixelsnail"), repr(model.head))
    images = random_images(model, 2)
    labels = torch.tensor([2, 0]) if model.num_classes else None
    assert torch.equal(twin.log_prob(images, labels), model.log_prob(images, labels))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_layers": 0}, "num_layers: expected an integer of at least 1, got 0"),
        ({"key_dim": 2.5}, "key_dim: expected an integer of at least 1, got 2.5"),
        ({"value_dim": 0}, "value_dim: expected an integer of at least 1, got 0"),
        ({"num_heads": 4}, "num_heads: expected a divisor of key_dim=4 and value_dim=6, got 4"),
        ({"num_heads": 3}, "num_heads: expected a divisor of key_dim=4 and value_dim=6, got 3"),
        ({"dropout": 1.0}, "dropout: expected a number of at least 0 and below 1, got 1.0"),
        ({"head": "softmax"}, 'head: expected "logistic_mixture", "categorical" or "bernoulli", got \'softmax\''),
        ({"image_shape": (2, 4, 4)}, "channels"),
    ],
    ids=str,
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        PixelSNAIL(**{"image_shape": (1, 4, 4), **SMALL, **options})


def test_labels_must_fit_the_model():
    with pytest.raises(ValueError, match="labels: expected class labels with num_classes=2"):
        build((1, 2, 2), num_classes=2)(torch.zeros(1, 1, 2, 2).double())
    with pytest.raises(ValueError, match="labels: expected None with num_classes=None"):
        build((1, 2, 2))(torch.zeros(1, 1, 2, 2).double(), torch.tensor([0]))
