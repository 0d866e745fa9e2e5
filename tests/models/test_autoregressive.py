"""Autoregressive models: causality by autograd, normalisation by enumeration, checks of the input."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from fastgen import models
from fastgen.metrics import bits_per_dim
from fastgen.models import GatedPixelCNN, PixelCNN, PixelRNN

SMALL = {
    PixelCNN: {"num_filters": 6, "num_blocks": 2, "num_features": 9},
    GatedPixelCNN: {"num_filters": 6, "num_blocks": 3, "kernel_size": 3},
    PixelRNN: {"num_filters": 6, "num_blocks": 2, "num_features": 9},
}
ALL = pytest.mark.parametrize("cls", list(SMALL), ids=lambda cls: cls.name)


def build(cls, image_shape, levels=4, seed=0, **options):
    torch.manual_seed(seed)
    return cls(image_shape=image_shape, levels=levels, **{**SMALL[cls], **options})


def random_images(model, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.levels, (count, *model.image_shape), generator=generator).to(torch.uint8)


def dependence(model, draws=8):
    """bool [E, E]: whether the parameters of element e (raster order, then colour) depend on element d.

    Any of several random inputs may show it: in a single one all ReLUs on the way may be closed.
    """
    channels, height, width = model.image_shape
    model = model.double()
    x = torch.randn(draws, channels, height, width, dtype=torch.float64, requires_grad=True)
    labels = None if model.num_classes is None else torch.zeros(draws, dtype=torch.int64)
    params = model(x, labels).unflatten(1, (channels, -1))  # [draws, C, K, H, W]
    weights = torch.randn(params.shape[2], dtype=torch.float64)
    outputs = torch.einsum("nckhw,k->hwc", params, weights).flatten()
    rows = [torch.autograd.grad(output, x, retain_graph=True)[0] for output in outputs]
    return torch.stack([(row != 0).any(0).permute(1, 2, 0).flatten() for row in rows])


@ALL
@pytest.mark.parametrize("image_shape", [(1, 4, 5), (3, 3, 4), (2, 5, 1), (4, 1, 3), (3, 1, 1)], ids=str)
def test_parameters_of_an_element_depend_on_earlier_elements_only(cls, image_shape):
    depends = dependence(build(cls, image_shape))
    later_or_same = torch.ones_like(depends).triu()
    assert not (depends & later_or_same).any()
    assert depends[1:, 0].any() or depends.shape == (1, 1)  # and they do depend on something


@pytest.mark.parametrize("image_shape", [(1, 4, 5), (3, 3, 4)], ids=str)
@pytest.mark.parametrize("num_classes", [None, 3])
def test_gated_pixelcnn_has_no_blind_spot(image_shape, num_classes):
    depends = dependence(build(GatedPixelCNN, image_shape, num_filters=18, num_classes=num_classes))
    assert torch.equal(depends, torch.ones_like(depends).tril(-1))


def test_pixelcnn_has_the_blind_spot_that_the_gated_one_removes():
    shape = (1, 2, 7)
    element, above_right = 7 + 2, 6  # pixel (1, 2), pixel (0, 6)
    assert not dependence(build(PixelCNN, shape, num_blocks=4))[element, above_right]
    assert dependence(build(GatedPixelCNN, shape, num_blocks=4))[element, above_right]


@ALL
@pytest.mark.parametrize(
    ("image_shape", "levels", "options"),
    [
        ((1, 2, 2), 2, {}),
        ((1, 2, 2), 2, {"head": "bernoulli"}),
        ((3, 1, 2), 2, {}),
        ((3, 1, 1), 3, {}),
        ((1, 3, 1), 5, {}),
    ],
    ids=str,
)
def test_probabilities_of_all_images_sum_to_one(cls, image_shape, levels, options):
    model = build(cls, image_shape, levels, **options).double()
    every = torch.tensor(list(itertools.product(range(levels), repeat=math.prod(image_shape))), dtype=torch.uint8)
    nats = model.log_prob(every.reshape(-1, *image_shape))
    assert nats.shape == (levels ** math.prod(image_shape),)
    assert nats.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    assert nats.exp().max() > 1.01 * nats.exp().mean()  # not just the uniform distribution


def test_probabilities_sum_to_one_for_each_class():
    model = build(GatedPixelCNN, (1, 2, 2), 2, num_classes=3).double()
    every = torch.tensor(list(itertools.product(range(2), repeat=4)), dtype=torch.uint8).reshape(-1, 1, 2, 2)
    nats = torch.stack([model.log_prob(every, torch.full((16,), label)) for label in range(3)])
    torch.testing.assert_close(nats.exp().sum(1), torch.ones(3, dtype=torch.float64))
    assert (nats[0] - nats[1]).abs().min() > 0


def test_labels_shift_the_gates_of_both_stacks():
    """Equation 4: a label adds a bias to the gates, so a model with these biases built in is the conditional one."""
    conditional = build(GatedPixelCNN, (1, 4, 3), num_classes=2)
    plain = build(GatedPixelCNN, (1, 4, 3))
    plain.load_state_dict(conditional.state_dict(), strict=False)
    for layer, source in zip(plain.layers, conditional.layers, strict=True):
        bias_v, bias_h = source.label_bias.weight[1].detach().chunk(2)
        mixed = source.vertical_to_horizontal.weight.detach()[:, :, 0, 0] @ bias_v
        layer.vertical.bias.data += bias_v
        layer.horizontal.bias.data += bias_h - mixed
    images = random_images(plain, 3)
    torch.testing.assert_close(plain.log_prob(images), conditional.log_prob(images, torch.ones(3, dtype=torch.int64)))


def test_pixelcnn_has_the_published_layers():
    with torch.device("meta"):
        model = PixelCNN()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if "weight" in name}
    assert shapes["input.weight"] == (256, 3, 7, 7)
    assert shapes["blocks.14.reduce.weight"] == (128, 256, 1, 1)
    assert shapes["blocks.14.conv.weight"] == (128, 128, 3, 3)
    assert shapes["blocks.14.expand.weight"] == (256, 128, 1, 1)
    assert shapes["features.weight"] == (1024, 256, 1, 1)
    assert shapes["output.weight"] == (3 * 256, 1024, 1, 1)
    assert len(shapes) == 1 + 15 * 3 + 2


def test_pixelrnn_has_the_published_layers():
    with torch.device("meta"):
        model = PixelRNN()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if "bias" not in name}
    assert shapes["input.weight"] == (256, 3, 7, 7)
    assert shapes["blocks.11.lstm.input_to_state.weight"] == (512, 256, 1, 3)
    assert shapes["blocks.11.lstm.state_to_state"] == (512, 128, 3)
    assert shapes["blocks.11.expand.weight"] == (256, 128, 1, 1)
    assert shapes["features.weight"] == (1024, 256, 1, 1)
    assert shapes["output.weight"] == (3 * 256, 1024, 1, 1)
    assert len(shapes) == 1 + 12 * 3 + 2


def test_pixelrnn_sees_a_triangle_above_in_one_layer():
    """The recurrence carries what is in the rows above to all rows below (section 3.1)."""
    depends = dependence(build(PixelRNN, (1, 12, 5), num_blocks=1))
    assert depends[11 * 5 + 2, 0] and depends[11 * 5 + 2, 4]
    assert not dependence(build(PixelCNN, (1, 12, 5), num_blocks=1))[11 * 5 + 2, 0]


def test_gated_pixelcnn_has_the_published_layers():
    with torch.device("meta"):
        model = GatedPixelCNN(num_classes=1000)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if "weight" in name}
    assert shapes["layers.0.vertical.weight"] == (768, 3, 4, 7)
    assert shapes["layers.0.horizontal.weight"] == (768, 3, 1, 7)
    assert shapes["layers.19.vertical.weight"] == (768, 384, 3, 5)
    assert shapes["layers.19.vertical_to_horizontal.weight"] == (768, 768, 1, 1)
    assert shapes["layers.19.horizontal.weight"] == (768, 384, 1, 5)
    assert shapes["layers.19.output.weight"] == (384, 384, 1, 1)
    assert shapes["layers.19.label_bias.weight"] == (1000, 4 * 384)
    assert shapes["output.weight"] == (3 * 256, 384, 1, 1)
    assert len(shapes) == 20 * 5 + 2


@ALL
@pytest.mark.parametrize("image_shape", [(1, 1, 1), (3, 1, 7), (3, 5, 2), (1, 13, 11)], ids=str)
def test_any_image_size(cls, image_shape):
    model = build(cls, image_shape, levels=256)
    channels, height, width = image_shape
    images = random_images(model, 2)
    assert model(model.head.encode(images)).shape == (2, channels * 256, height, width)
    assert model.log_prob(images).shape == (2,)
    assert model.log_prob(images[:0]).shape == (0,)


@ALL
def test_log_prob_of_an_image_does_not_depend_on_the_batch(cls):
    model = build(cls, (3, 5, 4))
    images = random_images(model, 5)
    alone = torch.cat([model.log_prob(image[None]) for image in images])
    torch.testing.assert_close(model.log_prob(images), alone)


@ALL
def test_every_parameter_gets_a_gradient(cls):
    model = build(cls, (3, 4, 4), **({"num_classes": 2} if cls is GatedPixelCNN else {}))
    labels = torch.tensor([0, 1]) if model.num_classes else None
    model.log_prob(random_images(model, 2), labels).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []


@ALL
def test_config_builds_the_same_model(cls):
    model = build(cls, (3, 4, 5), levels=7, **({"num_classes": 3} if cls is GatedPixelCNN else {}))
    config = json.loads(json.dumps(model.config))
    twin = models.get(model.name)(**config)
    twin.load_state_dict(model.state_dict())
    images = random_images(model, 2)
    labels = torch.tensor([2, 0]) if model.num_classes else None
    assert torch.equal(twin.log_prob(images, labels), model.log_prob(images, labels))
    assert twin.config == model.config


def test_registry():
    names = [
        "conditional_vae",
        "dcgan",
        "gan",
        "gated_pixelcnn",
        "image_gpt",
        "pixelcnn",
        "pixelcnnpp",
        "pixelrnn",
        "pixelsnail",
        "vae",
        "vqvae",
    ]
    assert models.names() == names
    assert models.get("pixelcnn") is PixelCNN
    with pytest.raises(ValueError, match=f"unknown model 'pixelvae'; known models: {', '.join(names)}"):
        models.get("pixelvae")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"image_shape": (28, 28)}, r"image_shape: expected \(channels, height, width\), got \(28, 28\)"),
        ({"image_shape": (1, 0, 28)}, "image_shape: expected an integer of at least 1, got 0"),
        ({"levels": 257}, "levels: expected an integer in 2..256, got 257"),
        ({"levels": 1}, "levels: expected an integer in 2..256, got 1"),
        ({"head": "logistic"}, 'head: expected "categorical" or "bernoulli", got \'logistic\''),
        ({"head": "bernoulli", "levels": 4}, "2 levels, got levels=4"),
        ({"num_filters": 0}, "num_filters: expected an integer of at least 1, got 0"),
        ({"num_blocks": 2.5}, "num_blocks: expected an integer of at least 1, got 2.5"),
        ({"kernel_size": 4}, "kernel_size: expected an odd integer, got 4"),
        ({"num_classes": 0}, "num_classes: expected an integer of at least 1, got 0"),
    ],
    ids=str,
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        GatedPixelCNN(**{"image_shape": (1, 4, 4), "levels": 4, **SMALL[GatedPixelCNN], **options})


@pytest.mark.parametrize(
    ("images", "labels", "error", "text"),
    [
        (torch.zeros(2, 1, 4, 3), [0, 1], TypeError, "images: expected a tensor of uint8 levels, got torch.float32"),
        ([[0]], [0, 1], TypeError, "images: expected a tensor of uint8 levels, got list"),
        (
            torch.zeros(2, 1, 3, 4).byte(),
            [0, 1],
            ValueError,
            r"images: expected shape \[N, 1, 4, 3\], got \[2, 1, 3, 4\]",
        ),
        (torch.zeros(1, 4, 3).byte(), [0], ValueError, r"images: expected shape \[N, 1, 4, 3\], got \[1, 4, 3\]"),
        (torch.full((2, 1, 4, 3), 4).byte(), [0, 1], ValueError, "images: expected levels in 0..3, got 4..4"),
        (torch.zeros(2, 1, 4, 3).byte(), None, ValueError, "labels: this model is conditional on 5 classes, got None"),
        (torch.zeros(2, 1, 4, 3).byte(), [0, 5], ValueError, r"labels: expected values in 0..4, got 0..5"),
        (torch.zeros(2, 1, 4, 3).byte(), [-1, 0], ValueError, r"labels: expected values in 0..4, got -1..0"),
        (torch.zeros(2, 1, 4, 3).byte(), [0], ValueError, r"labels: expected shape \[2\], got \[1\]"),
        (torch.zeros(2, 1, 4, 3).byte(), [0.0, 1.0], TypeError, "labels: expected an int64 tensor, got torch.float32"),
    ],
    ids=range(10),
)
def test_bad_input(images, labels, error, text):
    model = build(GatedPixelCNN, (1, 4, 3), num_classes=5)
    with pytest.raises(error, match=text):
        model.log_prob(images, None if labels is None else torch.tensor(labels))


@ALL
def test_labels_for_an_unconditional_model(cls):
    model = build(cls, (1, 2, 2))
    labels = torch.tensor([0])
    with pytest.raises(ValueError, match="labels: this model is unconditional"):
        model.log_prob(random_images(model, 1), labels)
    with pytest.raises(ValueError, match="labels"):
        model(torch.zeros(1, 1, 2, 2), labels)


@ALL
def test_nan_weights_are_named(cls):
    model = build(cls, (1, 3, 3))
    model.output.bias.data[0] = math.nan
    with pytest.raises(RuntimeError, match=r"log_prob is not finite: parameter 'output.bias' holds NaN or infinity"):
        model.log_prob(random_images(model, 1))


def test_bits_per_dim_of_a_uniform_model_is_log2_of_the_levels():
    model = build(PixelCNN, (3, 2, 3), levels=16)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert bits_per_dim(model, random_images(model, 5), batch_size=2) == pytest.approx(4.0, abs=1e-6)


def test_bits_per_dim_is_the_mean_over_elements_whatever_the_batch_size():
    model = build(GatedPixelCNN, (1, 3, 4), num_classes=2).train()
    images, labels = random_images(model, 7), torch.arange(7) % 2
    expected = -model.log_prob(images, labels).double().sum().item() / (7 * 12 * math.log(2))
    for batch_size in (1, 3, 64):
        assert bits_per_dim(model, images, labels, batch_size=batch_size) == pytest.approx(expected, rel=1e-6)
    assert model.training


def test_bits_per_dim_of_nothing():
    model = build(PixelCNN, (1, 2, 2))
    with pytest.raises(ValueError, match="at least one image"):
        bits_per_dim(model, random_images(model, 0))
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        bits_per_dim(model, random_images(model, 1), batch_size=0)
